"""How the command ends: one line on stderr and an exit code."""

import errno
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bonn_qat.cli.options import console
from bonn_qat.errors import is_disconnection
from bonn_qat.files import plain
from bonn_qat.training.interrupts import TERMINATED

INTERRUPTED = 128 + signal.SIGINT
_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITTEN = {
    *_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.EBUSY, errno.ENXIO, errno.EMFILE, errno.ENFILE,
}  # fmt: skip
_PACKAGE = Path(__file__).parents[1]
DISCONNECTED = "another process of the group ended, or cannot be reached"


class Stopped(Exception):
    """A command was interrupted, or could not write its results: an exit code and a line for the user."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def say(line: str) -> None:
    """Print ``line`` with control characters escaped: parts of it may come from somebody else's file."""
    console().print(plain.printable(line), soft_wrap=True, markup=False, highlight=False)


def say_written(*paths: Path, what: str) -> None:
    """Print the ``paths`` behind ``what``. Raises OSError if one is not there: it was written, and removed since."""
    from bonn_qat import distributed

    for path in paths if distributed.rank() == 0 else ():  # which writes them; others may be ahead of it
        path.stat()
    say(f"{what}: {', '.join(map(str, paths))}")


@contextmanager
def stoppable(again: str) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and a full disk within the block into :class:`Stopped`; ``again`` is how to continue."""
    kept = f"finished runs are kept, and the current run up to its last checkpoint; {again} continues from there"
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(INTERRUPTED, f"interrupted; {kept}") from None
    except SystemExit as end:
        if end.code != TERMINATED:
            raise
        raise Stopped(TERMINATED, f"terminated; {kept}") from None
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        raise Stopped(3, f"{why(error)}; {kept}") from error
    except RuntimeError as error:
        if not is_disconnection(error):
            raise
        raise Stopped(1, f"{DISCONNECTED}; {kept}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def culprit(error: BaseException) -> str | None:
    """The plugin whose code raised ``error``, with the error; None if it was none's."""
    plugins = sys.modules.get("bonn_qat.plugins")  # without it no plugin was asked
    return plugins.culprit(error) if plugins else None


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Within the block a warning of this package is one line, without the source line that it came from."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], filename: str, *others: Any, **named: Any) -> str:
        is_ours = category.__module__.partition(".")[0] == "bonn_qat" or _PACKAGE in Path(filename).parents
        if not is_ours:
            return before(message, category, filename, *others, **named)
        return f"bonn-qat: warning: {plain.printable(plain.one_line(str(message)))}\n"

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def why(error: OSError) -> str:
    """The reason of ``error`` in words, with the file's name."""
    return "the disk is full" if error.errno in _FULL else f"{error.filename or 'a file'}: {error.strerror}"


def fail(code: int, message: str) -> int:
    """Print ``message`` on stderr and return ``code``."""
    click.echo(f"bonn-qat: {plain.printable(message)}", err=True)
    return code
