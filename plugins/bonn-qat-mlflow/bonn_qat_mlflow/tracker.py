"""The observer: each hook notes what is known by now and hands it to the sender's thread.

What belongs to the program's own thread is looked up here: the working directory, MLflow's active run, and whether an
interruption is under way. Every failure becomes one warning, and the training continues.
"""

import contextlib
import os
import sys
import tempfile
import time as clock
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bonn_qat import hookimpl
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult, read_run, write_run
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.store import LoggedRun, Store, identity
from bonn_qat_mlflow.sync import finished, read, read_all, sync
from bonn_qat_mlflow.where import Parent, Place, active_run, own_uri, place_of, reason, told_uri

EXPERIMENT = "bonn-qat"  # of runs outside a comparison


class Tracker:
    """The hooks, with what they must remember between two calls."""

    def __init__(self, sender: Sender | None = None) -> None:
        self._sender = sender or Sender()
        self._comparisons: list[Path] = []  # the outermost first
        self._place: Place | None = None  # of the outermost
        self._runs: dict[str, tuple[Place, LoggedRun]] = {}
        self._written: list[Callable[[], None]] = []  # put finished runs, from their results files
        self._warned = False

    @staticmethod
    @hookimpl
    def bonn_qat_describe(directory: Path) -> str | None:
        """Name store and experiment of a comparison in ``directory``."""
        place = place_of(directory.resolve())
        return f"MLflow: {place}, experiment {place.experiment}"

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        """Create or reopen the comparison's run."""
        with self._training_goes_on():
            directory = directory.resolve()
            if not self._comparisons:
                self._place = place_of(directory)
            assert self._place is not None
            self._comparisons.append(directory)
            began = clock.time()
            self._sender.put(self._place, directory, lambda store: store.log_comparison(directory, "RUNNING", began))

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe, run_id: str) -> None:
        """Create or reopen a run below the comparison's, or below the program's active one."""
        self._runs.pop(recipe.name, None)
        with self._training_goes_on():
            self._put_written()
            above: Parent | Path | None
            if self._comparisons and self._place is not None:
                place, above = self._place, self._comparisons[-1]
            else:
                above = active_run()
                place = _working_place(above)
            id = identity(run_id or uuid.uuid4().hex)
            run = LoggedRun(id, recipe.name, recipe.to_dict(), above, clock.time(), "RUNNING")
            self._runs[recipe.name] = place, run
            self._sender.put(place, run.id, lambda store: store.log_run(run))

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: Recipe, epoch: int, metrics: Mapping[str, float], time: float) -> None:
        """Log the epoch's metrics with the epoch as their step."""
        with self._training_goes_on():
            if recipe.name in self._runs:
                place, run = self._runs[recipe.name]
                values = {name: float(value) for name, value in metrics.items()}
                run = replace(run, epochs=[*run.epochs, (time, {**values, "epoch": float(epoch)})])
                self._runs[recipe.name] = place, run
                self._sender.put(place, run.id, lambda store: store.log_run(run))

    @hookimpl
    def bonn_qat_after_run(self, recipe: Recipe, result: Mapping[str, Any] | None) -> None:
        """End the run: FINISHED, or without a result KILLED or FAILED."""
        if recipe.name not in self._runs:
            return
        place, run = self._runs.pop(recipe.name)
        with self._training_goes_on():
            run = replace(run, status="FINISHED" if result is not None else _status(), ended=clock.time())
            if result is None:
                self._sender.put(place, run.id, lambda store: store.log_run(run))
            elif isinstance(run.above, Path):
                # The results file is written after this call, so its turn comes with the next one.
                self._written.append(lambda: self._sender.put(place, run.id, lambda store: _log_file(store, run)))
            else:
                with_result = replace(run, result=RunResult(**result))
                self._sender.put(place, run.id, lambda store: _log_with_file(store, with_result))
            if not isinstance(run.above, Path):
                self._sender.wait(place, interrupted=_interrupted())

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path) -> None:
        """Sync the comparison's directory, in which everything is written by now."""
        directory, place = directory.resolve(), self._place
        if place is None or directory not in self._comparisons:
            return
        del self._comparisons[self._comparisons.index(directory) :]
        # Without an exception another process is at the runs that are missing.
        unfinished = _status() if sys.exception() else "RUNNING"
        look = read_all if directory == place.directory else read
        with self._training_goes_on():
            self._put_written()
            self._sender.put(place, directory, lambda store: sync(store, look(directory, unfinished)))
            if directory == place.directory:
                self._sender.wait(place, interrupted=_interrupted())

    def _put_written(self) -> None:
        while self._written:
            self._written.pop(0)()

    @contextlib.contextmanager
    def _training_goes_on(self) -> Iterator[None]:
        try:
            yield
        except Warning:  # a program that turns warnings into errors wants to see them
            raise
        except Exception as error:
            if not self._warned:
                self._warned = True
                words = f"MLflow could not track this ({reason(error)}); the training continues"
                warnings.warn(words, RuntimeWarning, stacklevel=3)


TRACKER = Tracker()


def _log_file(store: Store, run: LoggedRun) -> list[str]:
    assert isinstance(run.above, Path)
    path = run.above / RUNS / f"{run.name}.json"
    return store.log_run(finished(run.above, read_run(path)) if path.exists() else run)


def _log_with_file(store: Store, run: LoggedRun) -> list[str]:
    """Log a run whose results file is not written."""
    assert run.result is not None
    with tempfile.TemporaryDirectory() as folder:
        return store.log_run(replace(run, files=[write_run(Path(folder), run.result)]))


def _working_place(active: Parent | None) -> Place:
    """The working directory, and the active run's store, which MLflow may have chosen itself."""
    here, uri = Path.cwd(), told_uri(or_default=active is not None)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    return Place(here, None if uri == own_uri(here) else uri, experiment, is_comparison=False)


def _interrupted() -> bool:
    # The hooks are called while an interruption is propagating.
    return isinstance(sys.exception(), KeyboardInterrupt | SystemExit)


def _status() -> str:
    return "KILLED" if _interrupted() else "FAILED"
