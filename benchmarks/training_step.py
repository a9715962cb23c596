"""Measure the cost of a training step: forward, losses, backward and SGD, for a float network and its binary forms.

All arms, eager and compiled, in all precisions, take turns in one run, each round in another order, so that noise of
the machine affects all alike; only ratios of the same round are meaningful. ``--against`` adds every arm with the
package of another checkout, in a process that takes its turns with this one; ``--evaluation`` times the evaluation of
a batch instead of a step. Examples::

    python benchmarks/training_step.py --compile --precision float32 bfloat16 --threads 1 2 --output step.json --page
    python benchmarks/training_step.py --model resnet18 --size 224 --batch 8 --arms bonn xnor --against ../before
    python benchmarks/training_step.py --device cuda --batch 128 1024 --precision float32 tf32 bfloat16 \\
        --compile default reduce-overhead --rounds 30 --output step-cuda.json
    python benchmarks/training_step.py --evaluation --arms bonn xnor reactnet --compile --against ../before
    python benchmarks/training_step.py --input step.json --page

The file of ``--output`` is JSON: ``options`` of the command line, ``environment`` (versions, commit), ``machine``,
``before`` (the environment of the other checkout, or null), and ``results``, one for each number of threads and batch
size: ``threads``, ``batch``, ``rows`` (one for each variant of an arm, see :func:`summarize`), and ``seconds`` (of one
step, a list with one entry for each round, by variant). On a GPU, ``waits`` of a row counts how often a step makes the
host wait, which should be never.
"""

import argparse
import functools
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import (
    BEFORE,
    NO_LOSSES,
    Child,
    Step,
    Times,
    Training,
    Variant,
    alternate,
    heading,
    parse,
    plain,
    prepare_torch,
    quartiles,
    report,
    serve,
    subtitle,
    synchronize,
    thread_count,
    timer,
    variants,
)

ARMS = ("bonn", "bonn" + NO_LOSSES, "xnor", "reactnet", "brevitas")
REFERENCES = [reference for reference, _ in Variant("", None, "").references()]


class Arms:
    """The variants of one process, by name."""

    def __init__(self) -> None:
        self._timers: dict[str, Callable[[], float]] = {}

    def reset(self, threads: int) -> None:
        """Forget all variants; the next ones run with ``threads`` threads."""
        self._timers = {}
        prepare_torch(threads)

    def add(self, variant: Sequence[Any], options: dict[str, Any], batch: int) -> dict[str, Any]:
        """Make a variant, and do its first steps; returns what is known about it before it is timed."""
        made, opts = Variant(*variant), Namespace(**options)
        training = Training(made, opts.model, (3, opts.size, opts.size), opts.classes, opts)
        images, targets = training.batch(batch)
        step = functools.partial(training.evaluate if opts.evaluation else training.step, images, targets)
        start = time.perf_counter()
        step()
        synchronize(opts.device)
        found = {
            "first_step_seconds": time.perf_counter() - start,
            "tflop": (2e-12 if opts.evaluation else 6e-12) * training.macs * batch,
        }
        for _ in range(opts.warmup):
            step()
        self._timers[made.name] = timer(step, opts)
        return found | ({"waits": _waits(step)} if opts.device == "cuda" else {})

    def time(self, name: str) -> float:
        """Seconds of a step."""
        return self._timers[name]()


def measure_all(args: Namespace) -> dict[str, Any]:
    """The document of all measurements."""
    document = heading(args)  # before the measurement: a commit during it is not what runs
    other = Child(__file__, args.against) if args.against else None
    here = Arms()
    results = []
    for threads in args.threads:
        for batch in args.batch:
            results.append({"threads": threads, "batch": batch} | measure(here, other, args, threads, batch))
    if other:
        other.close()
    return document | {"before": other and other.package, "results": results}


