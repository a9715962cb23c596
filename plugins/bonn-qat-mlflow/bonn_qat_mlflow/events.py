"""What happens in a training as plain data: the events that hooks make, a store takes, and a file keeps, one a line."""

import json
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from types import UnionType
from typing import Any

FORMAT = 1
LONGEST_LINE = 1 << 26  # bytes
_LARGEST = 1 << 53  # of times and epochs: what every JSON reader holds exactly
_STATUS = ("FINISHED", "FAILED", "KILLED")


class InvalidEvent(ValueError):
    """A line that is no event of this format."""


@dataclass(frozen=True, kw_only=True)
class _Event:
    time: int  # milliseconds since 1970, when it happened

    def __post_init__(self) -> None:
        _check_number("time", self.time)


@dataclass(frozen=True, kw_only=True)
class ComparisonBegan(_Event):
    """Directories are seen from the outermost comparison's, which is "."; one elsewhere is absolute."""

    directory: str
    above: str | None  # the directory of the comparison that it is within
    experiment: str
    store: str | None  # which one MLflow was told to use, without secrets

    def __post_init__(self) -> None:
        super().__post_init__()
        for directory in (self.directory, self.above):
            if directory is not None and not _is_absolute(directory):
                _check_below("directory", directory)


@dataclass(frozen=True, kw_only=True)
class RunBegan(_Event):
    """A run began or went on; ``run`` is its own id, the same each time."""

    run: str
    name: str
    recipe: Mapping[str, Any]
    comparison: str | None  # its directory
    experiment: str
    parent_experiment: str | None  # with parent_run, ids of the program's active MLflow run
    parent_run: str | None
    store: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_run(self.run)


@dataclass(frozen=True, kw_only=True)
class EpochEnded(_Event):
    """``metrics`` of an epoch; their values may be NaN and infinite."""

    run: str
    epoch: int
    metrics: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_run(self.run)
        _check_number("epoch", self.epoch)


@dataclass(frozen=True, kw_only=True)
class RunEnded(_Event):
    """``report`` is what the results file holds, None for a run without a result."""

    run: str
    status: str
    report: Mapping[str, Any] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_run(self.run)
        _check_status(self.status)


@dataclass(frozen=True, kw_only=True)
class ComparisonEnded(_Event):
    """``page`` is the report, seen from the outermost comparison's directory and below it."""

    directory: str
    status: str
    page: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_status(self.status)
        if self.page is not None:
            _check_below("page", self.page)


Event = ComparisonBegan | RunBegan | EpochEnded | RunEnded | ComparisonEnded
_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in typing.get_args(Event)}
_FIELDS = {name: typing.get_type_hints(kind) for name, kind in _KINDS.items()}


def to_line(event: Event) -> bytes:
    """The event as one line of JSON, in which Python's ``NaN`` and ``Infinity`` stand for such values.

    What is no JSON becomes a number if it can, else text. Raises InvalidEvent for a line above 64 MiB.
    """
    content = {"format": FORMAT, "event": type(event).__name__, **vars(event)}
    line = json.dumps(content, default=_plain, skipkeys=True).encode() + b"\n"
    if len(line) > LONGEST_LINE:
        raise InvalidEvent(f"an event of {len(line)} bytes; allowed: {LONGEST_LINE}")
    return line


def from_line(line: bytes) -> Event:
    """The event that :func:`to_line` wrote. Raises InvalidEvent saying what is wrong with the line."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidEvent(f"no JSON ({error})") from error
    if not isinstance(content, dict):
        raise InvalidEvent(f"{_shown(content)} where an object is expected")
    if content.get("format") != FORMAT:
        raise InvalidEvent(f"format {_shown(content.get('format'))}; this version reads {FORMAT}")
    name = content.get("event")
    if not isinstance(name, str) or name not in _KINDS:
        raise InvalidEvent(f"event {_shown(name)}; allowed: {', '.join(_KINDS)}")
    values = {key: value for key, value in content.items() if key not in ("format", "event")}
    if values.keys() != _FIELDS[name].keys():
        raise InvalidEvent(f"the keys of {name} differ in {_shown(sorted(values.keys() ^ _FIELDS[name].keys()))}")
    for key, value in values.items():
        if not _is(value, _FIELDS[name][key]):
            raise InvalidEvent(f"{key} of {name} is {_shown(value)}")
    return _KINDS[name](**values)


def snapshot(event: Event) -> Event:
    """The event as it will be read, which what the caller still changes does not reach. Raises InvalidEvent."""
    return from_line(to_line(event))


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    try:
        return float(value)  # type: ignore[arg-type]
    except Exception:
        return str(value)


def _is(value: object, hint: Any) -> bool:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    # bool is an int, and no number here.
    return not isinstance(value, bool) and any(isinstance(value, typing.get_origin(kind) or kind) for kind in kinds)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_number(name: str, value: int) -> None:
    if not 0 <= value < _LARGEST:
        raise InvalidEvent(f"{name} is {_shown(value)}; allowed: 0 to 2**53")


def _check_run(run: str) -> None:
    if not re.fullmatch(r"[\w.:-]{1,200}", run):
        raise InvalidEvent(f"run is {_shown(run)}; allowed: up to 200 letters, digits and . : _ -")


def _check_status(status: str) -> None:
    if status not in _STATUS:
        raise InvalidEvent(f"status is {_shown(status)}; allowed: {', '.join(_STATUS)}")


def _is_absolute(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _check_below(name: str, path: str) -> None:
    parts = PureWindowsPath(path)  # splits at both kinds of slash
    if parts.drive or parts.root or ".." in parts.parts:
        raise InvalidEvent(f"{name} is {_shown(path)}; allowed: what is below the file's directory")
