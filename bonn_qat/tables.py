"""Tables: one model of a table, shown by a terminal (through rich), in Markdown, and on HTML pages."""

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from html import escape
from itertools import pairwise

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from bonn_qat.files.plain import printable

_GAP = 2  # characters between two columns
_NARROW = 24  # a column that wraps shrinks to this width before other columns are left out
_STYLES = {
    True: "text-align: left; padding: 0 0.6em; white-space: pre-line",
    False: "text-align: right; padding: 0 0.6em; white-space: pre",
}
_RULE = box.Box("    \n    \n ── \n    \n    \n    \n    \n    \n")  # one line, below the headings


class Strong(str):
    """The text of a cell that is emphasized in its row."""

    def __html__(self) -> str:
        return f"<strong>{escape(self)}</strong>"


@dataclass(frozen=True)
class Column:
    """The heading of a column, and how its cells are shown: ``text`` aligns left, numbers align right.

    Where a terminal is too narrow, the cells of a column that ``wraps`` are broken into lines; if that is not enough,
    columns with ``drop`` above 0 are left out, the highest number first. An ``optional`` column is left out everywhere
    if all its cells are empty.
    """

    name: str
    _: KW_ONLY
    text: bool = False
    wraps: bool = False
    drop: int = 0
    optional: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; with ``grouped`` n, a blank line separates rows whose first n cells differ.

    >>> print(Table([Column("layer", text=True), Column("bits")], [("conv1", "32"), ("conv2", "1")]))
    layer  bits
    ───────────
    conv1    32
    conv2     1
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    _: KW_ONLY
    title: str = ""
    grouped: int = 0

    @property
    def shown(self) -> "Table":
        """The table without the optional columns that are empty."""
        return self._only([i for i, c in enumerate(self.columns) if not c.optional or any(row[i] for row in self.rows)])

    @property
    def has_headings(self) -> bool:
        """Whether any column has a heading."""
        return any(column.name for column in self.columns)

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown."""
        table = self.shown
        head = [[c.name for c in table.columns], ["---" if c.text else "---:" for c in table.columns]]
        return "\n".join(f"| {' | '.join(map(_markdown, row))} |" for row in (*head, *table.rows))

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        table = self.shown
        lines = [_html("th", table.columns, [column.name for column in table.columns])] if table.has_headings else []
        lines += [_html("td", table.columns, row) for row in table.rows]
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}{''.join(lines)}</table>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = self.shown._fitted(options.max_width)
        drawn = RichTable(
            box=_RULE, show_edge=False, pad_edge=False, padding=(0, _GAP // 2, 0, 0), show_header=self.has_headings,
        )  # fmt: skip
        for place, column in enumerate(table.columns):
            drawn.add_column(
                table._heading(place), justify="left" if column.text else "right", no_wrap=not column.wraps,
                overflow="fold",
            )  # fmt: skip
        ends = [one[: self.grouped] != other[: self.grouped] for one, other in pairwise(self.rows)]
        for row, end in zip(table.rows, [*ends, False], strict=False):
            drawn.add_row(*map(_rich, row), end_section=end)
        if self.title:
            yield Text(printable(self.title), style="bold")
        yield drawn
        if dropped := [c.name for c in self.shown.columns if c not in table.columns]:
            yield Text(f"not shown at this width: {', '.join(dropped)}", style="dim")

    def _only(self, places: Sequence[int]) -> "Table":
        return Table([self.columns[i] for i in places], [[row[i] for i in places] for row in self.rows])

    def _fitted(self, width: int) -> "Table":
        """The table without the columns that ``width`` characters have no room for."""
        needed = {place: self._width(place) + _GAP for place in range(len(self.columns))}
        for place in sorted(needed, key=lambda place: -self.columns[place].drop):
            if self.columns[place].drop and sum(needed.values()) - _GAP > width:
                del needed[place]
        return self._only(list(needed))

    def _width(self, place: int) -> int:
        """How many characters a column needs."""
        cells = [row[place] for row in self.rows]
        natural = max(map(cell_len, [*cells, *self._heading(place).splitlines()]), default=0)
        if not self.columns[place].wraps:
            return natural
        return max([min(natural, _NARROW), *(cell_len(word) for cell in cells for word in cell.split())])

    def _heading(self, place: int) -> str:
        """A heading, in lines that are not much longer than the cells below."""
        width = max([6, *(cell_len(row[place]) for row in self.rows)])
        name = self.columns[place].name
        return "\n".join(textwrap.wrap(name, width, break_on_hyphens=False, break_long_words=False))


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """A table without headings: names, and what is said of them."""
    return Table([Column("", text=True), Column("", text=True, wraps=True)], list(pairs))


def as_text(renderable: RenderableType) -> str:
    """What rich would print on a terminal that is wide enough for everything, without styles."""
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_jupyter=False, force_terminal=False)
    console.print(renderable, markup=False, emoji=False, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).rstrip("\n")


def as_html(*parts: RenderableType) -> str:
    """What a notebook shows: tables, and the rest as paragraphs; all text is escaped.

    >>> as_html("a < b", facts([("size", "1")]))[:30]
    '<p>a &lt; b</p><table><tr><td '
    """
    filled = (part for part in parts if isinstance(part, Table) or str(part))
    return "".join(x._repr_html_() if isinstance(x, Table) else f"<p>{escape(str(x))}</p>" for x in filled)


def _html(tag: str, columns: Sequence[Column], cells: Sequence[str]) -> str:
    texts = [cell.__html__() if isinstance(cell, Strong) else escape(cell) for cell in cells]
    pairs = zip((_STYLES[column.text] for column in columns), texts, strict=True)
    drawn = (f'<{tag} style="{style}">{text}</{tag}>' for style, text in pairs)
    return f"<tr>{''.join(drawn)}</tr>"


def _rich(cell: str) -> Text:
    return Text(printable(cell), style="bold" if isinstance(cell, Strong) else "")


def _markdown(cell: str) -> str:
    line = " ".join(cell.split()).replace("<", "&lt;").replace("|", r"\|")
    return f"**{line}**" if isinstance(cell, Strong) else line
