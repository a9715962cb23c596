"""Sending events in a thread of its own: whoever puts one never waits for a store, and nothing is lost with one.

An event that the store has not taken stays in memory until it has, or until it stands in the file of unsent events:
at once where the store was found to be out of reach, and at the end of each run whatever the store does.
"""

import atexit
import contextlib
import os
import shlex
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from bonn_qat_mlflow import unsent
from bonn_qat_mlflow.events import ComparisonBegan, ComparisonEnded, Event, RunBegan, RunEnded, snapshot
from bonn_qat_mlflow.store import Refused, Store, reason

PATIENCE = 30.0  # seconds that the end of a training waits for what is not sent yet
SHORT = 3.0  # the same where the store was found to be out of reach, or the program is interrupted
_QUICK = 0.5


class Place(NamedTuple):
    """The directory of the outermost comparison, or the working directory, and the store that MLflow was told."""

    directory: Path
    uri: str | None


class Takes(Protocol):
    """What an open store is to the sender."""

    def take(self, event: Event) -> None:
        """Log the event. Raises Refused for one that costs only itself, else the store is out of reach."""


class Sender:
    """A queue, the thread that empties it, and the file for what that cannot send.

    Each method may be called from any thread; a process that is forked off begins with nothing to send.
    """

    def __init__(
        self,
        connect: Callable[[Path, str | None], Takes] = Store,
        *,
        patience: float = PATIENCE,
        short: float = SHORT,
    ) -> None:
        """``connect(directory, uri)`` opens a store, and raises if it is out of reach; the times are in seconds."""
        self._connect, self._patience, self._short = connect, patience, short
        self._begin()
        atexit.register(self.wait)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[_Item] = deque()  # the first is the one that is being sent
        self._sessions: dict[Place, _Session] = {}
        self._thread: threading.Thread | None = None
        self._notes: list[str] = []
        self._refused = False

    def put(self, place: Place, event: Event, *, keep: bool = False) -> None:
        """Have the event sent; with ``keep`` all that waits stands in the file when this returns.

        Raises InvalidEvent.
        """
        self._after_fork()
        event = snapshot(event)
        with self._changed:
            if place not in self._sessions:
                self._sessions[place] = _Session(place)
            session = self._sessions[place]
            self._waiting.append(_Item(session, event))
            if keep:
                self._keep(self._waiting)
            if self._thread is None:
                # Read when MLflow is imported, which is in the thread; the environment is not for threads to change.
                os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
                self._thread = threading.Thread(target=self._work, name="bonn-qat-mlflow", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self._warn()

    def wait(self, seconds: float | None = None, *, interrupted: bool = False) -> None:
        """Wait until all is sent or in the file, at most ``seconds``; what is not sent by then is in the file.

        By default as long as the sender's patience, or short.
        """
        self._after_fork()
        with self._changed:
            if seconds is None:
                away = any(item.session.away for item in self._waiting)
                seconds = self._short if away or interrupted else self._patience
            try:
                # Most often that is enough, and no file is needed.
                if not self._empty(min(seconds, _QUICK)):
                    self._keep(self._waiting)
                    if not self._empty(seconds - _QUICK):
                        self._give_up(f"the store was not done within {seconds:g} seconds")
            except BaseException:
                self._give_up("interrupted")
                raise
        self._warn()

    def _empty(self, seconds: float) -> bool:
        return self._changed.wait_for(lambda: not self._waiting, timeout=max(0.0, seconds))

    def _give_up(self, why: str) -> None:
        """Leave the thread to the store that it hangs at; the next event gets another."""
        self._keep(self._waiting)
        for item in self._waiting:
            self._lose(item.session, why)
            _follow(item.session.begun, item.event)
        self._waiting.clear()
        self._thread = None

    def _after_fork(self) -> None:
        if self._process != os.getpid():
            self._begin()

    def _work(self) -> None:
        here = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._thread is not here)
                if self._thread is not here:
                    return
                item = self._waiting[0]
            outcome = _sent(item, self._connect)
            with self._changed:
                if self._thread is not here:
                    return
                self._settle(item, outcome)
                self._waiting.popleft()
                self._changed.notify_all()

    def _settle(self, item: "_Item", outcome: "_Outcome") -> None:
        session = item.session
        if outcome.store is None:
            self._lose(session, outcome.away)
            self._keep([item])
        else:
            session.store, session.away, session.has_unsent = outcome.store, "", False
        if outcome.refused and not self._refused:
            self._refused = True
            self._notes.append(f"MLflow's store refused a part ({outcome.refused}); the training goes on")
        _follow(session.begun, item.event)
        if session.store is not None and not any(other.session is session for other in list(self._waiting)[1:]):
            session.forget_kept()

    def _lose(self, session: "_Session", why: str) -> None:
        session.store, session.away = None, session.away or why
        if not session.warned:
            session.warned = True
            path = session.path
            self._notes.append(
                f"MLflow could not track this ({why}); the training goes on, and what is not sent is left in {path}; "
                f"to send it: python -m bonn_qat_mlflow {shlex.quote(str(path))}"
            )

    def _keep(self, items: Collection["_Item"]) -> None:
        for session in {item.session: None for item in items}:
            own = [item for item in self._waiting if item.session is session]
            context = dict(session.begun)
            for item in own:
                if item.kept:
                    _follow(context, item.event)
            left = [item for item in items if item.session is session and not item.kept]
            for item in left:
                item.kept = True  # in the file or, where that cannot be written, in the session
            try:
                session.keep([item.event for item in left], context)
            except OSError as error:
                if not session.warned_of_file:
                    session.warned_of_file = True
                    self._notes.append(f"{session.path} cannot be written ({reason(error)}); MLflow may miss a part")

    def _warn(self) -> None:
        with self._changed:
            notes, self._notes = self._notes, []
        for note in notes:
            warnings.warn(note, RuntimeWarning, stacklevel=4)


