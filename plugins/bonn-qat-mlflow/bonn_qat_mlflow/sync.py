"""Sync: a results directory into a store. What the store has already is not sent again."""

import contextlib
import hashlib
import time
from dataclasses import replace
from pathlib import Path

from bonn_qat.errors import InvalidData
from bonn_qat.studies.comparison import MANIFEST, read_comparison
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.results import RUNS, RunResult, read_run
from bonn_qat_mlflow.store import LoggedRun, Store, identity

Found = tuple[Path, list[LoggedRun], str]  # a comparison's directory, its runs, and MLflow's status for the whole


def sync(store: Store, found: list[Found]) -> list[str]:
    """Bring the store up to what was found; returns what it refused. Raises what MLflow does."""
    refused = []
    for directory, runs, status in found:
        for run in runs:
            refused += store.log_run(run)
        pages = sorted(directory.glob("*.html"))
        ended = max((page.stat().st_mtime for page in pages), default=time.time())
        refused += store.log_comparison(directory, status, ended, pages)
    return refused


def read_all(root: Path, unfinished: str = "RUNNING") -> list[Found]:
    """What a comparison or a study left in ``root``, an absolute path, inner comparisons first.

    ``unfinished`` is the status where runs are missing. Raises InvalidData naming a file that is damaged, and for a
    directory without results.
    """
    inner = sorted(path.parent for path in root.rglob(MANIFEST) if path.parent != root)
    found = [part for directory in [*inner, root] for part in read(directory, unfinished)]
    if not inner and not found[-1][1] and not (root / MANIFEST).exists():
        raise InvalidData(f"{root} holds no {MANIFEST} and no {RUNS}/*.json; name the directory of a comparison")
    statuses = {status for _, _, status in found}
    whole = "FAILED" if "FAILED" in statuses else unfinished if unfinished in statuses else "FINISHED"
    return [*found[:-1], (*found[-1][:2], whole)]


def read(directory: Path, unfinished: str = "RUNNING") -> list[Found]:
    """What one comparison left; without a plan of one, the runs whose results files are there."""
    if not (directory / MANIFEST).exists():
        results = [read_run(path) for path in sorted((directory / RUNS).glob("*.json"))]
        return [(directory, [finished(directory, result) for result in results], "FINISHED")]
    comparison = read_comparison(directory)
    runs = [finished(directory, result) for result in comparison.results]
    for name in comparison.missing:
        with contextlib.suppress(InvalidData):  # there is none, or the run itself will refuse it
            state = read_state(directory / RUNS / f"{name}.unfinished.safetensors").progress
            run = LoggedRun(identity(state.run_id), name, state.recipe, directory, state.started)
            runs.append(replace(run, epochs=list(zip(state.times, state.epochs, strict=False))))
    for name, why in comparison.failures.items():
        recipe, now = comparison.recipes.get(name, {}), (directory / MANIFEST).stat().st_mtime
        runs.append(LoggedRun("", name, recipe, directory, now, "FAILED", now, note=why))
    status = "FAILED" if comparison.failures else unfinished if comparison.missing else "FINISHED"
    return [(directory, runs, status)]


def finished(directory: Path, result: RunResult) -> LoggedRun:
    """A finished run with its files below ``directory``; links that lead elsewhere are left out."""
    path = directory / RUNS / f"{result.name}.json"
    # An earlier version wrote neither id nor times.
    times = list(result.times) or [path.stat().st_mtime] * max(1, len(result.epochs))
    files = [file for file in (path, path.with_suffix(".safetensors")) if file.is_file()]
    return LoggedRun(
        identity(result.run_id or hashlib.sha256(path.read_bytes()).hexdigest()),
        result.name,
        result.recipe,
        directory,
        result.started or times[0],
        "FINISHED",
        times[-1],
        list(zip(times, result.epochs, strict=False)),
        result,
        [file for file in files if file.resolve().is_relative_to(directory)],
    )
