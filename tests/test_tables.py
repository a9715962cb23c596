"""One table, shown by a terminal of any width, by Markdown, and on a page."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from rich.console import Console

from bonn_qat.tables import Column, Strong, Table, as_html, facts

COLUMNS = [
    Column("name", text=True, wraps=True), Column("first", drop=1), Column("second", drop=2), Column("top-1 (%)"),
    Column("rare", optional=True),
]  # fmt: skip
TABLE = Table(COLUMNS, [("one two", "1,000", "2", "3", ""), ("x | <i>", "4", "5", Strong("6"), "")], title="Some rows")


def printed(table: Table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_numbers_stand_on_the_right_and_text_on_the_left() -> None:
    assert str(TABLE).splitlines() == [
        "Some rows",
        "                        top-1",
        "name     first  second    (%)",
        "─────────────────────────────",
        "one two  1,000       2      3",
        "x | <i>      4       5      6",
    ]


def test_columns_give_way_in_their_order_and_are_named() -> None:
    assert printed(TABLE, 29) == str(TABLE).splitlines()
    assert printed(TABLE, 28)[2] == "name     first    (%)"
    assert " ".join(printed(TABLE, 28)[6:]) == "not shown at this width: second"
    assert printed(TABLE, 20)[2] == "name       (%)"
    assert " ".join(printed(TABLE, 20)[6:]) == "not shown at this width: first, second"
    assert printed(TABLE, 14)[3:6] == ["──────────────", "one two      3", "x | <i>      6"]
    assert printed(TABLE, 10)[3:7] == ["──────────", "one      3", "two", "x |      6"]


def test_a_gap_stands_between_groups_and_headings_are_there_if_any_is_named() -> None:
    rows = [("1", "a"), ("1", "b"), ("2", "c")]
    assert str(Table([Column("n"), Column("x")], rows, grouped=1)).splitlines() == [
        "n  x", "────", "1  a", "1  b", "", "2  c",
    ]  # fmt: skip
    assert str(facts([("size", "1"), ("MACs", "2")])).splitlines() == ["size  1", "MACs  2"]


def test_an_optional_column_shows_if_any_cell_has_text() -> None:
    assert "rare" not in str(TABLE) + TABLE.to_markdown()
    assert "rare" in str(Table(COLUMNS, [("a", "b", "c", "d", "e"), ("", "", "", "", "")]))


def test_markdown_and_page_escape_what_is_markup_there() -> None:
    assert TABLE.to_markdown().splitlines() == [
        "| name | first | second | top-1 (%) |", "| --- | ---: | ---: | ---: |",
        "| one two | 1,000 | 2 | 3 |", r"| x \| &lt;i> | 4 | 5 | **6** |",
    ]  # fmt: skip
    assert escape(Strong("<b>")) == "<strong>&lt;b&gt;</strong>"


def test_a_notebook_gets_escaped_tables_and_paragraphs() -> None:
    page = as_html("a < b", "", Table(COLUMNS, TABLE.rows, title="<b>"))
    assert page.startswith("<p>a &lt; b</p><table><caption>&lt;b&gt;</caption><tr><th ")
    assert "x | &lt;i&gt;</td>" in page
    assert "<strong>6</strong></td>" in page
    assert page.count("<tr>") == 3
    assert "rare" not in page
    assert "<th" not in as_html(facts([("size", "1")]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.text(max_size=30)] * 3), max_size=4), st.integers(20, 90))
def test_any_text_fits_and_sends_the_terminal_no_orders(rows: list[tuple[str, str, str]], width: int) -> None:
    columns = [Column("a", text=True, wraps=True), Column("b", drop=1), Column("c", drop=2)]
    text = "\n".join(printed(Table(columns, rows), width))
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("width", [10, 40])
def test_a_title_breaks_where_the_terminal_ends(width: int) -> None:
    assert all(len(line) <= width for line in printed(facts([("a", "word " * 20)]), width))
