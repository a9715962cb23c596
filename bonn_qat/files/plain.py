"""Plain data: tables, lists, strings and numbers from JSON and TOML files that may come from anybody.

What is read is bounded: the size of a file, the depth of nested tables and lists, and integers, which must fit into 64
bits.
"""

import errno
import json
import os
import re
import stat
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

DEPTH = 24  # of tables and lists in one another
_SHOWN = 120  # characters of a value in a message
_WORDS = 1000  # characters of another library's error
# What may hold dots without being a key: strings, also those that do not end, and comments.
_NO_KEYS = re.compile(
    r""""{3}(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})?|'{3}(?:[^']|'(?!''))*+(?:'{3,5})?"""
    r"""|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
_LONG_KEY = re.compile(rf"(?:(?<![\w-])[\w-]++[ \t]*+\.[ \t]*+){{{DEPTH + 1}}}")
_TOO_DEEP = f"tables and lists are nested more than {DEPTH} levels deep"


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes. Raises OSError, at once, also for anything else that has a path.

    A plain ``open`` of a named pipe would wait for somebody to write to it.
    """
    return open(path, "rb", opener=_descriptor)


def _descriptor(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def read_text(path: str | Path, limit: int) -> str:
    """The text of a file of at most ``limit`` bytes. Raises OSError, and ValueError if it is larger or not UTF-8."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    return content.decode("utf-8")


def from_json(text: str) -> Any:
    """Parse JSON. Raises ValueError for invalid JSON, a duplicate key, and what :func:`check` refuses."""
    try:
        value = json.loads(text, object_pairs_hook=_table)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check(value)
    return value


def from_toml(text: str) -> dict[str, Any]:
    """Parse TOML. Raises ValueError for invalid TOML and what :func:`check` refuses."""
    # tomllib takes a time that grows with the square of the number of a key's parts.
    if _LONG_KEY.search(_NO_KEYS.sub(lambda found: "" if found[0][0] == "#" else "s", text)):
        raise ValueError(_TOO_DEEP)
    try:
        value = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check(value)
    return value


def toml_value(text: str) -> Any:
    """Parse one TOML value; other text is taken as a string, so that quotes can be left out.

    >>> toml_value("0.1"), toml_value("[1, 2]"), toml_value("plain")
    (0.1, [1, 2], 'plain')
    """
    try:
        table = from_toml(f"value = {text}")
    except ValueError:
        return text
    return table["value"] if len(table) == 1 else text


def check(value: Any) -> None:
    """Raise ValueError for values that JSON does not have and tables and lists nested too deeply.

    Also for keys that are not strings, strings with lone surrogates, and integers of more than 64 bits.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        level = [below for item in level for below in _within(item)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def shown(value: object) -> str:
    """``repr(value)`` for a message, cut to less than a line."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def one_line(error: BaseException | str) -> str:
    """The text of another library's error on one line, cut to 1,000 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= _WORDS else f"{text[: _WORDS - 3]}..."


def printable(text: str) -> str:
    """``text`` with control characters and lone surrogates escaped, so that a terminal shows them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return table


def _within(item: Any) -> Iterable[Any]:
    """The items of a table or list. Raises ValueError for what is not plain data."""
    if isinstance(item, str):
        item.encode()  # raises UnicodeEncodeError for a lone surrogate
    elif isinstance(item, int):
        if not -(2**63) <= item < 2**63:
            raise ValueError("a whole number has more than 64 bits")
    elif isinstance(item, list | tuple):
        return item
    elif isinstance(item, Mapping):
        if not all(isinstance(key, str) for key in item):
            raise ValueError("a key of a table is not a string")
        return [*item, *item.values()]
    elif item is not None and not isinstance(item, float):
        raise ValueError(f"{shown(item)} is not a string, number, list or table")
    return ()
