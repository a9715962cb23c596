"""Files that are there whole or not at all, also when the disk is full or the power fails."""

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
    finally:
        temporary.unlink(missing_ok=True)
    return path
