"""Measure the memory of a training step: what the forward pass keeps for the backward pass, and the process's peak.

Each arm runs in a fresh process. ``kept`` is what the forward pass allocates and does not free, by torch's allocator:
whatever autograd, its hooks or a module keep is in it; parameters and images, which were there before, are not.
``peak`` is the largest resident memory of some steps (VmHWM; on a GPU that of torch's allocator), less what there was
before the first step. ``uncached`` is the same peak in a process whose C library has no cache of small blocks, and
``tight`` in one whose C library returns freed maps of a MiB and more to the system (``PROCESSES``), so that there are
few gaps, or none, between maps. The largest batch that fits into ``--limit`` GiB is searched by the peak of the whole
process, in each kind of process.
``--against`` adds every arm with the package of another checkout. Examples::

    python benchmarks/training_memory.py --limit 4 --output memory.json --page
    python benchmarks/training_memory.py --cases resnet18:224:8 --arms bonn xnor --precision float32 bfloat16 --compile
    python benchmarks/training_memory.py --cases wrn22_16:32:128 --against ../before
    python benchmarks/training_memory.py --input memory.json --page

The file of ``--output`` is JSON: ``options`` of the command line, ``environment``, ``machine``, ``before`` (the
environment of the other checkout, or null), and ``results``, one for each case: ``case``, ``rows`` (one for each
variant of an arm: its fields, ``kept_bytes``, ``peak_bytes``, ``uncached_bytes`` and ``tight_bytes``, null if compiled,
and ``storage_bytes``, which is ``kept_bytes`` by another method, null if compiled or on a GPU), and ``largest_batch``
(by variant and kind of process, empty without ``--limit``).
"""

