"""Locks between processes, also on a shared directory; the system releases those of a process that dies."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import filelock

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(path: str | Path, *, waits: bool) -> Iterator[bool]:
    """Hold the lock file ``path`` within the block; False if another process holds it, unless ``waits``.

    Always True where the file system has no locks. Raises OSError where the file cannot be made.
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
