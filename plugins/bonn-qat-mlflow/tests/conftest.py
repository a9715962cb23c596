"""One empty store, made once (it takes seconds) and copied for each test; and comparisons that train nothing."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bonn_qat.studies.comparison import MANIFEST, Comparison, read_comparison, write_manifest
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RunResult, write_run

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
SETTINGS = (
    "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "BONN_QAT_MLFLOW_LAYERS",
)  # fmt: skip
STARTED = 1_700_000_000.0


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """The directory of a store that the plugin made, and everything that it said."""
    path = tmp_path_factory.mktemp("store")
    code = """
from pathlib import Path
from bonn_qat_mlflow.store import Store
from bonn_qat_mlflow.where import place_of
Store(place_of(Path.cwd()))
"""
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=path, env=environment, capture_output=True, text=True, check=True
    )
    return path, made.stdout + made.stderr


@pytest.fixture
def directory(new_store, tmp_path, monkeypatch):
    """A comparison's directory with an empty store, which is also where the program runs."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "digits"
    path.mkdir()
    shutil.copy(new_store[0] / "mlflow.db", path)
    monkeypatch.chdir(path)
    return path


def recipe(seed: int = 0, **changes: object) -> Recipe:
    """The recipe of the run ``bonn-scheme-seed0``."""
    return replace(Recipe.default("digits"), latents="scheme", seed=seed, skip=("stem", "*.conv1"), epochs=2, **changes)


def metrics_of(epoch: int, top1: float = 50.0) -> dict[str, float]:
    return {
        "epoch": float(epoch), "lr": 0.1, "train/loss": 1 / epoch, "test/loss": float("nan"), "test/top1": top1,
        "scale/a.b": 0.5, "flips": 0.25, "flips/a.b": 0.125,
    }  # fmt: skip


def result_of(one: Recipe, epochs: int = 2) -> RunResult:
    return RunResult(
        name=one.name, scheme="bonn", title="BONN", bits="1/1", latents="0.01", seed=one.seed, recipe=one.to_dict(),
        environment={"torch": "2", "commit": "abc-dirty"}, seconds=2.5, run_id=f"id-{one.name}", started=STARTED,
        epochs=[metrics_of(epoch) for epoch in range(1, epochs + 1)],
        times=[STARTED + 10 * epoch for epoch in range(1, epochs + 1)],
        size=dict.fromkeys(("parameters", "mbit", "float_mbit", "compression", "macs", "binary_macs"), 0.5),
    )  # fmt: skip


class Rehearsal:
    """Tells hooks, and leaves on disk, what a comparison does."""

    def __init__(self, hook: object = None) -> None:
        self.hook = hook

    def _tell(self, moment: str, **arguments: object) -> None:
        if self.hook is not None:
            getattr(self.hook, f"bonn_qat_{moment}")(**arguments)

    @contextlib.contextmanager
    def comparison(self, directory: Path, *recipes: Recipe) -> Iterator[None]:
        directory.mkdir(exist_ok=True, parents=True)
        if recipes:
            plan(directory, *recipes)
        self._tell("before_comparison", directory=directory, recipes=list(recipes))
        try:
            yield
        finally:
            (directory / "report.html").write_text("<p>done</p>")
            self._tell("after_comparison", directory=directory, page=directory / "report.html")

    def run(self, one: Recipe, directory: Path | None = None, *, failure: str = "", epochs: int = 2) -> None:
        """``failure`` says why it gives no result; the content of ``directory`` is written after the last hook."""
        result = result_of(one, epochs)
        self._tell("before_run", recipe=one, model=None, run_id=result.run_id)
        for metrics, time in zip(result.epochs, result.times, strict=True):
            self._tell("after_epoch", recipe=one, epoch=int(metrics["epoch"]), metrics=metrics, time=time)
        self._tell("after_run", recipe=one, result=None if failure else asdict(result))
        if directory is not None and failure:
            found = read_comparison(directory)
            write_manifest(replace(found, failures={**found.failures, one.name: failure}))
        elif directory is not None:
            path = write_run(directory, result)
            path.with_suffix(".safetensors").write_bytes(b"weights")

    def whole(self, directory: Path, *recipes: Recipe) -> None:
        """A comparison in which every run is finished."""
        with self.comparison(directory, *recipes):
            for one in recipes:
                self.run(one, directory)


def plan(directory: Path, *recipes: Recipe) -> None:
    """Write a comparison's plan, with what was planned before."""
    data = {"name": "digits", "classes": 10, "train": 100, "test": 100, "image": [1, 8, 8]}
    wanted = {one.name: one.to_dict() for one in recipes}
    found = Comparison(directory=directory, data=data, planned=list(wanted), results=[], recipes=wanted)
    if (directory / MANIFEST).exists():
        before = read_comparison(directory)
        planned = list(dict.fromkeys([*before.planned, *wanted]))
        failures = {name: why for name, why in before.failures.items() if name not in wanted}
        found = replace(found, planned=planned, recipes={**before.recipes, **wanted}, failures=failures)
    write_manifest(found)


def rows(directory: Path, query: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(directory / "mlflow.db")) as database:
        return database.execute(query).fetchall()


def stored(directory: Path) -> Mapping[str, object]:
    """What the store has: of each run its name, status, parent, params and tags, and the metrics with their times."""
    names = dict(rows(directory, "SELECT run_uuid, name FROM runs"))
    tags: dict[str, dict[str, str]] = {name: {} for name in names.values()}
    for run, key, value in rows(directory, "SELECT run_uuid, key, value FROM tags"):
        if key not in ("mlflow.source.name", "bonn_qat.directory"):  # which another program and place give
            tags[names[run]][key] = names[value] if key == "mlflow.parentRunId" else value
    artifacts = directory / "mlartifacts"
    return {
        "runs": sorted(rows(directory, "SELECT name, status FROM runs")),
        "tags": tags,
        "params": sorted((names[r], k, v) for r, k, v in rows(directory, "SELECT run_uuid, key, value FROM params")),
        "metrics": sorted(
            (names[run], *others)
            for run, *others in rows(directory, "SELECT run_uuid, key, step, value, is_nan, timestamp FROM metrics")
        ),
        "data": rows(directory, "SELECT name, digest FROM datasets"),
        "artifacts": sorted(
            (names[path.relative_to(artifacts).parts[0]], path.name, path.read_bytes())
            for path in artifacts.rglob("*") if path.is_file()
        ),
    }  # fmt: skip


@pytest.fixture
def rehearsed():
    """The helpers of this file."""
    return SimpleNamespace(**{
        name: globals()[name] for name in ("Rehearsal", "metrics_of", "plan", "recipe", "result_of", "rows", "stored")
    }, started=STARTED)  # fmt: skip
