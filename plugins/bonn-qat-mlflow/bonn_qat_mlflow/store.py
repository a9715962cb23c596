"""Events into MLflow: a comparison is a parent run, each of its runs a child, each epoch a batch of metrics.

Taking an event again changes nothing. Only MLflow's client is used, never its active run, so a program's own tracking
is left as it is; MLflow is imported when a store is opened.
"""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bonn_qat_mlflow.events import ComparisonBegan, ComparisonEnded, EpochEnded, Event, RunBegan, RunEnded
from bonn_qat_mlflow.flat import allowed, flatten
from bonn_qat_mlflow.where import ARTIFACTS, DATABASE, masked, own_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG, DIRECTORY_TAG, RUN_TAG = "mlflow.parentRunId", "bonn_qat.directory", "bonn_qat.run_id"
EPOCH = "epoch"  # the metric that is logged last
_DEFAULT_ARTIFACTS = "mlruns"  # MLflow's own choice, for what it did not get a directory for
_PARAMS_PER_BATCH, _METRICS_PER_BATCH = 100, 1000
_STALE = 600.0  # seconds after which nobody makes a database any more
# What is wrong with an event; any other code is the store's, the network's or the permission's trouble.
_REFUSALS = (
    "BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST",
)  # fmt: skip


class Refused(Exception):
    """The store can be reached and does not take this event, or a part of it."""


class Store:
    """One store, for the comparison in ``directory`` or for the runs of a program that is there."""

    def __init__(self, directory: Path, uri: str | None) -> None:
        """``uri`` None is the database in ``directory``. Raises what MLflow does."""
        self._directory, self._own = directory, uri is None
        if uri is None:
            _make_database(directory / DATABASE)
        self._client = open_client(uri or own_uri(directory))
        self._comparisons: dict[str, _Place] = {}
        self._runs: dict[str, _Logged] = {}

    def take(self, event: Event) -> None:
        """Log the event. Raises Refused, after all of it that the store takes, else what MLflow raises."""
        refusal: Exception | None = None
        for part in self._parts(event):
            try:
                part()
            except Exception as error:
                # Where a comparison cannot begin nothing of it can be logged: that is the store's trouble.
                if not isinstance(error, Refused) and (isinstance(event, ComparisonBegan) or not _is_refusal(error)):
                    raise
                refusal = refusal or error
        if refusal is not None:
            raise refusal if isinstance(refusal, Refused) else Refused(reason(refusal)) from refusal

    def _parts(self, event: Event) -> list[Callable[[], None]]:
        parts: list[Callable[..., None]]
        match event:
            case ComparisonBegan():
                parts = [self._open_comparison]
            case RunBegan():
                parts = [self._open_run, self._log_params]
            case EpochEnded():
                parts = [self._log_epoch]
            case RunEnded():
                parts = [self._log_result, self._log_report, self._end_run]
            case ComparisonEnded():
                parts = [self._log_page, self._end_comparison]
        return [functools.partial(part, event) for part in parts]

    def _open_comparison(self, event: ComparisonBegan) -> None:
        directory = self._directory / event.directory
        if event.above is None:
            experiment, parent = self._experiment(event.experiment, ARTIFACTS), None
        else:
            experiment, parent = self._comparison(event.above)
        above = self._directory / event.above if event.above is not None else directory.parent
        # A path may hold what a filter cannot quote.
        found = [
            run
            for run in self._found(experiment, f"tags.`{DIRECTORY_TAG}` LIKE '%'")
            if run.data.tags[DIRECTORY_TAG] == str(directory)
        ]
        if found:
            self._reopen(found[0], event.time)
            run = found[0].info.run_id
        else:
            name = directory.relative_to(above).as_posix() if directory.is_relative_to(above) else directory.name
            run = self._create(experiment, name, parent, {DIRECTORY_TAG: str(directory)}, event.time)
        self._comparisons[event.directory] = _Place(experiment, run)

    def _open_run(self, event: RunBegan) -> None:
        experiment, parent = self._place_of(event)
        found = self._found(experiment, f"tags.`{RUN_TAG}` = '{event.run}'")
        if found:
            run, params = found[0].info.run_id, set(found[0].data.params)
            self._reopen(found[0], event.time)
        else:
            tags = {"backbone": str(event.recipe.get("model")), RUN_TAG: event.run}
            tags.update((key, str(event.recipe[key])) for key in ("scheme", "data", "seed") if key in event.recipe)
            run, params = self._create(experiment, event.name, parent, tags, event.time), set()
        known = self._runs.get(event.run)
        if known is None or known.id != run:
            self._runs[event.run] = _Logged(run, event.name, params, is_new=not found)

    def _place_of(self, event: RunBegan) -> "_Place":
        if event.comparison is not None:
            return self._comparison(event.comparison)
        if event.parent_experiment is not None:
            return _Place(event.parent_experiment, event.parent_run)
        return _Place(self._experiment(event.experiment, _DEFAULT_ARTIFACTS), None)

    def _log_params(self, event: RunBegan) -> None:
        from mlflow.entities import Param

        run = self._run(event)
        missing = [Param(key, value) for key, value in flatten(event.recipe).items() if key not in run.params]
        for batch in _batches(missing, _PARAMS_PER_BATCH):
            self._client.log_batch(run.id, params=batch)
            run.params.update(param.key for param in batch)

    def _log_epoch(self, event: EpochEnded) -> None:
        metrics = {key: value for key, value in event.metrics.items() if key != EPOCH}
        self._log_metrics(self._run(event), {**metrics, EPOCH: event.epoch}, event.time, event.epoch)

    def _log_metrics(self, run: "_Logged", metrics: Mapping[str, Any], time: int, step: int) -> None:
        """Log batch by batch; each is logged whole, so its last metric tells whether the run has it."""
        from mlflow.entities import Metric

        logged = [Metric(allowed(key), float(value), time, step) for key, value in metrics.items()]
        for batch in _batches(logged, _METRICS_PER_BATCH):
            steps = self._steps(run, batch[-1].key)
            if step not in steps:
                self._client.log_batch(run.id, metrics=batch)
                steps.add(step)

    def _steps(self, run: "_Logged", key: str) -> set[int]:
        if key not in run.steps:
            there = [] if run.is_new else self._client.get_metric_history(run.id, key)
            run.steps[key] = {metric.step for metric in there}
        return run.steps[key]

    def _log_result(self, event: RunEnded) -> None:
        from mlflow.entities import RunTag

        if event.report is None:
            return
        run, environment = self._run(event), event.report.get("environment", {})
        tags = {f"environment.{key}": str(value) for key, value in environment.items()}
        if environment.get("commit", "unknown") != "unknown":
            tags["commit"] = str(environment["commit"])
        self._client.log_batch(run.id, tags=[RunTag(allowed(key), value) for key, value in tags.items()])
        numbers = {f"size/{key}": value for key, value in event.report.get("size", {}).items()}
        if "seconds" in event.report:
            numbers["seconds"] = event.report["seconds"]
        self._log_metrics(run, numbers, event.time, 0)

    def _log_report(self, event: RunEnded) -> None:
        if event.report is not None:
            run = self._run(event)
            _attach(self._client.log_dict, run.id, dict(event.report), f"{run.name}.json")

    def _end_run(self, event: RunEnded) -> None:
        self._end(self._run(event).id, event)

    def _log_page(self, event: ComparisonEnded) -> None:
        page = (self._directory / event.page).resolve() if event.page is not None else None
        if page is not None and page.is_relative_to(self._directory.resolve()) and page.exists():
            _attach(self._client.log_artifact, self._comparison(event.directory).run, str(page))

    def _end_comparison(self, event: ComparisonEnded) -> None:
        run = self._comparison(event.directory).run
        assert run is not None
        self._end(run, event)

    def _experiment(self, name: str, artifacts: str) -> str:
        known = self._client.get_experiment_by_name(name)
        location = (self._directory / artifacts).as_uri() if self._own else None
        found: str = known.experiment_id if known else self._client.create_experiment(name, artifact_location=location)
        return found

    def _comparison(self, directory: str) -> "_Place":
        if directory not in self._comparisons:
            raise Refused(f"nothing told of the beginning of the comparison in {directory!r}")
        return self._comparisons[directory]

    def _run(self, event: RunBegan | EpochEnded | RunEnded) -> "_Logged":
        if event.run not in self._runs:
            raise Refused(f"the beginning of the run {event.run!r} was refused, or nothing told of it")
        return self._runs[event.run]

    def _found(self, experiment: str, condition: str) -> list["Run"]:
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs([experiment], filter_string=condition, page_token=token)
            runs += page
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _create(self, experiment: str, name: str, parent: str | None, tags: dict[str, str], time: int) -> str:
        if parent is not None:
            tags[PARENT_TAG] = parent
        run: str = self._client.create_run(experiment, start_time=time, tags=tags, run_name=name).info.run_id
        return run

    # An event from before a run's end is one that is told again: it changes no status.

    def _reopen(self, run: "Run", time: int) -> None:
        if run.info.status != "RUNNING" and time >= (run.info.end_time or 0):
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _end(self, run: str, event: RunEnded | ComparisonEnded) -> None:
        if event.time >= (self._client.get_run(run).info.end_time or 0):
            self._client.set_terminated(run, event.status, end_time=event.time)