@dataclass(eq=False)
class _Session:
    """What is known of a place."""

    place: Place
    store: Takes | None = None  # None until it is opened, and where it is out of reach
    away: str = ""  # why it is out of reach
    warned: bool = False
    warned_of_file: bool = False
    has_unsent: bool = False  # of an earlier program
    begun: dict[str, Event] = field(default_factory=dict)  # the beginnings of what has not ended
    kept_until: int = 0  # bytes of the file when this session appended last
    known: dict[str, Event] = field(default_factory=dict)  # the beginnings, of those, that are in the file
    lines: Counter[bytes] = field(default_factory=Counter)  # that this session appended
    unwritten: list[Event] = field(default_factory=list)  # what the file did not take yet

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError):
            self.has_unsent = self.path.exists()

    @property
    def path(self) -> Path:
        return self.place.directory / unsent.NAME

    def keep(self, events: list[Event], context: dict[str, Event]) -> None:
        """Write events to the file, after the beginnings of what is under way, ``context``, which it does not have.

        Raises OSError; they are then written with the next.
        """
        self.unwritten += events
        if not self.unwritten:
            return

        def events_at(start: int) -> list[Event]:
            known = self.known if start == self.kept_until > 0 else {}
            return [*(event for key, event in context.items() if known.get(key) is not event), *self.unwritten]

        appended = unsent.append(self.path, events_at)
        self.lines.update(appended.lines)
        self.kept_until, self.known = appended.end, dict(context)
        for event in self.unwritten:
            _follow(self.known, event)
        self.unwritten.clear()

    def forget_kept(self) -> None:
        """Take what is in the file out again, for all of it was sent meanwhile; what others wrote there stays."""
        self.unwritten.clear()
        if self.lines:
            with contextlib.suppress(OSError):  # then it is sent once more, which changes nothing
                unsent.take_out(self.path, self.lines)
                self.lines.clear()
            self.kept_until = 0


@dataclass(eq=False)
class _Item:
    session: _Session
    event: Event
    kept: bool = False  # it stands in the file


def _follow(begun: dict[str, Event], event: Event) -> None:
    """Note what begins and ends."""
    match event:
        case ComparisonBegan():
            begun[event.directory] = event
        case ComparisonEnded():
            begun.pop(event.directory, None)
        case RunBegan():
            begun[event.run] = event
        case RunEnded():
            begun.pop(event.run, None)


class _Outcome(NamedTuple):
    store: Takes | None
    refused: str = ""
    away: str = ""


def _sent(item: _Item, connect: Callable[[Path, str | None], Takes]) -> _Outcome:
    """Send the event, first opening the store if need be; at a beginning one that was out of reach is tried again."""
    session, event, refused = item.session, item.event, ""
    store = session.store
    if store is None and session.away and not isinstance(event, ComparisonBegan | RunBegan):
        return _Outcome(None, away=session.away)
    try:
        if store is None:
            store = connect(*session.place)
            if (session.has_unsent or session.away) and session.path.exists():
                refused = next(iter(send_file(session.path, store)), "")
        store.take(event)
    except Refused as error:
        refused = refused or str(error)
    except Exception as error:
        return _Outcome(None, refused, reason(error))
    return _Outcome(store, refused)


def send_file(path: Path, store: Takes) -> list[str]:
    """Send a file's events and remove it; returns why events were refused, which go with it.

    Raises what :func:`bonn_qat_mlflow.unsent.send` does.
    """
    refusals: list[str] = []

    def take(event: Event) -> None:
        try:
            store.take(event)
        except Refused as error:
            refusals.append(str(error))

    unsent.send(path, take)
    return refusals
