"""Interrupts: Ctrl-C and SIGTERM, held back until the work is at a place where it can stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, final

TERMINATED = 128 + signal.SIGTERM
_HELD = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupts:
    """What came within :func:`deferred_interrupts`."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    def __bool__(self) -> bool:
        return self._came is not None

    def deliver(self) -> None:
        """Do what the first one that came would have done, if one came; SIGTERM raises SystemExit(143) at least."""
        if self._came is None:
            return
        number, self._came = self._came, None
        self._release()
        if self._before[number] is signal.SIG_DFL:
            sys.exit(128 + number)  # for the blocks that are open to end as they do for an error
        signal.raise_signal(number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._came is None:
            self._came = number
            return
        # Whoever asks twice does not want to wait.
        self._release()
        os.kill(os.getpid(), number)

    def _hold(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _HELD:
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
    """Within the block SIGINT and SIGTERM wait for :meth:`Interrupts.deliver`; the second does not wait.

    What came and was not let through is let through at the block's end. In another thread than the main one nothing
    is held.
    """
    interrupts = Interrupts()
    interrupts._hold()
    try:
        yield interrupts
    finally:
        interrupts._release()
    interrupts.deliver()
