"""The store: brings MLflow's runs up to what is known of a training run or a comparison; repeating it changes nothing.

Only MLflow's client is used, never its active run, so a program's own tracking is left alone. MLflow is imported when
a store is opened.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bonn_qat.files.locks import locked
from bonn_qat.training.results import RunResult
from bonn_qat_mlflow.flat import allowed, flatten
from bonn_qat_mlflow.where import DATABASE, Parent, Place, own_uri, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG, DIRECTORY_TAG, RUN_TAG = "mlflow.parentRunId", "bonn_qat.directory", "bonn_qat.run_id"
COMPLETE_TAG = "bonn_qat.complete"  # set when all of a finished run is in the store
LAYERS = "BONN_QAT_MLFLOW_LAYERS"  # the environment variable that switches the metrics of each layer on
EPOCH = "epoch"  # the last metric of each epoch: a step that has it has all the others
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # "Machine learning" in the UI
    "mlflow.experiment.primaryMetric.name": "test/top1",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    # What the UI shows with viewStateShareKey=bonn_qat in its address.
    "mlflow.sharedViewState.bonn_qat": json.dumps(
        {
            "selectedColumns": ["metrics.`test/top1`", "params.`scheme`"],
            "orderByKey": "metrics.`test/top1`",
            "orderByAsc": False,
        }
    ),
}
# The data is at fault; any other code means trouble with the store, the network or permissions.
_REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


@dataclass(frozen=True)  # the sender's thread reads one while the program's goes on
class LoggedRun:
    """What is known of a training run, from the hooks while it trains and from its results file later.

    Without an ``id`` MLflow's run is found by its name. ``above`` is the directory of its comparison, or the MLflow run
    that becomes its parent. ``status`` is MLflow's, "" for unknown; times are in seconds since 1970; ``epochs`` are
    pairs of the time at the end and the metrics, among them ``epoch``; ``files`` become artifacts.
    """

    id: str
    name: str
    recipe: Mapping[str, Any]
    above: Parent | Path | None
    started: float
    status: str = ""
    ended: float = 0.0
    epochs: Sequence[tuple[float, Mapping[str, float]]] = ()
    result: RunResult | None = None
    files: Sequence[Path] = ()
    note: str = ""


class Store:
    """An open store; several processes may use it at once."""

    def __init__(self, place: Place) -> None:
        """Open the store. Raises what MLflow does."""
        self._place = place
        self._parents: dict[Path, Parent] = {}
        self._experiment = ""
        with self._alone():
            if place.uri is None:
                _make_database(place.directory / DATABASE)
            self._client = open_client(place.uri or own_uri(place.directory))

    def log_comparison(self, directory: Path, status: str, time: float, files: Sequence[Path] = ()) -> list[str]:
        """Set the status of the run that represents the comparison in ``directory``, from ``time`` on, and log files.

        Returns what the store refused, each in one line. Raises what MLflow does where the store is out of reach.
        """
        with self._alone():
            run = self._client.get_run(self._parent(directory, time).run)
            refused = self._attach(run, files)
            self._set_status(run, status, time)
        return refused

    def log_run(self, run: LoggedRun) -> list[str]:
        """Bring MLflow's run up to ``run``; returns and raises what :meth:`log_comparison` does."""
        with self._alone():
            found = self._open(run)
            if COMPLETE_TAG in found.data.tags:
                return []
            refused: list[str] = []
            steps = {metric.step for metric in self._client.get_metric_history(found.info.run_id, EPOCH)}
            for part in _parts(run, steps, found.data.params):
                try:
                    self._client.log_batch(found.info.run_id, **part)
                except Exception as error:
                    if not _is_refusal(error):
                        raise
                    refused.append(reason(error))
            refused += self._attach(found, run.files)
            self._set_status(found, run.status, run.ended)
            if run.result is not None and not refused:
                self._client.set_tag(found.info.run_id, COMPLETE_TAG, "true")
        return refused

    def _alone(self) -> contextlib.AbstractContextManager[object]:
        """Keep out other processes that log the same comparison, or use the same database."""
        if self._place.uri is not None and not self._place.is_comparison:
            return contextlib.nullcontext()
        return locked(self._place.directory / ".mlflow.lock", waits=True)

    def _experiment_id(self) -> str:
        if not self._experiment:
            found = self._client.get_experiment_by_name(self._place.experiment)
            artifacts = self._place.directory / ("mlartifacts" if self._place.is_comparison else "mlruns")
            self._experiment = found.experiment_id if found else self._client.create_experiment(
                self._place.experiment,
                artifact_location=artifacts.as_uri() if self._place.uri is None else None,
                tags=_EXPERIMENT_TAGS,
            )  # fmt: skip
        return self._experiment

    def _parent(self, directory: Path, time: float) -> Parent:
        if directory not in self._parents:
            root, experiment = self._place.directory, self._experiment_id()
            # A path may contain what a filter cannot quote.
            found = self._search(experiment, f"tags.`{DIRECTORY_TAG}` LIKE '%'")
            ids = [run.info.run_id for run in found if run.data.tags[DIRECTORY_TAG] == str(directory)]
            if not ids:
                above = self._parent(root, time).run if directory != root else None
                name = Path(os.path.relpath(directory, root)).as_posix() if directory != root else root.name
                ids.append(self._create(Parent(experiment, above), name, {DIRECTORY_TAG: str(directory)}, time))
            self._parents[directory] = Parent(experiment, ids[0])
        return self._parents[directory]

    def _open(self, run: LoggedRun) -> "Run":
        parent = self._parent(run.above, run.started) if isinstance(run.above, Path) else run.above
        parent = parent or Parent(self._experiment_id(), None)
        condition = f"tags.`{RUN_TAG}` = '{run.id}'"
        if not run.id:
            condition = f"tags.`{PARENT_TAG}` = '{parent.run}' AND attributes.run_name = '{run.name}'"
        found = self._search(parent.experiment, condition)
        if found:
            return found[-1]
        tags = {"backbone": str(run.recipe.get("model")), **({RUN_TAG: run.id} if run.id else {})}
        tags |= {key: str(run.recipe[key]) for key in ("scheme", "data", "seed") if key in run.recipe}
        created = self._create(parent, run.name, tags, run.started)
        self._client.log_inputs(created, [_data_set(run.recipe)])
        return self._client.get_run(created)

    def _attach(self, run: "Run", files: Sequence[Path]) -> list[str]:
        """Log files as artifacts. They stay on disk in any case, so a failure costs nothing else."""
        refused = []
        for path in files:
            try:
                self._client.log_artifact(run.info.run_id, str(path))
            except Exception as error:
                refused.append(reason(error))
        return refused

    def _set_status(self, run: "Run", status: str, time: float) -> None:
        if status == "RUNNING" != run.info.status:
            self._client.update_run(run.info.run_id, status=status)
        elif status not in ("", run.info.status):
            self._client.set_terminated(run.info.run_id, status, end_time=_ms(time))

    def _search(self, experiment: str, condition: str) -> list["Run"]:
        runs: list[Run] = []
        page = None
        while page is None or page.token:
            page = self._client.search_runs([experiment], condition, page_token=page.token if page else None)
            runs += page
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _create(self, parent: Parent, name: str, tags: dict[str, str], time: float) -> str:
        from mlflow.tracking.context.default_context import DefaultRunContext

        tags |= DefaultRunContext().tags()  # the user and the program
        if parent.run is not None:
            tags[PARENT_TAG] = parent.run
        run: str = self._client.create_run(parent.experiment, _ms(time), tags, name).info.run_id
        return run


