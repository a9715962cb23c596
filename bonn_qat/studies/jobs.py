"""Jobs: processes on this machine that each train the next run of a comparison that no other has locked."""

import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pluggy
import torch

from bonn_qat import distributed, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe
from bonn_qat.files.atomic import write_text
from bonn_qat.studies.comparison import PAGE
from bonn_qat.studies.progress import EpochLines
from bonn_qat.studies.run import in_turn, is_over, note_failure, whole_comparison
from bonn_qat.training.data import Data
from bonn_qat.training.precision import SlowPrecision, warn_if_slow
from bonn_qat.training.recipe import Recipe

DEATHS = 2  # of the processes that train a run, after which it has failed
_NAME = "bonn-qat job"
_GUARD = "a script that compares with several jobs does so below `if __name__ == '__main__':`"
_RAISED, _OS_ERROR = 1, 74  # exit codes: Python's for any exception; sysexits' EX_IOERR for an OSError, see _train
# CUDA does not survive a fork, nor do the threads of OpenMP.
_CONTEXT = multiprocessing.get_context("spawn")


def check_jobs(jobs: int) -> None:
    """Raise InvalidRecipe for fewer than one job and for several in a process group, BonnQatError inside a job."""
    if jobs < 1:
        raise InvalidRecipe(f"jobs is {jobs}; allowed: at least 1")
    if jobs > 1 and distributed.world() > 1:
        raise InvalidRecipe(f"jobs is {jobs} where each run has {distributed.world()} processes; allowed: 1")
    if jobs > 1 and multiprocessing.current_process().name.startswith(_NAME):
        raise BonnQatError(f"jobs is {jobs} in a process that is such a job itself; {_GUARD}")


def check_plugins(pm: pluggy.PluginManager, *, observers: bool) -> None:
    """Raise BonnQatError for a plugin that other processes need and cannot load, as it is not installed.

    Plugins that only observe are not needed there unless ``observers``; EpochLines is built in.
    """
    loadable = {*plugins.DEFAULT_PLUGINS, *plugins.entry_points(pm)}
    for name, plugin in pm.list_name_plugin():
        hooks = [hook.name for hook in pm.get_hookcallers(plugin) or ()]
        needed = observers or not all(hook.startswith(plugins.OBSERVERS) for hook in hooks)
        if hooks and needed and name not in loadable and not isinstance(plugin, EpochLines):
            raise BonnQatError(
                f"the plugin {name!r} is registered in this process only; install it with an entry point, "
                "or compare with jobs=1 and without Ray"
            )


def pickled(data: Data, *others: Any) -> bytes:
    """The pickle of ``(data, *others)``. Raises InvalidData for data that cannot be pickled."""
    try:
        return pickle.dumps((data, *others))
    except Exception as error:
        raise InvalidData(
            f"the data {data.name!r} cannot be sent to another process ({error}); compare with jobs=1 and without Ray"
        ) from error


def at_once(
    recipes: Sequence[Recipe],
    data: Data,
    directory: Path,
    *,
    jobs: int,
    pm: pluggy.PluginManager,
    waits: bool = False,
    around: Path | None = None,
) -> None:
    """As ``bonn_qat.studies.run.in_turn``, in ``jobs`` processes that each take the next run that is free.

    Each process loads the installed plugins of ``pm`` and calls the observers itself. When one dies, another takes its
    place and resumes its run from the last checkpoint; a run whose process has died twice has failed. An exception in a
    process, an interruption of this one and its death stop them all after their step, with a checkpoint.

    Raises BonnQatError for an exception in a process, which has printed its traceback, but an OSError as it was there;
    InvalidData if the data cannot be pickled.
    """
    check_plugins(pm, observers=True)
    lines = any(isinstance(plugin, EpochLines) for plugin in pm.get_plugins())
    threads = max(1, _cores() // jobs)
    for precision in sorted({recipe.precision for recipe in recipes}):
        warn_if_slow(precision, distributed.device())
    work = pickled(data, recipes, directory, around, plugins.entry_points(pm), lines, threads, waits)
    deaths: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="bonn-qat-") as place, contextlib.ExitStack() as stack:
        folder = Path(place)
        # A file, for arguments would make each start wait until the process has imported everything.
        (folder / "work").write_bytes(work)
        running: dict[Any, tuple[int, Any]] = {}  # by what multiprocessing waits for: a job's number and its process
        stack.callback(_stop, running)
        for job in range(min(jobs, len(recipes))):
            _start(folder, job, running)
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                job, process = running.pop(sentinel)
                process.join()
                if process.exitcode == 0:
                    continue
                name = _name_of_run(folder / str(job), process.exitcode)
                deaths[name] += 1
                if deaths[name] == DEATHS:
                    note_failure(directory, name, f"its process ended: {_ending(process.exitcode)}")
                if not all(is_over(directory, recipe.name) for recipe in recipes):
                    _start(folder, job, running)


def _start(folder: Path, job: int, running: dict[Any, tuple[int, Any]]) -> None:
    (folder / str(job)).unlink(missing_ok=True)  # the note of the job's process that died
    process = _CONTEXT.Process(target=_train, args=(folder, job), name=f"{_NAME} {job}")
    with contextlib.ExitStack() as stack:
        # A terminal sends Ctrl-C to all its processes; those that are started here leave it to this one.
        if hasattr(signal, "pthread_sigmask"):
            multiprocessing.resource_tracker.ensure_running()  # its start would unblock the signal
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        process.start()
        running[process.sentinel] = job, process


def _train(folder: Path, job: int) -> None:
    """What a process does; its note in ``folder`` is the name of the run it is at, or the OSError that ended it."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    note = folder / str(job)
    warnings.simplefilter("ignore", SlowPrecision)  # the process that started this one has said it
    try:
        data, recipes, directory, around, names, lines, threads, waits = pickle.loads((folder / "work").read_bytes())
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        pm = plugins.create_manager(entry_points=names)
        if lines:
            pm.register(EpochLines())
        observers = plugins.Observers(pm)
        with contextlib.ExitStack() as stack:
            for place in filter(None, (around, directory)):
                with whole_comparison(directory):
                    planned = list(recipes) if place == directory else []
                    observers.bonn_qat_before_comparison(directory=place, recipes=planned)
                stack.callback(observers.bonn_qat_after_comparison, directory=place, page=place / PAGE)
            in_turn(
                recipes, data, directory, pm=pm, waits=waits,
                device=torch.device("cuda", job % gpus) if gpus else None,
                begins=lambda recipe: write_text(note, recipe.name),
            )  # fmt: skip
    except OSError as error:
        named = error.filename and str(error.filename)
        write_text(note, json.dumps([error.errno, error.strerror or str(error), named]))
        raise SystemExit(_OS_ERROR) from None


def _name_of_run(note: Path, code: int) -> str:
    """The run at which a process died. Raises what ended the process if that was an exception."""
    said = note.read_text() if note.exists() else None
    if said is None:
        raise BonnQatError(f"a process for runs ended before it began one ({_ending(code)}); {_GUARD}")
    if code == _OS_ERROR:
        raise OSError(*json.loads(said))
    if code == _RAISED:
        raise BonnQatError(f"{said}: an exception ended its process ({_ending(code)}); see the traceback above")
    return said


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(running: dict[Any, tuple[int, Any]]) -> None:
    """Let the processes stop after their step, with a checkpoint; a second interruption does not wait for them."""
    try:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _ending(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    memory = ", which may be for want of memory; try fewer jobs" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"killed by {signal.Signals(-code).name}{memory}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
