"""The sender: a thread that does the jobs for a store, so that no training waits for one."""

import os
import shlex
import threading
import warnings
from collections.abc import Callable, Hashable

from bonn_qat.errors import BonnQatError
from bonn_qat_mlflow.store import Store
from bonn_qat_mlflow.where import Place, reason

PATIENCE = 30.0  # seconds that the end of a training waits for what is not sent yet
SHORT = 3.0  # the same if the store was found to be out of reach, or the program is interrupted

Job = Callable[[Store], list[str] | None]  # brings the store up to date and returns what it refused


class Sender:
    """The jobs to do, one for each key, and the thread that does them.

    A job that fails stays, until one with its key replaces it, and is tried again when another job for its place comes.
    Each method may be called from any thread; a forked process starts without jobs.
    """

    def __init__(
        self, connect: Callable[[Place], Store] = Store, *, patience: float = PATIENCE, short: float = SHORT
    ) -> None:
        """``connect`` opens a store, and raises if it is out of reach; the times are in seconds."""
        self._connect, self._patience, self._short = connect, patience, short
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards everything below
        self._jobs: dict[tuple[Place, Hashable], Job] = {}
        self._stores: dict[Place, Store] = {}
        self._paused: set[Place] = set()  # whose store is out of reach, until another job comes
        self._warned: set[Place | None] = set()  # None for what was refused
        self._notes: list[str] = []
        self._thread: threading.Thread | None = None

    def put(self, place: Place, key: Hashable, job: Job) -> None:
        """Have the job done, in place of an earlier one with the same key."""
        self._after_fork()
        with self._changed:
            self._jobs.pop((place, key), None)  # so that a sync comes after the runs that it must find
            self._jobs[place, key] = job
            self._paused.discard(place)
            if self._thread is None:
                # Read when MLflow is imported, in the thread, where setting a variable would not be safe.
                os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
                self._thread = threading.Thread(target=self._work, name="bonn-qat-mlflow", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        self._warn()

    def wait(self, place: Place, *, interrupted: bool = False) -> None:
        """Wait until the place's jobs are done or have failed, at most as long as the sender's patience."""
        self._after_fork()
        with self._changed:
            seconds = self._short if interrupted or place in self._warned else self._patience
            try:
                self._changed.wait_for(lambda: place in self._paused or not self._left(place), timeout=seconds)
            finally:
                if self._left(place):
                    self._note(place, f"the store was not done within {seconds:g} seconds")
        self._warn()

    def _after_fork(self) -> None:
        if self._process != os.getpid():
            self._begin()

    def _left(self, place: Place) -> bool:
        return any(where == place for where, _ in self._jobs)

    def _next(self) -> tuple[Place, Hashable] | None:
        return next((item for item in self._jobs if item[0] not in self._paused), None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._next)
                item = self._next()
                assert item is not None
                place, job = item[0], self._jobs[item]
            refused, why = None, ""
            try:
                if place not in self._stores:
                    self._stores[place] = self._connect(place)
                refused = job(self._stores[place])
            except BonnQatError as error:  # a damaged file; another try would find the same
                refused = [reason(error)]
            except Exception as error:
                why = reason(error)
            with self._changed:
                is_last = self._jobs.get(item) is job
                if why:
                    self._stores.pop(place, None)
                    self._note(place, why)
                    if is_last:
                        self._paused.add(place)
                elif is_last:
                    del self._jobs[item]
                if refused and None not in self._warned:
                    self._warned.add(None)
                    self._notes.append(f"MLflow refused a part of a run ({refused[0]}); the training continues")
                self._changed.notify_all()

    def _note(self, place: Place, why: str) -> None:
        if place not in self._warned:
            self._warned.add(place)
            self._notes.append(f"MLflow did not get everything ({why}); the training continues. {_remedy(place)}")

    def _warn(self) -> None:
        with self._changed:
            notes, self._notes = self._notes, []
        for note in notes:
            warnings.warn(note, RuntimeWarning, stacklevel=4)


def _remedy(place: Place) -> str:
    if not place.is_comparison:
        return "To be able to send this run later, write its result: bonn_qat.training.results.write_run"
    arguments = [str(place.directory), *(["--tracking-uri", str(place)] if place.uri else [])]
    return f"To send what is missing: python -m bonn_qat_mlflow sync {shlex.join(arguments)}"
