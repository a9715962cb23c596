"""The results of a benchmark as data, as tables and as a chart."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from bonn_qat.files.plain import printable
from bonn_qat.plotting import HERO_COLOUR, canvas, digits, plain_text
from bonn_qat.tables import Column, Table, as_html, as_text, facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The latency of a backend for one batch size and number of threads.

    ``milliseconds`` of one call and ``speedups`` have an entry for each round. A speed-up is the reference's time in
    the same round divided by this backend's; there are none if the reference was not measured.
    """

    backend: str
    batch: int
    threads: int
    milliseconds: tuple[float, ...]
    speedups: tuple[float, ...]

    @property
    def median_milliseconds(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.milliseconds)

    @property
    def quartiles_milliseconds(self) -> tuple[float, float]:
        """The first and third quartile of the rounds."""
        return _quartiles(self.milliseconds)

    @property
    def images_per_second(self) -> float:
        """Images per second at the median."""
        return self.batch / self.median_milliseconds * 1e3

    @property
    def median_speedup(self) -> float | None:
        """The median of the rounds' speed-ups (not the quotient of the medians)."""
        return statistics.median(self.speedups) if self.speedups else None

    @property
    def quartiles_speedup(self) -> tuple[float, float] | None:
        """The first and third quartile of the rounds' speed-ups."""
        return _quartiles(self.speedups) if self.speedups else None


@dataclass(frozen=True, kw_only=True)
class Startup:
    """The start-up of a backend in new processes, with an entry for each round.

    ``seconds`` reach from the start of the process to its first result. ``process_kib`` is the peak memory of the
    process, ``added_kib`` the part beyond Python and the libraries; both are empty where the system does not report
    them.
    """

    backend: str
    batch: int
    threads: int
    seconds: tuple[float, ...]
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
        """All numbers of all rounds, with medians and quartiles, for JSON."""
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
        return _chart(self.latencies, self.reference or "")

    def __rich__(self) -> Group:
        size = " x ".join(map(str, self.input_size))
        blocks: list[RenderableType] = [Text(printable(f"{self.model}, scheme {self.scheme}, images of {size}"))]
        for table in (_latencies(self), _sizes(self), _startups(self)):
            blocks += ["", table] if table.rows else []
        notes = [(name, note) for name, note in self.notes.items()]
        notes += [(name, f"not measured: {why}") for name, why in self.missing.items()]
        notes += [(name, f"failed: {why}") for name, why in self.failures.items()]
        machine = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return Group(*blocks, "", facts([*notes, ("machine", machine)]))

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(*self.__rich__().renderables)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def _latencies(report: BenchReport) -> Table:
    columns = [
        Column("threads"), Column("batch"), Column("backend", text=True), Column("ms"), Column("quartiles"),
        Column("images/s", drop=1), Column("speed-up"), Column("quartiles", optional=True),
    ]  # fmt: skip
    rows = [
        (str(x.threads), str(x.batch), x.backend, digits(x.median_milliseconds), _range(x.quartiles_milliseconds),
         digits(x.images_per_second), digits(x.median_speedup) if x.median_speedup else "", _range(x.quartiles_speedup))
        for x in report.latencies
    ]  # fmt: skip
    title = f"time of one call, median of {report.rounds} rounds; speed-up over {report.reference} in the same round"
    return Table(columns, rows, title=title, grouped=2)


def _range(quartiles: tuple[float, float] | None) -> str:
    return f"{digits(quartiles[0])}\N{EN DASH}{digits(quartiles[1])}" if quartiles else ""


def _sizes(report: BenchReport) -> Table:
    columns = [Column("backend", text=True), Column("KiB"), Column("times smaller")]
    reference = report.size_bytes.get(report.reference or "", 0)
    rows = [(name, f"{size / 2**10:,.1f}", digits(reference / size)) for name, size in report.size_bytes.items()]
    return Table(columns, rows, title=f"size on disk, and how many times smaller than {report.reference}")


def _startups(report: BenchReport) -> Table:
    columns = [Column("backend", text=True), *map(Column, ("seconds", "process MiB", "added MiB"))]
    rows = [
        (x.backend, f"{statistics.median(x.seconds):.2f}", _mib(x.process_kib), _mib(x.added_kib))
        for x in report.startups
    ]  # fmt: skip
    title = ""
    if report.startups:
        first = report.startups[0]
        title = (
            f"seconds from the start of a process to its first result, batch {first.batch}, {first.threads} "
            f"thread{'s' * (first.threads > 1)}, medians of {len(first.seconds)} rounds; peak memory of the process, "
            "and the part beyond Python and the libraries"
        )
    return Table(columns, rows, title=title)


def _mib(kib: Sequence[int]) -> str:
    return f"{statistics.median(kib) / 2**10:,.1f}" if kib else "unknown"


def _chart(bars: Sequence[Latency], reference: str, *, hero: str = "packed") -> str | None:
    """Milliseconds of a call: a bar for each backend's median, whiskers for the quartiles; ``hero`` is in colour.

    A row of panels for each batch size, a column for each number of threads. The bars' speed-ups are relative to the
    backend ``reference``. None without bars.
    """
    names = list(dict.fromkeys(bar.backend for bar in bars))
    batches, threads = (sorted({getattr(bar, key) for bar in bars}) for key in ("batch", "threads"))
    if not bars:
        return None
    height = len(batches) * (0.34 * len(names) + 0.85)
    with canvas("latency", height=height, title="Latency of one call") as (figure, svg):
        grid = figure.subplots(len(batches), len(threads), squeeze=False)
        for axes, batch in zip(grid, batches, strict=True):
            for axis, count in zip(axes, threads, strict=True):
                shown = [bar for bar in bars if (bar.batch, bar.threads) == (batch, count)]
                _bars(axis, shown, names, hero)
                axis.set_title(f"batch {batch}, {count} thread{'s' * (count > 1)}")
            axes[0].set_yticks(range(len(names)), [plain_text(backend) for backend in names])
        speedups = f"; in brackets: speed-up over {reference}" if any(bar.median_speedup for bar in bars) else ""
        figure.supxlabel(f"milliseconds of a call, median and quartiles{plain_text(speedups)}", fontsize=10)
    return svg()


def _bars(axis: "Axes", bars: Sequence[Latency], names: Sequence[str], hero: str) -> None:
    """Horizontal bars in the order of ``names``, the first on top, with their numbers beside the whiskers."""
    places = [names.index(bar.backend) for bar in bars]
    values = [bar.median_milliseconds for bar in bars]
    colours_ = [HERO_COLOUR if bar.backend == hero else "#A9A9A9" for bar in bars]
    below = [bar.median_milliseconds - bar.quartiles_milliseconds[0] for bar in bars]
    above = [bar.quartiles_milliseconds[1] - bar.median_milliseconds for bar in bars]
    whiskers: Any = {"elinewidth": 1.2, "ecolor": "black"}
    axis.barh(places, values, height=0.62, color=colours_, xerr=[below, above], capsize=2.5, error_kw=whiskers)
    for place, bar in zip(places, bars, strict=True):
        text = digits(bar.median_milliseconds)
        text += "" if bar.median_speedup is None else f" ({digits(bar.median_speedup)}x)"
        end = (max(bar.median_milliseconds, bar.quartiles_milliseconds[1]), place)
        axis.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), [""] * len(names))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    longest = max((bar.quartiles_milliseconds[1] for bar in bars), default=1.0)
    axis.set_xlim(0, 1.35 * longest)  # room for the numbers
