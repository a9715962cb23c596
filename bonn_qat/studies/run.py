"""run: train one recipe and write its files; several processes may share the runs of one directory by locks."""

import contextlib
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pluggy
import torch

from bonn_qat import distributed, plugins
from bonn_qat.errors import BonnQatError, TrainingDiverged, is_disconnection, is_out_of_memory
from bonn_qat.files.atomic import read_json, remove_leftovers
from bonn_qat.files.locks import locked
from bonn_qat.files.tensors import write_tensors
from bonn_qat.studies.comparison import MANIFEST, read_comparison, write_manifest
from bonn_qat.training.data import Data
from bonn_qat.training.network import build, weights_header
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult, read_run, write_run
from bonn_qat.training.train import train


class Elsewhere(enum.Enum):
    """The outcome of a run that another process is training."""

    RUNNING = enum.auto()


Outcome = RunResult | str | Elsewhere  # the result, or why the run failed


def in_turn(
    recipes: Sequence[Recipe],
    data: Data,
    directory: Path,
    *,
    pm: pluggy.PluginManager,
    waits: bool = False,
    device: torch.device | None = None,
    begins: Callable[[Recipe], object] = lambda recipe: None,
) -> None:
    """Run one recipe after another in this process, except those that other processes are training.

    What these leave unfinished meanwhile is trained too; with ``waits`` it waits for them. ``begins`` is called before
    each attempt. Other arguments and errors as for :func:`run`.
    """
    left, waits_now = list(recipes), False
    while left:
        elsewhere = []
        for recipe in left:
            begins(recipe)
            outcome = run(recipe, data, directory, pm=pm, waits=waits_now, device=device)
            if isinstance(outcome, Elsewhere):
                elsewhere.append(recipe)
        if len(elsewhere) == len(left):
            if not waits:
                return
            waits_now = True
        left = elsewhere


def run(
    recipe: Recipe,
    data: Data,
    directory: Path,
    *,
    pm: pluggy.PluginManager | None = None,
    waits: bool = False,
    device: torch.device | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Train ``recipe`` and write weights and result to ``runs/`` in ``directory``; return the result.

    A checkpoint is kept there during the training, and the same call resumes from it. A run that has a result is not
    trained again, nor is one whose failure is in the directory's comparison. ``tick`` is called after each step.

    Errors of this package or of a plugin's code and a lack of memory are the outcome, as text, and are written to the
    comparison; others are raised. Several processes may make the same call: one of them trains, and the others get
    :class:`Elsewhere`, or with ``waits`` the result once it is there. In a process group rank 0 writes.
    """
    with claimed(directory, recipe.name, waits=waits) as is_ours:
        if not is_ours:
            return Elsewhere.RUNNING
        result = directory / RUNS / f"{recipe.name}.json"
        if distributed.broadcast(str(result.exists())) == str(True):
            return read_run(result)
        if failure := distributed.broadcast(_failures(directory).get(recipe.name, "")):
            return failure
        unfinished = checkpoint_of(directory, recipe.name)
        try:
            return _trained(recipe, data, directory, unfinished, pm, device, tick)
        except TrainingDiverged as error:
            if distributed.rank() == 0:
                unfinished.unlink(missing_ok=True)  # it would only diverge again
            failure = str(error)
        except BonnQatError as error:
            failure = str(error)
        except Exception as error:
            if is_out_of_memory(error):
                failure = f"out of memory; try fewer jobs, or a batch_size below {recipe.batch_size}"
            elif isinstance(error, OSError) or is_disconnection(error) or not (plugin := plugins.culprit(error, pm)):
                raise
            else:
                failure = plugin
        if distributed.rank() == 0:
            note_failure(directory, recipe.name, failure)
        return failure


def checkpoint_of(directory: Path, name: str) -> Path:
    """Where the run of that name keeps its checkpoint."""
    return directory / RUNS / f"{name}.unfinished.safetensors"


def lock_of(directory: Path, name: str) -> Path:
    """The lock that the process holds which trains the run of that name."""
    return directory / RUNS / f".{name}.lock"


def whole_comparison(directory: Path) -> contextlib.AbstractContextManager[bool]:
    """Hold the lock under which the comparison in ``directory`` is read and written."""
    return locked(directory / ".comparison.lock", waits=True)


@contextlib.contextmanager
def claimed(directory: Path, name: str, *, waits: bool = False) -> Iterator[bool]:
    """Whether this process, or its process group, holds the lock of the run; rank 0 takes it for the group."""
    path = lock_of(directory, name)
    with contextlib.ExitStack() as stack:
        is_ours = True
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_ours = stack.enter_context(locked(path, waits=waits))
        yield distributed.broadcast(str(is_ours)) == str(True)
        # Whoever still waits for this lock finds the run finished; the lock of an unfinished run stays.
        if distributed.rank() == 0 and is_ours and (directory / RUNS / f"{name}.json").exists():
            path.unlink(missing_ok=True)


def is_held(directory: Path, name: str) -> bool:
    """Whether another process is training the run of that name."""
    path = lock_of(directory, name)
    if not path.exists():
        return False
    with locked(path, waits=False) as is_free:
        return not is_free


def is_over(directory: Path, name: str) -> bool:
    """Whether the run of that name has a result, or a failure in the comparison in ``directory``."""
    return (directory / RUNS / f"{name}.json").exists() or name in _failures(directory)


def note_failure(directory: Path, name: str, why: str) -> None:
    """Write the failure of a run to the comparison in ``directory``, if there is one."""
    if not (directory / MANIFEST).exists():
        return
    with whole_comparison(directory):
        comparison = read_comparison(directory)
        write_manifest(replace(comparison, failures={**comparison.failures, name: why}))


def _failures(directory: Path) -> Mapping[str, str]:
    path = directory / MANIFEST
    failures: Mapping[str, str] = read_json(path)["failures"] if path.exists() else {}
    return failures


def _trained(
    recipe: Recipe,
    data: Data,
    directory: Path,
    unfinished: Path,
    pm: pluggy.PluginManager | None,
    device: torch.device | None,
    tick: Callable[[], None],
) -> RunResult:
    weights = directory / RUNS / f"{recipe.name}.safetensors"
    if distributed.rank() == 0:
        for path in (weights.with_suffix(".json"), weights, unfinished):
            remove_leftovers(path)
    model = build(recipe, data, pm)
    result = train(model, recipe, data, device=device, checkpoint=unfinished, tick=tick, pm=pm)
    if distributed.rank() == 0:
        write_tensors(weights, model.state_dict(), weights_header(recipe, data))
        write_run(directory, result)
        unfinished.unlink(missing_ok=True)
    return result
