"""The file of events that no store has taken yet: appended to whole, sent in order, then removed.

Several processes may append to it, and one send it, at the same time, where the system has file locks.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from bonn_qat.files.atomic import write_bytes
from bonn_qat_mlflow.events import (
    LONGEST_LINE,
    ComparisonBegan,
    ComparisonEnded,
    Event,
    InvalidEvent,
    RunBegan,
    from_line,
    to_line,
)

NAME = "mlflow-unsent.jsonl"
_BLOCK = 1 << 16
_REMOVED_WHILE_OPEN = os.name != "nt"


class InvalidFile(ValueError):
    """A file that is no list of events; the message names it and the line."""


class Busy(OSError):
    """Another process is sending the file."""


class Appended(NamedTuple):
    """What was appended: its lines, and the bytes of the file before and after."""

    start: int
    end: int
    lines: list[bytes]


@dataclass
class Content:
    """What stands in a file."""

    events: int = 0
    runs: set[str] = field(default_factory=set)
    stores: set[str] = field(default_factory=set)  # that MLflow was told to use, without secrets


def append(path: Path, events_at: Callable[[int], Iterable[Event]]) -> Appended:
    """Append ``events_at(start)``, for a file of ``start`` bytes, so that they outlive process and power.

    What a killed process left of a line is cut off. Raises OSError where the system refuses to write; the file is then
    as before.
    """
    while True:
        with path.open("a+b", buffering=0) as file:
            _lock(file.fileno())
            if os.fstat(file.fileno()).st_nlink == 0:  # it was sent and removed while this waited for the lock
                continue
            start = _whole_lines(file)
            file.truncate(start)
            try:
                lines = list(map(to_line, events_at(start)))
                left = memoryview(b"".join(lines))
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(start)
                raise
            return Appended(start, file.seek(0, os.SEEK_END), lines)


def check(path: Path) -> Content:
    """Read the whole file and say what is in it. Raises InvalidFile, OSError."""
    content = Content()
    for _, _, event in _read(path, 0, 0):
        content.events += 1
        if not isinstance(event, ComparisonBegan | ComparisonEnded):
            content.runs.add(event.run)
        if isinstance(event, ComparisonBegan | RunBegan) and event.store is not None:
            content.stores.add(event.store)
    return content


def send(path: Path, take: Callable[[Event], None]) -> None:
    """Give ``take`` every event in order, those too that are appended meanwhile; then remove the file.

    Nothing is given before all is checked. Raises InvalidFile, Busy, OSError, and what ``take`` does: the file is
    then as before.
    """
    with _alone(path):
        end = number = 0
        while True:
            for _ in _read(path, end, number):
                pass
            for line in _read(path, end, number):
                take(line.event)
                end, number = line.end, line.number
            if remove(path, end):
                return


def remove(path: Path, size: int) -> bool:
    """Remove the file if whole lines are ``size`` bytes of it still; says whether it is gone."""
    try:
        with path.open("rb") as file:
            _lock(file.fileno())
            as_before = _whole_lines(file) == size
            if as_before and _REMOVED_WHILE_OPEN:
                path.unlink()
        if as_before and not _REMOVED_WHILE_OPEN:
            path.unlink()
    except FileNotFoundError:
        return True
    return as_before


def take_out(path: Path, lines: Counter[bytes]) -> None:
    """Remove ``lines``, each as often as it is counted, and the file if no other is left. Raises Busy, OSError.

    Of equal lines the first stay, so that those of others still stand before what needs them.
    """
    if not path.exists():
        return
    with _alone(path):
        with path.open("rb") as file:
            _lock(file.fileno())
            end = _whole_lines(file)
            file.seek(0)
            whole, left, known = file.read(end).splitlines(keepends=True), [], lines.copy()
            for line in reversed(whole):
                known[line] -= 1
                if known[line] < 0:
                    left.append(line)
            if len(left) == len(whole) > 0:
                return
            if _REMOVED_WHILE_OPEN:
                _replace(path, left[::-1])
        if not _REMOVED_WHILE_OPEN:
            _replace(path, left[::-1])


def _replace(path: Path, lines: list[bytes]) -> None:
    if lines:
        write_bytes(path, b"".join(lines))
    else:
        path.unlink()


class _Line(NamedTuple):
    number: int
    end: int  # bytes from the file's start
    event: Event


def _read(path: Path, end: int, number: int) -> Iterator[_Line]:
    """The events after ``end`` bytes, which are ``number`` lines, up to the last whole line."""
    with path.open("rb") as file:
        file.seek(end)
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise InvalidFile(f"{path}, line {number}: above {LONGEST_LINE} bytes")
            if not line.endswith(b"\n"):
                return
            try:
                event = from_line(line)
            except InvalidEvent as error:
                raise InvalidFile(f"{path}, line {number}: {error}") from error
            end += len(line)
            yield _Line(number, end, event)


def _whole_lines(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock until the descriptor is closed, where there are locks. Raises BlockingIOError if it must not wait."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without them
        return


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path.parent, os.O_RDONLY)
    except PermissionError:  # a system on which a directory is no file
        yield
        return
    try:
        try:
            _lock(descriptor, wait=False)
        except BlockingIOError as error:
            raise Busy(f"another process is sending {path}") from error
        yield
    finally:
        os.close(descriptor)