def measure(here: Arms, other: Child | None, args: Namespace, threads: int, batch: int) -> dict[str, Any]:
    """Time every variant, those of the ``other`` checkout there; returns the rows and seconds of a result."""
    here.reset(threads)
    if other:
        other.call("reset", threads)
    known: dict[Variant, dict[str, Any]] = {}
    timers: dict[str, Callable[[], float]] = {}
    for variant in variants(args):
        if other and variant.checkout == BEFORE:
            known[variant] = other.call("add", variant, plain(args), batch)
            timers[variant.name] = functools.partial(other.call, "time", variant.name)
        else:
            known[variant] = here.add(variant, plain(args), batch)
            timers[variant.name] = functools.partial(here.time, variant.name)
        print(f"{variant.name}: first step {known[variant]['first_step_seconds']:.1f} s", file=sys.stderr)
    times = alternate(timers, args.rounds)
    return {"rows": summarize(known, times, batch), "seconds": times}


def summarize(known: dict[Variant, dict[str, Any]], times: Times, batch: int) -> list[dict[str, Any]]:
    """Per variant: its fields, what is ``known`` of it, median times, and ratios.

    ``ratios`` has for each reference the first quartile, the median and the third quartile of the ratios to it in the
    same round. A MAC counts as two FLOPs, and the backward pass as two forward passes.
    """
    rows = []
    for variant, facts in known.items():
        seconds = times[variant.name]
        _, median, _ = quartiles(seconds)
        ratios = {
            name: quartiles(a / b for a, b in zip(seconds, times[reference.name], strict=True))
            for name, reference in variant.references()
            if reference in known and reference != variant
        }
        row = {
            "median_ms": 1e3 * median,
            "fastest_ms": 1e3 * min(seconds),
            "images_per_second": batch / median,
            "tflops": facts["tflop"] / median,
            "ratios": ratios,
        }
        rows.append({"name": variant.name, **variant._asdict(), **facts, **row})
    return rows


def tables(document: dict[str, Any]) -> str:
    """The results as Markdown; ratios are medians over the rounds, with the quartiles."""
    options = document["options"]
    lines = [
        f"{options['model']}, {options['size']}x{options['size']}, {subtitle(document)} Ratios are medians over "
        f"{options['rounds']} rounds (first to third quartile)."
    ]
    for result in document["results"]:
        rows = result["rows"]
        references = [name for name in REFERENCES if any(name in row["ratios"] for row in rows)]
        lines += ["", f"**Batch {result['batch']}, {thread_count(result['threads'])}**", ""]
        lines.append("| " + " | ".join(["arm", "ms", "images/s", *references]) + " |")
        lines.append("|---" * (3 + len(references)) + "|")
        for row in rows:
            cells = [f"{row['median_ms']:.1f}", f"{row['images_per_second']:.0f}"]
            cells += [_ratio(row["ratios"].get(name)) for name in references]
            lines.append("| " + " | ".join([row["name"], *cells]) + " |")
        if waits := {row["name"]: row["waits"] for row in rows if row.get("waits")}:
            lines += ["", "The host waits for the device in a step: " + ", ".join(f"{n} {k}" for n, k in waits.items())]
    return "\n".join(lines) + "\n"


def _ratio(found: list[float] | None) -> str:
    return f"{found[1]:.2f} ({found[0]:.2f} to {found[2]:.2f})" if found else ""


def _waits(step: Step) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def arguments(argv: Sequence[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn22_16", help="a timm model (default: %(default)s)")
    parser.add_argument("--batch", nargs="+", type=int, default=[128])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, help="steps in one timing (default: 1, on a GPU 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each variant before the first round")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "process"],
        help="process: CPU time, for one thread on a machine with other work",
    )  # fmt: skip
    parser.add_argument(
        "--evaluation", action="store_true", help="instead of a step, the forward pass without gradients"
    )
    args = parse(parser, ARMS, argv)
    args.repeat = args.repeat or (10 if args.device == "cuda" else 1)
    if args.clock == "process" and (args.device == "cuda" or max(args.threads) > 1):
        parser.error("--clock process adds up the CPU time of all threads; a GPU or several threads need --clock wall")
    return args


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        arms = Arms()
        serve({"reset": arms.reset, "add": arms.add, "time": arms.time})
    else:
        report(__file__, arguments(), measure_all, tables)
