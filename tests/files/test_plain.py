"""TOML that may come from anybody: parsed as tomllib does, in a time that its size bounds."""

import time
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bonn_qat.files import plain

LARGEST = 2**16
PARTS = [
    *(
        "a",
        "a.",
        " . ",
        '"',
        "'",
        '"a".',
        "'a'.",
        '"""',
        "'''",
        "''''",
        "\\",
        '\\"',
        "#",
        "\n",
        "[",
        "]",
        "[[",
        "{",
        "}",
        "=",
    ),
    *(" = 1\n", ",", "1", "1.5", " ", "\t", "\r\n", "é.", "x=", "_-"),
]


def refused(text: str) -> str:
    """What is wrong with the TOML, in at most two seconds."""
    began = time.thread_time()
    try:
        plain.from_toml(text)
        return ""
    except ValueError as error:
        return str(error)
    finally:
        assert time.thread_time() - began < 2


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=4), st.lists(st.sampled_from(PARTS), min_size=1, max_size=5))
def test_no_repetition_of_anything_takes_long(head: list[str], body: list[str]) -> None:
    text = "".join(body)
    refused(("".join(head) + text * (LARGEST // len(text)))[:LARGEST])


QUOTED = [f"x = {{{{b = {quotes}c{quotes}{end}, {{}} = 1}}}}" for quotes in ('"""', "'''") for end in ("", quotes[0])]


@pytest.mark.parametrize("part", ["a", '"a"', "'a'", "a ", "\t'' "])
@pytest.mark.parametrize("around", ["{} = 1", "[{}]", "[[{}]]", "x = {{{} = 1}}", "x = [{{{} = 1}}]", *QUOTED])
@pytest.mark.parametrize("count", [plain.DEPTH + 2, LARGEST])
def test_a_key_of_very_many_parts_is_refused_at_once(part: str, around: str, count: int) -> None:
    key = ".".join([part] * min(count, (LARGEST - 20) // (len(part) + 1)))
    assert refused(around.format(key)) == "tables and lists are nested more than 24 levels deep"


KEYS = st.text("ab_-1", min_size=1, max_size=3)
STRINGS = st.text("a.b\"\\#\n'", max_size=60).map(lambda text: f"{plain.json.dumps(text)}")
LITERALS = st.text('a.b"\\# ', max_size=60).map(lambda text: f"'{text}'")
LONG = st.text('a."\\#\n', max_size=60).map(lambda text: f"'''{text}'''")
VALUES = STRINGS | LITERALS | LONG | st.floats(0, 1e3).map(repr) | st.integers(0, 99).map(str)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, st.lists(VALUES, max_size=3), max_size=5), st.text("a.#'\"", max_size=60))
def test_dots_in_strings_numbers_and_comments_are_no_keys(table: dict[str, list[str]], comment: str) -> None:
    text = "".join(f"{key} = [{', '.join(items)}] # {comment}\n" for key, items in table.items())
    assert plain.from_toml(text) == tomllib.loads(text)


def test_the_longest_key_that_is_read() -> None:
    key = ".".join("a" * (plain.DEPTH - 1))
    assert plain.from_toml(f"{key} = 1") == tomllib.loads(f"{key} = 1")
