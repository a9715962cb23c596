"""bench: measure a float network and its binary form on the CPU."""

import contextlib
import copy
import functools
import importlib.metadata
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bonn_qat.bench.backends import BACKENDS, Backend, BackendMissing, Networks
from bonn_qat.bench.engines import Run
from bonn_qat.bench.report import BenchReport, Latency
from bonn_qat.bench.startup import first_line, startup
from bonn_qat.binarization.binarize import Binarization
from bonn_qat.environment import environment, processor
from bonn_qat.errors import BonnQatError, UnknownName
from bonn_qat.inputs import Example, Inputs
from bonn_qat.inspection.summary import inputs_of

REFERENCE = "onnxruntime float"
WARMUP = 3  # calls before the first round, for compilation, allocation and the choice of kernels

Clock = Callable[[], float]
Turn = Callable[[Run], float]
Watch = Callable[[str], None]


class InvalidBenchmark(BonnQatError, ValueError):
    """A benchmark with an impossible number of rounds, images or threads."""


def bench(
    model_float: nn.Module,
    model_binary: nn.Module,
    size: Sequence[int] | None = None,
    *,
    example_inputs: Example | None = None,
    name: str | None = None,
    batches: Sequence[int] = (1, 32),
    threads: Sequence[int] | None = None,
    rounds: int = 20,
    backends: Mapping[str, Callable[[Networks], Backend]] = BACKENDS,
    reference: str = REFERENCE,
    startup_rounds: int = 0,
    turn_seconds: float = 0.05,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
) -> BenchReport:
    """Measure ``backends`` on random images of ``size`` ``(C, H, W)``, on the CPU; the models stay as they are.

    ``example_inputs`` are a batch of other inputs, as for :func:`bonn_qat.pack`. Without either it is what
    ``model_binary`` was binarized for.

    For each of ``threads`` (None: 1 and all cores) and ``batches``, the backends take turns in ``rounds`` rounds; each
    round starts with a different backend. A turn makes as many calls as fit into ``turn_seconds``, at least one, and
    counts as their median, because the first calls find the caches as another backend left them. Before the first
    round each backend is called WARMUP times and has one turn that does not count. Speed-ups are relative to
    ``reference``, or to the first backend that works if that one does not. ``startup_rounds`` above 0 adds
    :func:`startup`. The report calls the network ``name``; ``watch`` is called with a line for each measurement.

    A backend that lacks a package or fails is left out, and the report says why. torch's number of threads is restored
    afterwards. Raises InvalidBenchmark for numbers below 1, and UnknownName for an unknown reference.
    """
    counts = sorted({1, _cores()} if threads is None else set(threads))
    _check(batches=batches, threads=counts, rounds=[rounds])
    if reference not in backends:
        raise UnknownName("backend", reference, backends)
    tell, load, inputs = watch or _ignore, _load(), inputs_of(model_binary, size, example_inputs)
    if startup_rounds and not inputs.is_images:
        raise InvalidBenchmark("the start-up is measured with images alone; give startup_rounds=0")
    turn = functools.partial(_turn, seconds=turn_seconds, clock=clock)
    latencies: list[Latency] = []
    with tempfile.TemporaryDirectory() as folder, _restored_threads():
        networks = Networks(
            float_model=_inference_copy(model_float),
            binary_model=_inference_copy(model_binary),
            size=inputs.size if inputs.is_images else inputs,
            directory=Path(folder),
        )
        made, missing, failures = _make(backends, networks, tell)
        base = reference if reference in made else next(iter(made), None)
        for count, batch in itertools.product(counts, dict.fromkeys(batches)):
            torch.set_num_threads(count)
            tell(f"threads {count}, batch {batch}")
            drawn = inputs.drawn(batch, seed=0)
            images = drawn.args[0] if inputs.is_images else drawn
            runs = _warm(made, images, count, turn, failures)
            latencies += _latencies(_alternate(runs, rounds, turn), batch, count, base)
        startups, broken = startup(made, inputs.size, rounds=startup_rounds, watch=tell) if startup_rounds else ((), {})
    record = getattr(model_binary, "binarization", None)
    return BenchReport(
        model=name or type(model_float).__name__,
        scheme=record.scheme.name if isinstance(record, Binarization) else "none",
        input_size=inputs.size,
        rounds=rounds,
        reference=base,
        latencies=tuple(latencies),
        size_bytes={name: backend.size_bytes for name, backend in made.items()},
        notes={name: backend.note for name, backend in made.items()},
        missing=missing,
        failures=failures | broken,
        environment=_environment(counts) | {"load average before": load},
        startups=startups,
    )


def _check(**numbers: Sequence[int]) -> None:
    for name, given in numbers.items():
        if not given or min(given) < 1:
            raise InvalidBenchmark(f"{name} of a benchmark are {list(given)}; give at least one, each at least 1")


def _cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> str:
    """The load average of the last minute: how busy the machine was before."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _ignore(event: str) -> None:
    pass


def _inference_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


@contextlib.contextmanager
def _restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make(
    backends: Mapping[str, Callable[[Networks], Backend]], networks: Networks, tell: Watch
) -> tuple[dict[str, Backend], dict[str, str], dict[str, str]]:
    """The backends that work, which packages the others lack, and which failed and why."""
    made: dict[str, Backend] = {}
    missing: dict[str, str] = {}
    failures: dict[str, str] = {}
    for name, make in backends.items():
        tell(f"making {name}")
        try:
            made[name] = make(networks)
        except BackendMissing as error:
            missing[name] = str(error)
        except Exception as error:  # whatever an exporter raises
            failures[name] = first_line(error)
    return made, missing, failures


def _warm(
    backends: Mapping[str, Backend], images: Tensor | Inputs, threads: int, turn: Turn, failures: dict[str, str]
) -> dict[str, Run]:
    """A warmed-up call of each backend; backends that fail are added to ``failures``."""
    runs: dict[str, Run] = {}
    for name, backend in backends.items():
        try:
            run = backend.make(threads, images)
            for _ in range(WARMUP):
                run()
            turn(run)
        except Exception as error:  # whatever a runtime raises
            failures[name] = first_line(error)
        else:
            runs[name] = run
    return runs


def _turn(run: Run, seconds: float, clock: Clock) -> float:
    """Seconds of one call: the median of as many calls as fit into ``seconds``."""
    times: list[float] = []
    end = clock() + seconds
    while not times or clock() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def _alternate(runs: Mapping[str, Run], rounds: int, turn: Turn) -> dict[str, list[float]]:
    """Seconds of one call in each round, by backend; each round starts with a different backend."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds):
        first = number % max(len(order), 1)
        for name in order[first:] + order[:first]:
            times[name].append(turn(runs[name]))
    return times


def _latencies(times: Mapping[str, list[float]], batch: int, threads: int, reference: str | None) -> list[Latency]:
    base = times.get(reference or "", [])
    return [
        Latency(
            backend=name,
            batch=batch,
            threads=threads,
            milliseconds=tuple(1e3 * x for x in seconds),
            speedups=tuple(y / x for x, y in zip(seconds, base, strict=True)) if base else (),
        )
        for name, seconds in times.items()
    ]


def _environment(threads: Sequence[int]) -> dict[str, str]:
    """Processor, threads, and the versions of the packages."""
    found = {"processor": processor(), "cores": str(_cores())}
    found |= {**environment(torch.device("cpu")), "threads": " and ".join(map(str, threads))}
    for package in ("onnxruntime", "onnx", "bonn-qat-runtime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
