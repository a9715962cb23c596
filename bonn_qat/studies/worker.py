"""Worker: a run with its files, done here or by a process that gets its runs, and tells of them, through a pipe."""

import contextlib
import enum
import importlib
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, final

import pluggy
import torch
from torch import nn

from bonn_qat import distributed, plugins
from bonn_qat.errors import BonnQatError, InvalidModel, TrainingDiverged
from bonn_qat.files.atomic import remove_leftovers
from bonn_qat.files.locks import locked
from bonn_qat.files.tensors import write_tensors
from bonn_qat.hookspecs import hookimpl
from bonn_qat.training.data import Data
from bonn_qat.training.network import build, weights_header
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult, read_run, write_run
from bonn_qat.training.train import steps, train

Watch = Callable[[Recipe, int], contextlib.AbstractContextManager[Callable[[], None]]]


class Elsewhere(enum.Enum):
    """Another process is at the run."""

    RUNNING = enum.auto()


Outcome = RunResult | str | Elsewhere  # what a run gave, or why it failed

_SECONDS_BETWEEN_TICKS = 0.2


def run(
    recipe: Recipe,
    data: Data,
    directory: Path,
    *,
    watch: Watch,
    pm: pluggy.PluginManager | None,
    device: torch.device | None = None,
    built: Callable[[nn.Module], None] = lambda model: None,
    waits: bool = False,
) -> Outcome:
    """Train what ``recipe`` says and leave the weights and the result in ``directory``'s runs.

    A checkpoint is left there while the run goes on, from which the same call continues. ``watch(recipe, steps)`` is a
    context whose value is called after each step, and ``built`` gets the network before it is trained. Errors of the
    package's own, and a lack of memory, are the outcome; all others are raised. In a process group the first process
    writes.

    Several processes may make the same call: one is at the run, and to the others the outcome is :class:`Elsewhere`,
    or with ``waits`` the result that they wait for. What is finished is not run again.
    """
    with _claimed(directory / RUNS / f".{recipe.name}.lock", waits=waits) as is_ours:
        if not is_ours:
            return Elsewhere.RUNNING
        result = directory / RUNS / f"{recipe.name}.json"
        weights = result.with_name(f"{recipe.name}.safetensors")
        unfinished = result.with_name(f"{recipe.name}.unfinished.safetensors")
        try:
            if distributed.broadcast(str(result.exists())) == str(True):
                return read_run(result)
            if distributed.rank() == 0:
                for path in (result, weights, unfinished):
                    remove_leftovers(path)
            return _carried_out(recipe, data, directory, weights, unfinished, watch, pm, device, built)
        except TrainingDiverged as error:
            if distributed.rank() == 0:
                unfinished.unlink(missing_ok=True)  # it would only diverge again
            return str(error)
        except BonnQatError as error:
            return str(error)
        except (torch.OutOfMemoryError, MemoryError):
            return f"out of memory; try fewer jobs, or a batch_size below {recipe.batch_size}"


@contextlib.contextmanager
def _claimed(path: Path, *, waits: bool) -> Iterator[bool]:
    """Whether this process, or the group that it is of, holds the lock; the first process takes it for all."""
    with contextlib.ExitStack() as stack:
        is_ours = True
        if distributed.rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_ours = stack.enter_context(locked(path, waits=waits))
        yield distributed.broadcast(str(is_ours)) == str(True)
        # Whoever still waits for this file finds the run finished; one that is not keeps it.
        if distributed.rank() == 0 and is_ours and path.with_name(f"{path.stem[1:]}.json").exists():
            path.unlink(missing_ok=True)


def _carried_out(
    recipe: Recipe,
    data: Data,
    directory: Path,
    weights: Path,
    unfinished: Path,
    watch: Watch,
    pm: pluggy.PluginManager | None,
    device: torch.device | None,
    built: Callable[[nn.Module], None],
) -> RunResult:
    model = build(recipe, data, pm)
    built(model)
    with watch(recipe, steps(recipe, data)) as tick:
        result = train(model, recipe, data, device=device, checkpoint=unfinished, tick=tick, pm=pm)
    if distributed.rank() == 0:
        write_tensors(weights, model.state_dict(), weights_header(recipe, data))
        write_run(directory, result)
        unfinished.unlink(missing_ok=True)
    return result


class Plugin(NamedTuple):
    """A plugin as it is sent: its name, the module to import, "" for none, and its functions, pickled."""

    name: str
    module: str
    functions: bytes


