"""The observer: the timeline's hooks, each as an event for the sender's thread.

What must be seen in the program's own thread is seen here: the working directory, MLflow's active run, and whether an
interruption is on its way up. Nothing here waits for a store or imports MLflow, and whatever fails warns once and lets
the training go on.
"""

import contextlib
import hashlib
import os
import re
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bonn_qat import hookimpl
from bonn_qat_mlflow.events import ComparisonBegan, ComparisonEnded, EpochEnded, RunBegan, RunEnded
from bonn_qat_mlflow.sender import Place, Sender
from bonn_qat_mlflow.store import reason
from bonn_qat_mlflow.where import active_run, experiment_of, masked, own_uri, told_uri

EXPERIMENT = "bonn-qat"  # of runs outside a comparison


class _Recipe(Protocol):
    @property
    def name(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass
class _Comparison:
    directory: Path
    name: str  # the directory as events name it
    all_finished: bool = True


@dataclass
class _Run:
    place: Place
    id: str


class Tracker:
    """The hooks, with what they must remember between two calls."""

    def __init__(self, sender: Sender | None = None) -> None:
        self._sender = sender or Sender()
        self._place: Place | None = None  # of the comparisons
        self._comparisons: list[_Comparison] = []  # the outermost first
        self._runs: dict[str, _Run] = {}
        self._warned = False

    @staticmethod  # so that it can be sent to another process
    @hookimpl
    def bonn_qat_describe(directory: Path) -> str | None:
        """Name store and experiment of a comparison in ``directory``."""
        directory = directory.resolve()
        return f"MLflow: {masked(told_uri() or own_uri(directory))}, experiment {experiment_of(directory)}"

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        """Begin the comparison's run, or go on with it."""
        with self._training_goes_on():
            directory = directory.resolve()
            if not self._comparisons:
                self._place = Place(directory, told_uri())
            assert self._place is not None
            above = self._comparisons[-1].name if self._comparisons else None
            inner = _Comparison(directory, _name(directory, self._place.directory))
            self._comparisons.append(inner)
            self._sender.put(
                self._place,
                ComparisonBegan(
                    time=_now(),
                    directory=inner.name,
                    above=above,
                    experiment=experiment_of(self._place.directory),
                    store=_shown(self._place),
                ),
            )

    @hookimpl
    def bonn_qat_before_run(self, recipe: _Recipe, run_id: str) -> None:
        """Begin or continue a run below the comparison's, or below the program's active one."""
        self._runs.pop(recipe.name, None)
        with self._training_goes_on():
            comparison = self._comparisons[-1].name if self._comparisons else None
            place, experiment, parent = self._place, "", None
            if comparison is None or place is None:
                parent = active_run()
                place = _working_place(parent is not None)
                experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            run = _Run(place, _identity(run_id))
            self._sender.put(
                place,
                RunBegan(
                    time=_now(),
                    run=run.id,
                    name=recipe.name,
                    recipe=recipe.to_dict(),
                    comparison=comparison,
                    experiment=experiment,
                    parent_experiment=parent.experiment if parent else None,
                    parent_run=parent.run if parent else None,
                    store=_shown(place),
                ),
            )
            self._runs[recipe.name] = run

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: _Recipe, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the epoch's metrics with the epoch as their step."""
        run = self._runs.get(recipe.name)
        if run is not None:
            with self._training_goes_on():
                self._sender.put(run.place, EpochEnded(time=_now(), run=run.id, epoch=epoch, metrics=metrics))

    @hookimpl
    def bonn_qat_after_run(self, recipe: _Recipe, result: Mapping[str, Any] | None) -> None:
        """Log the results file and end the run: FINISHED, or without a result KILLED or FAILED."""
        if self._comparisons:
            self._comparisons[-1].all_finished &= result is not None
        run = self._runs.pop(recipe.name, None)
        if run is None:
            return
        with self._training_goes_on():
            # A finished run is not told again, so it must not be in memory alone once this returns.
            ended = RunEnded(time=_now(), run=run.id, status=_status(result is not None), report=result)
            self._sender.put(run.place, ended, keep=bool(self._comparisons))
            if not self._comparisons:
                self._sender.wait(interrupted=_interrupted())

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path, page: Path) -> None:
        """Log the comparison's page, if it is below the directory, and end its run: FINISHED if every run did."""
        here = directory.resolve()
        if here not in [comparison.directory for comparison in self._comparisons]:
            return
        while self._comparisons[-1].directory != here:  # one within, of whose end nobody told
            self._comparisons[-1].all_finished = False
            self._close(None)
        self._close(page.resolve())
        if not self._comparisons:
            self._place = None
            self._sender.wait(interrupted=_interrupted())

    def flush(self, seconds: float = 60.0) -> None:
        """Wait until all that was told is sent or in the file, at most ``seconds``."""
        self._sender.wait(seconds)

    def _close(self, page: Path | None) -> None:
        comparison, place = self._comparisons.pop(), self._place
        if self._comparisons:
            self._comparisons[-1].all_finished &= comparison.all_finished
        if place is None:
            return
        with self._training_goes_on():
            below = page is not None and page.is_relative_to(place.directory)
            self._sender.put(
                place,
                ComparisonEnded(
                    time=_now(),
                    directory=comparison.name,
                    status=_status(comparison.all_finished),
                    page=page.relative_to(place.directory).as_posix() if page is not None and below else None,
                ),
            )

    @contextlib.contextmanager
    def _training_goes_on(self) -> Iterator[None]:
        try:
            yield
        except Warning:  # who makes errors of warnings wants to see them
            raise
        except Exception as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"MLflow could not track this ({reason(error)}); the training goes on", RuntimeWarning, stacklevel=3
                )


TRACKER = Tracker()


def _now() -> int:
    return int(1000 * time.time())


def _working_place(has_active_run: bool) -> Place:
    """The working directory, and the active run's store, which MLflow may have chosen itself."""
    here, uri = Path.cwd(), told_uri(or_default=has_active_run)
    return Place(here, None if uri == own_uri(here) else uri)


def _name(directory: Path, outermost: Path) -> str:
    below = directory.is_relative_to(outermost)
    return directory.relative_to(outermost).as_posix() if below else directory.as_posix()


def _shown(place: Place) -> str | None:
    return None if place.uri is None else masked(place.uri)


def _identity(run_id: str) -> str:
    """The run's id as an event takes it; a run without one gets a new one, so that its events may be told again."""
    if re.fullmatch(r"[\w.:-]{1,200}", run_id):
        return run_id
    return hashlib.sha256(run_id.encode()).hexdigest() if run_id else uuid.uuid4().hex


def _interrupted() -> bool:
    # The hooks are called while an interruption is on its way up.
    return isinstance(sys.exception(), KeyboardInterrupt | SystemExit)


def _status(finished: bool) -> str:
    return "KILLED" if _interrupted() else "FINISHED" if finished else "FAILED"