class _Place(NamedTuple):
    experiment: str
    run: str | None  # what becomes the parent


@dataclass
class _Logged:
    """A run, and what of it the store has."""

    id: str
    name: str
    params: set[str]
    is_new: bool
    steps: dict[str, set[int]] = field(default_factory=dict)  # by metric


def _make_database(path: Path) -> None:
    """Make the tables under another name: MLflow cannot go on from a half of them, which a kill would leave."""
    if path.exists():
        _sweep(path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        open_client(f"sqlite:///{temporary.as_posix()}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes that were killed while they made the database left."""
    for file in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):  # it costs room, nothing else
            if time.time() - file.stat().st_mtime > _STALE:
                file.unlink()


def open_client(uri: str) -> "MlflowClient":
    """The client of a store, without what is logged of making a database, and of each try to reach one."""
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow.MlflowClient(tracking_uri=uri)


def reason(error: Exception) -> str:
    """The error in one line without secrets."""
    first = (str(error).strip().splitlines() or [""])[0]
    return masked(f"{type(error).__name__}: {first}")[:300]


def _is_refusal(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, Refused | ValueError | TypeError | LookupError | ArithmeticError) and not isinstance(
        error, OSError
    )


def _attach(log: Callable[..., None], *arguments: object) -> None:
    """Log an artifact. What is in one is in a file too, so whatever fails costs the artifact alone."""
    try:
        log(*arguments)
    except Exception as error:
        raise Refused(reason(error)) from error


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