class Task(NamedTuple):
    """What a worker is told once, before the data and the first recipe."""

    directory: Path
    working_directory: str
    threads: int
    plugins: list[Plugin]
    sends_models: bool
    waits: bool


def send(connection: Connection, *message: object) -> None:
    """Send by value: tensors sent as multiprocessing sends them would share memory that containers have little of."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> tuple[Any, ...]:
    """The next message; waits for it. Raises EOFError when there is nobody to send one."""
    message: tuple[Any, ...] = pickle.loads(connection.recv_bytes())
    return message


def work(connection: Connection, index: int) -> None:
    """Run recipes from ``connection`` until there is none any more; ``index`` chooses among several GPUs.

    In: a :class:`Task`, the data, then recipes; a message during a run, or an empty one, stops it all.
    Out: ``ready``; for each run ``begun`` with its steps, ``ticks`` with a number of them, ``hook`` with a name and
    arguments, and ``over`` with the outcome; or ``broken`` with the error that ended it all.
    """
    parent = _Parent(connection)
    with connection, contextlib.suppress(_Stopped):
        try:
            parent.send("ready")
            (task,) = parent.receive()
            os.chdir(task.working_directory)
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(task.threads)
            (data,) = parent.receive()
            pm = _manager(task.plugins, parent)
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            device = torch.device("cuda", index % gpus) if gpus else None
            keep = parent.keep if task.sends_models else lambda model: None
            while True:
                (recipe,) = parent.receive()
                outcome = run(
                    recipe, data, task.directory, watch=parent.watch, pm=pm, device=device, built=keep, waits=task.waits
                )
                parent.send("over", outcome)
        except Exception as error:
            parent.send("broken", _portable(error))


def _manager(sent: list[Plugin], observer: object) -> pluggy.PluginManager:
    manager = plugins.create_manager(entry_points=False)
    for plugin in sent:
        with contextlib.suppress(ImportError):  # then it has no functions here either, or unpickling them says so
            if plugin.module:
                importlib.import_module(plugin.module)
        functions = pickle.loads(plugin.functions)
        manager.register(SimpleNamespace(**{function.__name__: function for function in functions}), name=plugin.name)
    manager.register(observer)
    manager.check_pending()
    return manager


class _Stopped(BaseException):
    """The parent wants no more, or is gone."""


@final
class _Parent:
    """The other end of the pipe, and the observer that tells it what happens here."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._model: bytes | None = None

    def send(self, *message: object) -> None:
        try:
            send(self._connection, *message)
        except ConnectionError:
            raise _Stopped from None

    def receive(self) -> tuple[Any, ...]:
        try:
            message = receive(self._connection)
        except (EOFError, ConnectionError):
            message = ()
        if not message:
            raise _Stopped
        return message

    def keep(self, model: nn.Module) -> None:
        # Now, for once there is an Objective its hooks in the model cannot be pickled.
        try:
            self._model = pickle.dumps(model)
        except Exception as error:
            raise InvalidModel(
                f"{type(model).__name__} cannot be sent to an observer that asks for it ({error}); compare with jobs=1"
            ) from error

    @contextlib.contextmanager
    def watch(self, recipe: Recipe, steps: int) -> Iterator[Callable[[], None]]:
        self.send("begun", steps)
        count, told = 0, time.monotonic()

        def tick() -> None:
            nonlocal count, told
            count += 1
            if time.monotonic() - told >= _SECONDS_BETWEEN_TICKS:
                self.send("ticks", count)
                count, told = 0, time.monotonic()
                if self._connection.poll():
                    raise _Stopped

        yield tick
        self.send("ticks", count)

    @hookimpl
    def bonn_qat_before_run(self, run_id: str) -> None:
        self.send("hook", "bonn_qat_before_run", {"model": self._model, "run_id": run_id})

    @hookimpl
    def bonn_qat_after_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.send("hook", "bonn_qat_after_epoch", {"epoch": epoch, "metrics": metrics})

    @hookimpl
    def bonn_qat_after_run(self, result: Mapping[str, Any] | None) -> None:
        self.send("hook", "bonn_qat_after_run", {"result": result})


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note, or another in its place if it cannot be sent."""
    note = "in a process of a comparison:\n" + "".join(traceback.format_exception(error))
    error.add_note(note)
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    replacement = RuntimeError(f"{type(error).__name__}: {error}")
    replacement.add_note(note)
    return replacement
