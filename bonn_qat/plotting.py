"""Plotting: a matplotlib canvas that gives SVG text, with the package's style, palette and number format."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from bonn_qat.errors import BonnQatError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches; 960 CSS pixels
HERO, HERO_COLOUR, FLOAT_COLOUR = "bonn", "#0072B2", "#4D4D4D"
# Okabe and Ito's colours, then Tol's muted ones; both can be told apart with any of the usual colour blindnesses.
PALETTE = (
    "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#882255", "#332288", "#999933", "#44AA99", "#AA4499", "#117733",
)  # fmt: skip
LAPS: Any = ("-", (0, (5, 1.5)), (0, (1, 1)))  # for schemes that repeat a colour
TRAIN: Any = (0, (4, 3))
STYLE: Any = {  # matplotlib's annotations want every key as a literal
    "svg.fonttype": "none",  # text stays text: searchable, small, in the reader's fonts
    "svg.hashsalt": "bonn_qat",  # the same comparison gives the same bytes
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
}


class MatplotlibMissing(BonnQatError, ImportError):
    """A figure was asked for, but matplotlib is not installed."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure as one SVG element (no XML header), with its title and caption."""

    name: str
    title: str
    caption: str
    svg: str


def digits(value: float) -> str:
    """``value`` with three significant digits, or all digits before the point; never with an exponent.

    >>> digits(0.00031), digits(9.999), digits(12345.6)
    ('0.000310', '10.0', '12,346')
    """
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def plain_text(text: str) -> str:
    """``text`` escaped, so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def tint(colour: str, strength: float) -> str:
    """A colour mixed with white: 1 is the colour itself, 0 is white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02X}" for part in parts)


def row(figure: "Figure", panels: int) -> list["Axes"]:
    """``panels`` axes side by side that share their vertical axis."""
    return list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def logarithmic(axis: "Axes") -> None:
    """Make the vertical axis logarithmic, with plain labels: matplotlib's formulas leak memory for each figure."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(Plain())
    axis.yaxis.set_minor_formatter(Plain(labelOnlyBase=False))


@contextmanager
def canvas(name: str, *, height: float, title: str) -> Iterator[tuple["Figure", Callable[[], str]]]:
    """A figure to draw on, and a function that returns its SVG after the block.

    A screen reader reads ``title``. Raises MatplotlibMissing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MatplotlibMissing("figures need matplotlib: pip install 'bonn-qat[compare]'") from error
    text = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The reader's fonts draw the text, so what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, lambda: _inline(text.getvalue(), name, title)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG file as an element of a page: without a header and a fixed size, its ids prefixed by ``name``."""
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}">{body}'.strip()
