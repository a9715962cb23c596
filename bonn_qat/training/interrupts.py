"""Interrupts: Ctrl-C and SIGTERM, deferred until the work can stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, final

TERMINATED = 128 + signal.SIGTERM
_DEFERRED = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupts:
    """The first signal within :func:`deferred_interrupts`, if any; true if there was one."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    def __bool__(self) -> bool:
        return self._came is not None

    def deliver(self) -> None:
        """Handle the first signal that came, if any, as it would have been; SIGTERM at least raises SystemExit(143)."""
        if self._came is None:
            return
        number, self._came = self._came, None
        self._release()
        if self._before[number] is signal.SIG_DFL:
            sys.exit(128 + number)  # so that open ``with`` and ``finally`` blocks end
        signal.raise_signal(number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._came is None:
            self._came = number
            return
        # The second signal is not deferred.
        self._release()
        os.kill(os.getpid(), number)

    def _defer(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _DEFERRED:
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:
                self._before[number] = handler
                signal.signal(number, self._take)

    def _release(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._take:
                signal.signal(number, handler)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Defer SIGINT and SIGTERM within the block until :meth:`Interrupts.deliver`, or else the end of the block.

    A second signal is handled at once. In threads other than the main one nothing is deferred.

    >>> with deferred_interrupts() as interrupts:
    ...     bool(interrupts)
    False
    """
    interrupts = Interrupts()
    interrupts._defer()
    try:
        yield interrupts
    finally:
        interrupts._release()
    interrupts.deliver()
