"""Soak test: does a process that trains and packs for hours use more and more memory, files, threads or objects?

Each round, for each scheme: a run of a comparison is interrupted in the middle, goes on from its checkpoint and ends;
its report is read and written again; the trained network is loaded, summed up, packed, saved, loaded and run. After
the round, with the garbage collected, the process is measured. The first rounds do not count: they fill caches. Through
the others goes a line. Examples::

    python benchmarks/soak.py --minutes 30 --output soak.json
    python benchmarks/soak.py --minutes 30 --mlflow one --output soak-mlflow.json

The file is JSON: ``options``, ``environment``, ``machine``, ``rounds`` (see :func:`measured`), ``growth`` (see
:func:`growth`), and ``grown``: the types of objects, and the function caches (``functools.lru_cache``), that have more
entries at the end than after the warm-up, and how many more. The curve is written beside it as FILE.svg. Linux only.

A slope below two standard errors cannot be told from zero. ``in_use_kib`` is the memory that the program has allocated
and not freed; it shows whether a rise of ``rss_kib`` is a leak or memory that the allocator keeps.
"""

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import re
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pluggy
import torch
from measuring import machine
from torch.optim.optimizer import register_optimizer_step_post_hook

import bonn_qat
from bonn_qat import plugins
from bonn_qat.environment import environment
from bonn_qat.files.atomic import write_text
from bonn_qat.studies.compare import compare, plan
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.studies.report import write_report
from bonn_qat.training.data import Data, load
from bonn_qat.training.network import load as load_network
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS

SCHEMES = ("bonn", "float", "xnor", "bireal-staged")
RECIPE = Recipe(model="wrn10_16", epochs=3, batch_size=16, train_images=64, test_images=50, lr=0.05, latents="scheme")
QUANTITIES = ("rss_kib", "in_use_kib", "files", "threads", "objects")
_MOST = 15  # the number of types that are reported
_FREQUENT = 20  # types with fewer objects are ignored


def main() -> None:
    """Run the rounds, print the growth, and write the requested files."""
    args = arguments()
    torch.set_num_threads(args.threads)
    found = dict(environment(torch.device("cpu")))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    digits = load("digits", train_images=RECIPE.train_images, test_images=RECIPE.test_images)
    rounds: list[dict[str, float]] = []
    before: collections.Counter[str] = collections.Counter()
    started = time.monotonic()
    end = started + 60 * args.minutes
    with _observed(args.mlflow) as pm:
        while time.monotonic() < end or len(rounds) < args.warmup + 3:
            one_round(args.schemes, digits, len(rounds), pm, packs=args.pack)
            gc.collect()
            rounds.append(measured(time.monotonic() - started))
            print(" ".join(f"{name} {value:.0f}" for name, value in rounds[-1].items()), flush=True)
            if len(rounds) == args.warmup:
                before = _population()
        grown = _population() - before
    document = {
        "options": vars(args) | {"output": None},
        "environment": found,
        "machine": machine("cpu"),
        "rounds": rounds,
        "growth": growth(rounds[args.warmup :]),
        "grown": dict(grown.most_common(_MOST)),
    }
    print(table(document))
    if args.output:
        args.output.write_text(json.dumps(document, indent=1) + "\n")
        with contextlib.suppress(ImportError):
            write_text(args.output.with_suffix(".svg"), curve(document))