import argparse
import functools
import re
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import (
    BEFORE,
    FLOAT,
    ROOT,
    Child,
    Training,
    Variant,
    heading,
    parse,
    plain,
    prepare_torch,
    report,
    serve,
    subtitle,
    variants,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bonn_qat import plugins

MIB, GIB = 2**20, 2**30
CLASSES = 10
STEPS = 3  # from the second one on, the optimizer has its state
PROCESSES = {
    "default": None,
    "uncached": {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
    "tight": {"MALLOC_MMAP_THRESHOLD_": str(MIB)},
}


class Case(NamedTuple):
    """A network of timm, the height and width of its images, and the images of a step."""

    model: str
    size: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """``MODEL:SIZE:BATCH``. Raises ValueError for anything else."""
        model, size, batch = text.split(":")
        return cls(model, int(size), int(batch))


CASES = (Case("wrn22_16", 32, 128), Case("resnet18", 224, 32), Case("vit_tiny_patch16_224", 224, 32))


def measure_all(args: Namespace) -> dict[str, Any]:
    """The document of all measurements."""
    document = heading(args)
    before = None
    results = []
    for case in args.cases:
        rows, largest = [], {}
        for variant in variants(args):

            def ask(function: str, kind: str, batch: int, case: Case = case, variant: Variant = variant) -> Any:
                nonlocal before
                checkout = args.against if variant.checkout == BEFORE else ROOT
                child = Child(__file__, checkout, PROCESSES[kind])
                before = child.package if variant.checkout == BEFORE else before
                found = child.call(function, variant, plain(args), case._replace(batch=batch))
                child.close()
                print(f"{case.model}, {variant.name}, batch {batch}, {kind}: {found}", file=sys.stderr)
                return found

            measured = {kind: ask("measure", kind, case.batch) for kind in PROCESSES}
            others = {f"{kind}_bytes": measured[kind]["peak_bytes"] for kind in PROCESSES if kind != "default"}
            rows.append({"name": variant.name, **variant._asdict(), **measured["default"], **others})
            if args.limit and variant.arm in args.fit:
                largest[variant.name] = {
                    kind: largest_batch(functools.partial(ask, "process_peak", kind), args.limit * GIB)
                    for kind in PROCESSES
                }
        results.append({"case": case._asdict(), "rows": rows, "largest_batch": largest})
    return document | {"before": before, "results": results}


def measure(variant: Sequence[Any], options: dict[str, Any], case: Sequence[Any]) -> dict[str, int | None]:
    """Bytes of a variant, measured in this process, which must be a fresh one."""
    made, (model, size, batch), chosen = Variant(*variant), Case(*case), Namespace(**options)
    device = chosen.device
    prepare_torch(chosen.threads)
    small = Training(made, "wrn10_16", (3, 8, 8), CLASSES, chosen)  # what is loaded only once does not count
    small.step(*small.batch(2))
    del small
    subject = Training(made, model, (3, size, size), CLASSES, chosen)
    images = subject.batch(batch)
    before = reset_peak(device)
    for _ in range(STEPS):
        subject.step(*images)
    highest = None if made.mode else largest_so_far(device) - before
    subject.optimizer.zero_grad()
    by_storages = None if made.mode or device == "cuda" else kept_storages(lambda: subject.loss(*images))
    found = kept(lambda: subject.loss(*images), device)
    return {"kept_bytes": found, "peak_bytes": highest, "storage_bytes": by_storages}


def process_peak(variant: Sequence[Any], options: dict[str, Any], case: Sequence[Any]) -> int:
    """Train some steps in this process, which must be a fresh one; returns its largest memory in bytes."""
    (model, size, batch), chosen = Case(*case), Namespace(**options)
    prepare_torch(chosen.threads)
    subject = Training(Variant(*variant), model, (3, size, size), CLASSES, chosen)
    images = subject.batch(batch)
    for _ in range(STEPS):
        subject.step(*images)
    return largest_so_far(chosen.device)


def kept(forward: Callable[[], object], device: str) -> int:
    """Bytes that ``forward`` allocates and that are still there while its result lives, by torch's allocator."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        result = forward()
        return torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = forward()
    del result
    return sum(int(event.self_cpu_memory_usage) for event in recorded.events() or [])


def kept_storages(forward: Callable[[], object]) -> int:
    """The same by another method: every operator's results, as long as weak references to their storages live."""
    with _Storages() as storages:
        result = forward()
    total: int = sum(storages.sizes.values())
    del result
    return total


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: MutableMapping[Any, int] = WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # it was there before, unless an operator made it
                self.sizes.setdefault(tensor.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.sizes.setdefault(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return result


def largest_batch(peak: Callable[[int], int], limit: float) -> int:
    """The largest batch size, to 1%, whose ``peak`` is at most ``limit``, both in bytes; 0 if no image fits.

    The peak is about linear in the batch size, so each next guess is where the line through the two nearest sizes
    meets the limit, but not too close to a size that is known: peaks vary a little from process to process.
    """
    found = {size: peak(size) for size in (4, 8)}
    while True:
        low = max((size for size in found if found[size] <= limit), default=0)
        high = min((size for size in found if found[size] > limit), default=4 * max(found))
        if high in found and high - low <= max(1, low // 100):
            return low
        a, b = sorted(sorted(found, key=lambda size: abs(found[size] - limit))[:2])
        rise = max(1, found[b] - found[a])
        margin = max(1, (high - low) // 8)
        guess = int(a + (limit - found[a]) / rise * (b - a))
        guess = min(max(guess, low + margin), high - margin)
        found[guess] = peak(guess)


def reset_peak(device: str) -> int:
    """Forget the largest memory so far; returns what is in use, in bytes."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def largest_so_far(device: str) -> int:
    """The largest memory in use since :func:`reset_peak`, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    (size,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(size) * 1024


def tables(document: dict[str, Any]) -> str:
    """The results as Markdown: MiB, and ratios to the float network in the same mode and precision."""
    results = document["results"]
    cases = {"{model}, {size}x{size}, batch {batch}".format(**result["case"]): result for result in results}
    rows: dict[str, list[str]] = {}
    for result in results:
        by_name = {row["name"]: row for row in result["rows"]}
        for name, row in by_name.items():
            base = by_name[Variant(FLOAT, row["mode"], row["precision"]).name]
            rows.setdefault(name, []).extend(
                _cell(row[key], base[key]) for key in ("kept_bytes", "peak_bytes", "uncached_bytes", "tight_bytes")
            )
    lines = [
        f"{subtitle(document)} MiB, in brackets relative to the float network.",
        "",
        "| arm | " + " | ".join(f"{case}: kept | peak | uncached | tight" for case in cases) + " |",
        "|---" * (1 + 4 * len(cases)) + "|",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
    ]
    if names := list(dict.fromkeys(name for result in results for name in result["largest_batch"])):
        lines += ["", f"The largest batch in a process of at most {document['options']['limit']:g} GiB:", ""]
        lines += ["| network, process | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        for result in results:
            for kind in PROCESSES:
                sizes = (str(result["largest_batch"][name][kind]) for name in names)
                lines.append(
                    "| {model}, {size}x{size}".format(**result["case"]) + f", {kind} | " + " | ".join(sizes) + " |"
                )
    return "\n".join(lines) + "\n"


def _cell(count: int | None, base: int | None) -> str:
    return "" if count is None or not base else f"{count / MIB:.1f} ({count / base:.2f})"


def arguments(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", type=Case.parse, default=CASES, metavar="MODEL:SIZE:BATCH",
        help=f"default: {' '.join(':'.join(map(str, case)) for case in CASES)}",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, metavar="GIB", help="search the largest batch that fits into this")
    parser.add_argument("--fit", nargs="+", default=(FLOAT, "bonn"), metavar="ARM", help="the arms of that search")
    parser.add_argument("--threads", type=int, default=1)
    return parse(parser, sorted(set(plugins.schemes()) - {FLOAT}), argv)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve({"measure": measure, "process_peak": process_peak})
    else:
        report(__file__, arguments(), measure_all, tables)
