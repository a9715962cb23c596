"""What a benchmark found, as frozen data, as tables and as a chart."""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bonn_qat import plotting
from bonn_qat.bench import chart

_TEXT = ("backend",)  # columns that are not numbers


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One backend at one batch size and number of threads.

    ``milliseconds`` of one call, an entry for each round; ``speedups``, the reference's time in the same round divided
    by this backend's, so that above 1 this backend is faster; empty where the reference was not measured.
    """

    backend: str
    batch: int
    threads: int
    milliseconds: tuple[float, ...]
    speedups: tuple[float, ...]

    @property
    def median_milliseconds(self) -> float:
        """Of one call, the median of the rounds."""
        return statistics.median(self.milliseconds)

    @property
    def quartiles_milliseconds(self) -> tuple[float, float]:
        """Of one call, the first and the third quartile of the rounds."""
        return _quartiles(self.milliseconds)

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return self.batch / self.median_milliseconds * 1e3

    @property
    def median_speedup(self) -> float | None:
        """The median of the rounds' speed-ups, which is not the quotient of the medians."""
        return statistics.median(self.speedups) if self.speedups else None

    @property
    def quartiles_speedup(self) -> tuple[float, float] | None:
        """The first and the third quartile of the rounds' speed-ups."""
        return _quartiles(self.speedups) if self.speedups else None


@dataclass(frozen=True, kw_only=True)
class Startup:
    """One backend in processes of its own, each entry of one round: from the start of the process to its first result.

    ``cold_seconds`` without compiled kernels, ``warm_seconds`` with them. ``process_kib`` is the most memory that a
    warm process held, ``added_kib`` the most beyond what it held before it loaded the network, which is Python and
    libraries; both are empty where the system does not tell.
    """

    backend: str
    batch: int
    threads: int
    cold_seconds: tuple[float, ...]
    warm_seconds: tuple[float, ...]
    process_kib: tuple[int, ...] = ()
    added_kib: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Latency and size of the backends of one network; ``input_size`` is ``(C, H, W)`` of an image.

    ``reference`` is the backend that the others are compared with, None if no backend works. ``size_bytes`` (on disk)
    and ``notes`` are by backend; ``missing`` says which package a backend lacks, ``failures`` why it failed.
    """

    model: str
    scheme: str
    input_size: tuple[int, ...]
    rounds: int
    reference: str | None
    latencies: tuple[Latency, ...]
    size_bytes: Mapping[str, int]
    notes: Mapping[str, str]
    missing: Mapping[str, str]
    failures: Mapping[str, str]
    environment: Mapping[str, str]
    startups: tuple[Startup, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Every number of every round, with medians and quartiles, as what JSON can hold."""
        latencies = [
            asdict(x)
            | {
                "median_milliseconds": x.median_milliseconds,
                "quartiles_milliseconds": x.quartiles_milliseconds,
                "median_speedup": x.median_speedup,
                "quartiles_speedup": x.quartiles_speedup,
            }
            for x in self.latencies
        ]
        return asdict(self) | {"latencies": latencies}

    def chart(self) -> str | None:
        """The latencies as an SVG element, None without any. Raises MatplotlibMissing without matplotlib."""
        bars = [
            chart.LatencyBar(
                backend=x.backend,
                batch=x.batch,
                threads=x.threads,
                milliseconds=x.median_milliseconds,
                quartiles_milliseconds=x.quartiles_milliseconds,
                speedup=x.median_speedup,
            )
            for x in self.latencies
        ]
        return chart.latencies(bars, self.reference or "")

    def __str__(self) -> str:
        size = " x ".join(map(str, self.input_size))
        lines = [f"{self.model}, scheme {self.scheme}, images of {size}"]
        if self.latencies:
            lines += [
                f"latency of one call: median (quartiles) of {self.rounds} rounds in which the backends take turns; "
                f"speed-up over {self.reference} in the same round",
                _table(_latency_columns(self.latencies), grouped=2),
            ]
        if self.reference is not None:
            lines += ["", "size on disk", _table(_size_columns(self.size_bytes, self.reference))]
        if self.startups:
            lines += ["", _startup_title(self.startups[0]), _table(_startup_columns(self.startups))]
        lines.append("")
        lines += [f"{backend}: {note}" for backend, note in self.notes.items()]
        lines += [f"{backend}: not measured: {why}" for backend, why in self.missing.items()]
        lines += [f"{backend}: failed: {why}" for backend, why in self.failures.items()]
        lines.append(", ".join(f"{key} {value}" for key, value in self.environment.items()))
        return "\n".join(lines)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _latency_columns(latencies: Sequence[Latency]) -> dict[str, list[str]]:
    return {
        "threads": [str(x.threads) for x in latencies],
        "batch": [str(x.batch) for x in latencies],
        "backend": [x.backend for x in latencies],
        "ms": [plotting.digits(x.median_milliseconds) for x in latencies],
        "(quartiles)": [_range(x.quartiles_milliseconds) for x in latencies],
        "images/s": [plotting.digits(x.images_per_second) for x in latencies],
        "speed-up": ["" if x.median_speedup is None else plotting.digits(x.median_speedup) for x in latencies],
        " (quartiles)": [_range(x.quartiles_speedup) for x in latencies],
    }


def _range(quartiles: tuple[float, float] | None) -> str:
    return f"({plotting.digits(quartiles[0])} to {plotting.digits(quartiles[1])})" if quartiles else ""


def _size_columns(size_bytes: Mapping[str, int], reference: str) -> dict[str, list[str]]:
    return {
        "backend": list(size_bytes),
        "KiB": [f"{size / 2**10:,.1f}" for size in size_bytes.values()],
        f"times smaller than {reference}": [
            plotting.digits(size_bytes[reference] / size) for size in size_bytes.values()
        ],
    }


def _startup_title(first: Startup) -> str:
    return (
        f"from the start of a process to its first result, batch {first.batch}, {first.threads} thread"
        f"{'s' * (first.threads > 1)}: medians of {len(first.cold_seconds)} rounds; cold: without compiled kernels; "
        "peak memory of the warm process, and what the network added to the libraries"
    )


def _startup_columns(startups: Sequence[Startup]) -> dict[str, list[str]]:
    return {
        "backend": [x.backend for x in startups],
        "cold s": [f"{statistics.median(x.cold_seconds):.2f}" for x in startups],
        "warm s": [f"{statistics.median(x.warm_seconds):.2f}" for x in startups],
        "process MiB": [_mib(x.process_kib) for x in startups],
        "added MiB": [_mib(x.added_kib) for x in startups],
    }


def _mib(kib: Sequence[int]) -> str:
    return f"{statistics.median(kib) / 2**10:,.1f}" if kib else "unknown"


def _table(columns: Mapping[str, list[str]], *, grouped: int = 0) -> str:
    """Columns as text, with a line between rows that differ in the first ``grouped`` columns."""
    table = Table(box=box.SIMPLE)
    for header in columns:
        table.add_column(header, no_wrap=True, justify="left" if header in _TEXT else "right")
    rows = list(zip(*columns.values(), strict=True))
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row, end_section=following is not None and following[:grouped] != row[:grouped])
    text = io.StringIO()
    # Wide enough that nothing is cut, as in a summary.
    Console(file=text, width=400, markup=False, emoji=False, highlight=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).rstrip("\n")
