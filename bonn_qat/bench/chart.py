"""Chart: the latencies of a benchmark as a bar chart in SVG. Needs matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bonn_qat.bench.report import Latency
from bonn_qat.plotting import HERO_COLOUR, canvas, digits, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def latencies(bars: Sequence[Latency], reference: str, *, hero: str = "packed") -> str | None:
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
