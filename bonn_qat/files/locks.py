"""Locks: what one process at a time does, of all that see a directory; the system lets go when it dies."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import filelock

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(path: Path, *, waits: bool) -> Iterator[bool]:
    """Whether this process holds the lock ``path`` for the block; with ``waits`` it does, however long that takes.

    Where the file system has no locks, it always does. Raises OSError where the file cannot be made.
    """
    lock = filelock.FileLock(path, timeout=-1 if waits else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
