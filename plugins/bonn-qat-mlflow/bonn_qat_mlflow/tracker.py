"""The observer: a comparison is a parent run, each of its runs a child, each epoch one batch of metrics.

A comparison that begins within another, as those of a study do, is a child of the other's run, in the other's store.

Only MLflow's client is used, never its active run, so a program's own tracking is left as it is. MLflow is
imported at the first run. Whatever fails here warns once and lets the training go on.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bonn_qat import hookimpl
from bonn_qat_mlflow.flat import allowed, flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "bonn-qat"  # of runs outside a comparison
DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
PARENT_TAG, DIRECTORY_TAG = "mlflow.parentRunId", "bonn_qat.directory"
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000


class _Recipe(Protocol):
    @property
    def name(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class _Place(NamedTuple):
    client: "MlflowClient"
    experiment: str
    parent: str | None


@dataclass
class _Comparison:
    directory: Path
    place: _Place | None = None  # None where the store is out of reach
    all_finished: bool = True


class Tracker:
    """The timeline hooks, with what they must remember between two calls."""

    def __init__(self) -> None:
        self._comparisons: list[_Comparison] = []  # the outermost first
        self._runs: dict[str, tuple[MlflowClient, str]] = {}
        self._warned = False

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        """Open the comparison's run, or open it again if the comparison goes on."""
        outer = self._comparisons[-1] if self._comparisons else None
        comparison = _Comparison(directory.resolve())
        self._comparisons.append(comparison)
        if outer is None:
            with self._training_goes_on():
                comparison.place = _open_comparison(comparison.directory)
        elif outer.place is not None:
            with self._training_goes_on():
                comparison.place = _open_run(outer.place, comparison.directory, outer.directory)

    @hookimpl
    def bonn_qat_before_run(self, recipe: _Recipe) -> None:
        """Open a run below the comparison's, or below the program's active one."""
        self._runs.pop(recipe.name, None)
        comparison = self._comparisons[-1] if self._comparisons else None
        if comparison is not None and comparison.place is None:
            return
        with self._training_goes_on():
            client, experiment, parent = (comparison and comparison.place) or _default_place()
            content = recipe.to_dict()
            tags = {"backbone": str(content.get("model"))}
            tags.update((key, str(content[key])) for key in ("scheme", "data", "seed") if key in content)
            if parent is not None:
                tags[PARENT_TAG] = parent
            run = client.create_run(experiment, tags=tags, run_name=recipe.name).info.run_id
            self._runs[recipe.name] = client, run
            _log_params(client, run, flatten(content))

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: _Recipe, epoch: int, metrics: Mapping[str, float]) -> None:
        """Log the epoch's metrics with the epoch as their step."""
        if recipe.name in self._runs:
            with self._training_goes_on():
                _log_metrics(*self._runs[recipe.name], metrics, step=epoch)

    @hookimpl
    def bonn_qat_after_run(self, recipe: _Recipe, report: Mapping[str, Any] | None) -> None:
        """Log the results file and end the run: FINISHED, or without a report KILLED or FAILED."""
        if self._comparisons:
            self._comparisons[-1].all_finished &= report is not None
        if recipe.name not in self._runs:
            return
        client, run = self._runs.pop(recipe.name)
        if report is not None:
            with self._training_goes_on():
                _log_report(client, run, recipe.name, report)
        with self._training_goes_on():
            client.set_terminated(run, _status(report is not None))

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path, report: Path) -> None:
        """Log the comparison's page and end its run: FINISHED if every run did."""
        here = directory.resolve()
        if here not in [comparison.directory for comparison in self._comparisons]:
            return
        while self._comparisons[-1].directory != here:  # one within, of whose end nobody told
            self._comparisons[-1].all_finished = False
            self._close(None)
        self._close(report)

    def _close(self, report: Path | None) -> None:
        comparison = self._comparisons.pop()
        if self._comparisons:
            self._comparisons[-1].all_finished &= comparison.all_finished
        if comparison.place is None or comparison.place.parent is None:
            return
        client, _, run = comparison.place
        with self._training_goes_on():
            if report is not None and report.exists():
                client.log_artifact(run, str(report))
        with self._training_goes_on():
            client.set_terminated(run, _status(comparison.all_finished))

    @contextlib.contextmanager
    def _training_goes_on(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                reason = (str(error).splitlines() or [""])[0]
                warnings.warn(
                    f"MLflow could not track this ({type(error).__name__}: {reason}); the training goes on",
                    RuntimeWarning,
                    stacklevel=3,
                )


TRACKER = Tracker()


def _status(finished: bool) -> str:
    # The hooks are called while an interruption is on its way up.
    interrupted = isinstance(sys.exception(), KeyboardInterrupt | SystemExit)
    return "KILLED" if interrupted else "FINISHED" if finished else "FAILED"


def open_store(directory: Path | None) -> "MlflowClient":
    """The store that MLflow is told to use, else a database in ``directory``, else MLflow's default."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    for chatty in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if directory is None or mlflow.is_tracking_uri_set():
        return mlflow.MlflowClient()
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{(directory / DATABASE).as_posix()}")


def _open_comparison(directory: Path) -> _Place:
    import mlflow

    client = open_store(directory)
    artifacts = None if mlflow.is_tracking_uri_set() else (directory / ARTIFACTS).as_uri()
    experiment = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or directory.name, artifacts)
    return _open_run(_Place(client, experiment, None), directory, directory.parent)


def _open_run(outer: _Place, directory: Path, above: Path) -> _Place:
    """The run of the comparison in ``directory``, below the outer's; its name is the way there from ``above``."""
    client, experiment, parent = outer
    for run in client.search_runs([experiment], filter_string=f"tags.`{DIRECTORY_TAG}` LIKE '%'"):
        if run.data.tags[DIRECTORY_TAG] == str(directory):
            client.update_run(run.info.run_id, status="RUNNING")
            return _Place(client, experiment, run.info.run_id)
    tags = {DIRECTORY_TAG: str(directory)} | ({PARENT_TAG: parent} if parent is not None else {})
    name = directory.relative_to(above).as_posix() if directory.is_relative_to(above) else directory.name
    run = client.create_run(experiment, tags=tags, run_name=name)
    return _Place(client, experiment, run.info.run_id)


def _default_place() -> _Place:
    client = open_store(None)
    import mlflow

    active = mlflow.active_run()
    if active is not None:
        return _Place(client, active.info.experiment_id, active.info.run_id)
    return _Place(client, _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT), None)


