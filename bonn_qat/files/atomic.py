"""Atomic writes: temporary file, fsync, rename; and the JSON documents that are written so."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bonn_qat.errors import InvalidData
from bonn_qat.files import plain


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, and the folders above it; one that is there already is replaced in one moment.

    Raises OSError where the system refuses to write; what was there before is then there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def remove_leftovers(path: Path) -> None:
    """Remove what :func:`write_bytes` left of ``path`` in a process that was killed; nobody else may be writing it."""
    prefix = f".{path.name}."
    with contextlib.suppress(OSError):  # it costs room, nothing else
        for file in path.parent.iterdir():
            if file.name.startswith(prefix) and file.name.removeprefix(prefix).isdigit():
                file.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    # Until then a power cut may bring the old name back; not every system lets one open a folder.
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


FORMAT = 1
LARGEST = 2**26  # bytes of a file


def expect(path: Path, kind: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raise InvalidData naming the file where ``content`` has other keys, or values of other types, than ``hints``."""
    if odd := sorted(content.keys() ^ hints.keys()):
        raise InvalidData(f"{path} is not {kind}: its keys differ in {plain.shown(odd)}")
    for key, hint in hints.items():
        if said := plain.misfit(key, content[key], hint):
            raise InvalidData(f"{path} is not {kind}: {said}")


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a file that is there whole or not at all, also when the disk is full."""
    return write_text(path, json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> Path:
    """Write text to a file that is there whole or not at all; half a character becomes a question mark."""
    return write_bytes(path, text.encode(errors="replace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a table that :func:`write_json` wrote, without its ``format``. Raises InvalidData naming the file."""
    try:
        content = plain.from_json(plain.read_text(path, LARGEST))
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidData(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InvalidData(f"{path} is not of format {FORMAT}, the one that this version of bonn-qat reads")
    return content