def _parts(run: LoggedRun, steps: set[int], params: Mapping[str, str]) -> Iterator[dict[str, list[Any]]]:
    """What the store does not have yet, as arguments of ``log_batch``; each part may be refused on its own."""
    from mlflow.entities import Metric, Param, RunTag

    yield {"params": [Param(key, value) for key, value in flatten(run.recipe).items() if key not in params]}
    with_layers = os.environ.get(LAYERS, "0") not in ("", "0")
    metrics = []
    for time, values in run.epochs:
        names = [name for name in values if with_layers or not name.startswith(("scale/", "flips/"))]
        names.append(names.pop(names.index(EPOCH)))
        if values[EPOCH] not in steps:
            metrics += [Metric(allowed(name), values[name], _ms(time), int(values[EPOCH])) for name in names]
    yield {"metrics": metrics}
    tags, numbers = {"mlflow.note.content": run.note} if run.note else {}, {}
    if run.result is not None:
        commit, dirty, _ = run.result.environment.get("commit", "unknown").partition("-dirty")
        tags |= {f"environment.{allowed(key)}": str(value) for key, value in run.result.environment.items()}
        tags |= {"mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(dirty))}
        # Without a prefix, because the UI draws them after the curves then.
        numbers = {"seconds": run.result.seconds, **run.result.size}
    yield {
        "tags": [RunTag(key, value) for key, value in tags.items()],
        "metrics": [Metric(allowed(key), float(value), _ms(run.ended), 0) for key, value in numbers.items()],
    }


def _data_set(recipe: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {key: recipe[key] for key in ("train_images", "test_images", "validation_images") if key in recipe}
    name = str(recipe.get("data"))
    digest = hashlib.sha256(json.dumps([name, profile]).encode()).hexdigest()[:8]
    found = Dataset(name, digest, "bonn_qat", json.dumps({"name": name}), profile=json.dumps(profile))
    return DatasetInput(found, [InputTag("mlflow.data.context", "train")])


def _make_database(path: Path) -> None:
    """Create the tables under another name: MLflow cannot continue from half of them, which a kill would leave."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.new")
    for file in path.parent.glob(f"{temporary.name}*"):
        file.unlink()
    open_client(f"sqlite:///{temporary.as_posix()}").search_experiments(max_results=1)
    temporary.replace(path)


def open_client(uri: str) -> "MlflowClient":
    """MLflow's client of a store, without its log lines on new tables and on each try to reach a server."""
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow.MlflowClient(tracking_uri=uri)


def identity(run_id: str) -> str:
    """``run_id`` in a form that a filter of MLflow can quote."""
    return run_id if re.fullmatch(r"[\w.:-]{1,200}", run_id) else hashlib.sha256(run_id.encode()).hexdigest()


def _is_refusal(error: Exception) -> bool:
    code = getattr(error, "error_code", None)
    return code in _REFUSALS if code else isinstance(error, ValueError | TypeError | LookupError | ArithmeticError)


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