def _experiment(client: "MlflowClient", name: str, artifacts: str | None = None) -> str:
    known = client.get_experiment_by_name(name)
    found: str = known.experiment_id if known else client.create_experiment(name, artifact_location=artifacts)
    return found


def _log_params(client: "MlflowClient", run: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    for batch in _batches([Param(key, value) for key, value in params.items()], _PARAMS_PER_BATCH):
        client.log_batch(run, params=batch)


def _log_metrics(client: "MlflowClient", run: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    logged = [Metric(allowed(key), float(value), now, step) for key, value in metrics.items()]
    for batch in _batches(logged, _METRICS_PER_BATCH):
        client.log_batch(run, metrics=batch)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _log_report(client: "MlflowClient", run: str, name: str, report: Mapping[str, Any]) -> None:
    from mlflow.entities import RunTag

    environment = report.get("environment", {})
    tags = {f"environment.{key}": str(value) for key, value in environment.items()}
    if environment.get("commit", "unknown") != "unknown":
        tags["commit"] = str(environment["commit"])
    client.log_batch(run, tags=[RunTag(allowed(key), value) for key, value in tags.items()])
    numbers = {f"size/{key}": value for key, value in report.get("size", {}).items()}
    if "seconds" in report:
        numbers["seconds"] = report["seconds"]
    _log_metrics(client, run, numbers)
    client.log_dict(run, dict(report), f"{name}.json")
