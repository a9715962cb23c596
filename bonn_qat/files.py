"""Files that are there whole or not at all, also when the disk is full or the power fails."""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> Path:
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


def sweep(path: Path) -> None:
    """Remove what :func:`write_whole` left of ``path`` in a process that was killed; nobody else may be writing it."""
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
