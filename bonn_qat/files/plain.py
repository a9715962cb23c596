"""Plain data: tables, lists, texts and numbers as JSON and TOML have them, from files that anybody may have written.

What is read is bounded: the size of a file, how deep tables and lists lie in one another, and whole numbers, which fit
into 64 bits. :func:`misfit` holds a value against a type.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

DEPTH = 24  # of tables and lists in one another
_SHOWN = 120  # characters of a value in a message
_WORDS = 1000  # of another library's words
_TOO_DEEP = f"more than {DEPTH} tables and lists lie in one another"


def read_text(path: Path, limit: int) -> str:
    """The text of a file of at most ``limit`` bytes. Raises OSError, and ValueError for a larger one or no UTF-8."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return content.decode("utf-8")


def from_json(text: str) -> Any:
    """The value that ``text`` holds.

    Raises ValueError for what is no JSON, for a key that is there twice, and for what :func:`check` refuses.
    """
    try:
        value = json.loads(text, object_pairs_hook=_table)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check(value)
    return value


def from_toml(text: str) -> dict[str, Any]:
    """The table that ``text`` holds. Raises ValueError for what is no TOML, and for what :func:`check` refuses."""
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check(value)
    return value


def toml_value(text: str) -> Any:
    """The value that ``text`` is in TOML; ``text`` itself, a word, where it is none that :func:`check` takes."""
    try:
        table = from_toml(f"value = {text}")
    except ValueError:
        return text
    return table["value"] if len(table) == 1 else text


def check(value: Any) -> None:
    """Raise ValueError for what JSON does not have, and what lies too deep.

    For keys that are no texts, texts that are no Unicode, and whole numbers of more than 64 bits too.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        level = [below for item in level for below in _within(item)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def misfit(name: str, value: Any, hint: Any, of: str = "") -> str | None:
    """What about ``value``, called ``name``, is not of the type ``hint``; None if nothing is.

    ``hint`` is str, int, float, bool, Any, or a tuple, list, sequence or mapping of them, with texts as keys. A whole
    number may stand for a float, a list for a tuple; a truth value for no number. ``of`` comes behind the name.
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return None
    if origin in (tuple, list, Sequence) and isinstance(value, list | tuple):
        parts: Iterator[tuple[Any, Any, Any]] = ((str(i), item, inner[0]) for i, item in enumerate(value))
    elif origin is Mapping and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        parts = ((key, item, inner[1]) for key, item in value.items())
    elif origin in (str, int, float, bool) and _is(origin, value):
        return None
    else:
        return f"{name}{of} is {shown(value)}; a value of type {getattr(origin, '__name__', origin)} is needed"
    return next(filter(None, (misfit(f"{name}.{shown(key)[1:-1]}", item, kind, of) for key, item, kind in parts)), None)


def shown(value: object) -> str:
    """``value`` as a message shows it: no longer than a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def one_line(error: BaseException | str) -> str:
    """What another library says, as a message takes it over: one line, no longer than some lines of a terminal."""
    text = " ".join(str(error).split())
    return text if len(text) <= _WORDS else f"{text[: _WORDS - 3]}..."


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal would obey or could not show: control characters, half characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _is(kind: type, value: object) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return table


def _within(item: Any) -> Iterable[Any]:
    """What lies in a table or a list; raises ValueError for what is no plain value."""
    if isinstance(item, str):
        item.encode()  # raises UnicodeEncodeError for half a character
    elif isinstance(item, int):
        if not -(2**63) <= item < 2**63:
            raise ValueError("a whole number has more than 64 bits")
    elif isinstance(item, list | tuple):
        return item
    elif isinstance(item, Mapping):
        if not all(isinstance(key, str) for key in item):
            raise ValueError("a key of a table is no text")
        return [*item, *item.values()]
    elif item is not None and not isinstance(item, float):
        raise ValueError(f"{shown(item)} is no text, number, list or table")
    return ()
