"""Atomic writes: temporary file, fsync, rename; and the JSON documents that are written so."""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bonn_qat.errors import InvalidData
from bonn_qat.files import plain


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically, making the folders above it: readers see the old content or the new, never a part.

    Raises OSError if the file cannot be written, or ``path`` is something else than a file, such as a device; the old
    content stays.
    """
    path = Path(path)
    _check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a killed process with the same number
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_writable(path: str | Path) -> None:
    """Raise OSError for a path that is no file, or whose folder can neither be written nor made.

    For commands that work long before they write.
    """
    path = Path(path)
    _check_file(path)
    folder = next((parent for parent in path.parents if parent.exists()), Path())
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it exists and is not a regular file", str(path))


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files of killed processes that were writing ``path``; no other process may be writing it."""
    path = Path(path)
    prefix = f".{path.name}."
    with contextlib.suppress(OSError):  # they only take space
        for file in path.parent.iterdir():
            if file.name.startswith(prefix) and file.name.removeprefix(prefix).isdigit():
                file.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    # Without this a power cut may undo the renaming; not every system can open a folder.
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


FORMAT = 1
LARGEST = 2**26  # bytes of a file


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON object atomically, with its ``format``."""
    return write_text(path, json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False))


def write_text(path: str | Path, text: str) -> Path:
    """Write text as UTF-8 atomically; a lone surrogate becomes a question mark."""
    return write_bytes(path, text.encode(errors="replace"))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote, without ``format``. Raises InvalidData naming the file."""
    try:
        content = plain.from_json(plain.read_text(path, LARGEST))
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidData(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InvalidData(f"{path} is not of format {FORMAT}, the one that this version of bonn-qat reads")
    return content