def one_round(schemes: Sequence[str], data: Data, number: int, pm: pluggy.PluginManager, *, packs: bool) -> None:
    """Everything that a user's process does, once per scheme."""
    with tempfile.TemporaryDirectory() as folder:
        for scheme in schemes:
            directory = Path(folder) / scheme
            recipes = plan(RECIPE, schemes=[scheme], seeds=[number], pm=pm)
            steps = RECIPE.epochs * math.ceil(data.train_size / RECIPE.batch_size)
            with contextlib.suppress(KeyboardInterrupt), _interrupted_after(steps // 2):
                compare(recipes, data, directory, pm=pm)
                raise AssertionError("the run was not interrupted")
            comparison = compare(recipes, data, directory, pm=pm)
            assert not comparison.failures
            assert not comparison.missing
            write_report(read_comparison(directory))
            model, size = load_network(directory / RUNS / f"{recipes[0].name}.safetensors", pm=pm), data.image
            str(bonn_qat.summary(model, size))
            if packs and scheme != "float":
                _pack(model, size, directory / "packed.safetensors")


def _pack(model: torch.nn.Module, size: tuple[int, int, int], path: Path) -> None:
    bonn_qat.pack(model, size).save(path)
    packed = bonn_qat.PackedModel.load(path)
    images = torch.randn(4, *size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(packed(images), model(images), rtol=1e-4, atol=1e-4)
    str(bonn_qat.summary(packed))


@contextlib.contextmanager
def _interrupted_after(steps: int) -> Iterator[None]:
    left = steps

    def step(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            signal.raise_signal(signal.SIGINT)

    handle = register_optimizer_step_post_hook(step)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _observed(mlflow: str | None) -> Iterator[pluggy.PluginManager]:
    manager = plugins.create_manager()
    if mlflow is None and manager.has_plugin("mlflow"):
        manager.unregister(name="mlflow")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # MLflow writes artifacts here
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if mlflow == "one":
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        yield manager


def measured(seconds: float) -> dict[str, float]:
    """The state of this process after ``seconds``.

    ``rss_kib``, resident memory; ``in_use_kib``, memory allocated by malloc and not freed; ``files``, open descriptors;
    ``threads``; ``objects`` that the garbage collector tracks.
    """
    status = Path("/proc/self/status").read_text()
    found = {name: float(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads")}
    return {
        "seconds": seconds,
        "rss_kib": found["VmRSS"],
        "in_use_kib": _in_use() / 1024,
        "files": len(os.listdir("/proc/self/fd")) - 1,  # without the descriptor of this listing
        "threads": found["Threads"],
        "objects": len(gc.get_objects()),
    }


class _Allocated(ctypes.Structure):
    # glibc's struct mallinfo2.
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


@functools.cache
def _mallinfo() -> Callable[[], _Allocated] | None:
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _Allocated
    return function


def _in_use() -> float:
    information = _mallinfo()
    if information is None:
        return float("nan")
    found = information()
    return float(found.uordblks + found.hblkhd)


def _population() -> collections.Counter[str]:
    """The number of objects per type, and of cache entries per function; types with few objects are left out."""
    objects = gc.get_objects()
    counts = collections.Counter(f"{type(x).__module__}.{type(x).__qualname__}" for x in objects)
    found = collections.Counter({name: count for name, count in counts.items() if count >= _FREQUENT})
    for cached in objects:
        if type(cached) is functools._lru_cache_wrapper:  # isinstance would call code of proxy objects
            found[f"cache of {cached.__module__}.{getattr(cached, '__qualname__', '?')}"] += (
                cached.cache_info().currsize
            )
    return found


def growth(rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Per quantity: slope of a straight line through the rounds, and the ``first`` and ``last`` value.

    The slope is given ``per_round`` and ``per_hour``, each with its standard error (``_error``), which assumes that
    rounds are independent.
    """
    result = {}
    hours = (rounds[-1]["seconds"] - rounds[0]["seconds"]) / 3600 / (len(rounds) - 1)
    for name in QUANTITIES:
        values = [found[name] for found in rounds]
        slope, error = line(values)
        result[name] = {
            "per_round": slope,
            "per_round_error": error,
            "per_hour": slope / hours,
            "per_hour_error": error / hours,
            "first": values[0],
            "last": values[-1],
        }
    return result


def line(values: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line through three or more values at 0, 1, 2, ..., and its standard error."""
    count = len(values)
    middle, mean = (count - 1) / 2, statistics.fmean(values)
    spread = sum((x - middle) ** 2 for x in range(count))
    slope = sum((x - middle) * (y - mean) for x, y in enumerate(values)) / spread
    left = sum((y - mean - slope * (x - middle)) ** 2 for x, y in enumerate(values))
    return slope, (left / (count - 2) / spread) ** 0.5


def table(document: dict[str, Any]) -> str:
    """The growth as text, one line per quantity."""
    rounds = document["rounds"]
    counted = len(rounds) - document["options"]["warmup"]
    lines = [f"{len(rounds)} rounds in {rounds[-1]['seconds'] / 60:.1f} minutes, the last {counted} are counted"]
    lines.append(f"{'':14}{'first':>12}{'last':>12}{'per round':>24}{'per hour':>28}")
    for name, found in document["growth"].items():
        unit, factor = (" MiB", 1024) if name.endswith("_kib") else ("", 1)
        lines.append(
            f"{name:14}{found['first']:12.0f}{found['last']:12.0f}"
            f"{found['per_round']:14.2f} ± {found['per_round_error']:7.2f}"
            f"{found['per_hour'] / factor:14.2f} ± {found['per_hour_error'] / factor:6.2f}{unit}"
        )
    grown = ", ".join(f"{name} {count}" for name, count in document["grown"].items())
    return "\n".join([*lines, f"more objects than after the warm-up: {grown or 'nothing'}"])


def curve(document: dict[str, Any]) -> str:
    """Memory over time, as SVG. Raises ImportError without matplotlib."""
    import io

    from matplotlib.figure import Figure

    rounds, warmup = document["rounds"], document["options"]["warmup"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    minutes = [found["seconds"] / 60 for found in rounds]
    for name, label in (("rss_kib", "resident"), ("in_use_kib", "in use")):
        axes.plot(minutes, [found[name] / 1024 for found in rounds], marker=".", markersize=3, label=label)
    axes.axvspan(0, minutes[warmup - 1], alpha=0.15, color="gray", label="warm-up")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warmup", type=int, default=5, help="rounds that are not counted")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--no-pack", dest="pack", action="store_false", help="leave out pack, save, load and run")
    parser.add_argument(
        "--mlflow",
        choices=["one", "each"],
        help="with the MLflow observer: one store for all comparisons, or each its own",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file for the result; the curve is written beside it")
    args = parser.parse_args(argv)
    if args.warmup < 1:
        parser.error(f"--warmup is {args.warmup}; allowed: at least 1")
    return args


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could not track.*")
        main()
