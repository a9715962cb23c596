"""Jobs: several processes on this machine that share the runs of a comparison, and how their plugins reach them."""

import collections
import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pluggy
import torch

from bonn_qat import distributed, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe
from bonn_qat.studies.comparison import PAGE
from bonn_qat.studies.run import in_turn, is_over, note_failure, whole_comparison
from bonn_qat.training.data import Data
from bonn_qat.training.recipe import Recipe

_NAME = "bonn-qat job"
_OBSERVERS = ("bonn_qat_before_", "bonn_qat_after_", "bonn_qat_describe")
_GUARD = "a script that compares with several jobs does so below `if __name__ == '__main__':`"
DEATHS = 2  # of its process, after which a run has failed
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


@dataclass(frozen=True)
class SentPlugins:
    """A plugin manager in a form that can be pickled: installed plugins by name, the others as pickles."""

    installed: frozenset[str]
    others: Mapping[str, bytes]

    def manager(self, *, observers: bool = True) -> pluggy.PluginManager:
        """The plugin manager again; without ``observers`` none of its timeline hooks has an implementation."""
        pm = plugins.create_manager()
        for name, plugin in pm.list_name_plugin():
            if plugin is not None and name not in self.installed:
                pm.unregister(plugin)
        for name, pickled in self.others.items():
            plugin = pickle.loads(pickled)
            pm.register(importlib.import_module(plugin) if isinstance(plugin, str) else plugin, name=name)
        if not observers:
            for name, plugin in pm.list_name_plugin():
                if any(hook.name.startswith(_OBSERVERS) for hook in pm.get_hookcallers(plugin) or ()):
                    offers = SimpleNamespace(**_offers(pm, plugin))
                    pm.unregister(plugin)
                    pm.register(offers, name=name)
        return pm


def sent_plugins(pm: pluggy.PluginManager, *, observers: bool = True) -> SentPlugins:
    """``pm`` as it is sent to another process, without plugins that only observe unless ``observers``.

    Raises BonnQatError naming a plugin that cannot be pickled.
    """
    known = {name for name, _ in plugins.create_manager().list_name_plugin()}
    others = {}
    for name, plugin in pm.list_name_plugin():
        if plugin is None or name in known or not (observers or _offers(pm, plugin)):
            continue
        sent = plugin.__name__ if isinstance(plugin, ModuleType) else plugin
        others[name] = pickled(sent, BonnQatError, f"the plugin {name!r}")
    return SentPlugins(frozenset(name for name, plugin in pm.list_name_plugin() if plugin is not None), others)


def _offers(pm: pluggy.PluginManager, plugin: object) -> dict[str, object]:
    """The implementations of a plugin that do not observe, by the names of their hooks."""
    hooks = [hook for hook in pm.get_hookcallers(plugin) or () if not hook.name.startswith(_OBSERVERS)]
    return {hook.name: found.function for hook in hooks for found in hook.get_hookimpls() if found.plugin is plugin}


def pickled(thing: object, kind: type[BonnQatError], words: str) -> bytes:
    """The pickle of ``thing``. Raises ``kind`` saying that ``words`` cannot be sent."""
    try:
        return pickle.dumps(thing)
    except Exception as error:
        raise kind(
            f"{words} cannot be sent to another process ({error}); compare with jobs=1 and without Ray"
        ) from error


@dataclass(frozen=True)
class _Work:
    """What every job is given; ``around`` is the directory of the study that the comparison is a part of."""

    recipes: Sequence[Recipe]
    data: bytes
    directory: Path
    around: Path | None
    plugins: SentPlugins
    threads: int
    waits: bool


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
    """As :func:`bonn_qat.studies.run.in_turn`, in ``jobs`` processes that each take the next run that is free.

    The processes call the observers themselves. When one of them dies, another takes its place and resumes its run from
    the last checkpoint; a run whose process has died twice has failed. An interruption here, and an error in one
    process, stop them all after their step, with a checkpoint; so does the death of this process.

    Raises BonnQatError if a process does not start, or if the data or a plugin cannot be pickled.
    """
    work = _Work(
        recipes, pickled(data, InvalidData, f"the data {data.name!r}"), directory.resolve(),
        around and around.resolve(), sent_plugins(pm), max(1, _cores() // jobs), waits,
    )  # fmt: skip
    deaths: collections.Counter[int] = collections.Counter()
    # A file, for a start waits until the process has read what it is given, and that is after its imports.
    with tempfile.TemporaryDirectory(prefix="bonn-qat-") as folder, contextlib.ExitStack() as stack:
        path = Path(folder) / "work"
        path.write_bytes(pickle.dumps(work))
        running: list[_Job] = []
        stack.callback(_stop, running)
        for index in range(min(jobs, len(recipes))):
            running.append(_Job(index, path))
        while running:
            for job in _with_news(running):
                if job.hear():
                    continue
                running.remove(job)
                if why := job.death():
                    deaths[job.at] += 1
                    if deaths[job.at] == DEATHS:
                        note_failure(directory, recipes[job.at].name, f"its process ended: {why}")
                    if not all(is_over(directory, recipe.name) for recipe in recipes):
                        running.append(_Job(job.index, path))


class _Job:
    """A process, and the place of the run that it is at; -1 before the first."""

    def __init__(self, index: int, path: Path) -> None:
        self.index, self.at = index, -1
        self.connection, theirs = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_work, args=(path, index, theirs), name=f"{_NAME} {index}")
        with _without_interrupts():
            self.process.start()
        theirs.close()

    def hear(self) -> bool:
        """Take in the next message; False once the process has ended. Raises the error that ended it."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.connection.close()
            self.process.join()
            return False
        if isinstance(message, Exception):
            raise message
        self.at = message
        return True

    def death(self) -> str | None:
        """How the process died; None if it had nothing left to do. Raises BonnQatError if it did not begin."""
        code = self.process.exitcode
        if not code:
            return None
        if self.at < 0:
            raise BonnQatError(f"a process for runs ended before it began one ({_epitaph(code)}); {_GUARD}")
        return _epitaph(code)


def _work(path: Path, index: int, connection: multiprocessing.connection.Connection) -> None:
    """What a job does; it sends the place of each run that it begins, and the error that ends it."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with connection:
        try:
            work: _Work = pickle.loads(path.read_bytes())
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(work.threads)
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            pm = work.plugins.manager()
            with contextlib.ExitStack() as stack:
                for place in filter(None, (work.around, work.directory)):
                    with whole_comparison(work.directory):
                        recipes = list(work.recipes) if place == work.directory else []
                        plugins.Observers(pm).bonn_qat_before_comparison(directory=place, recipes=recipes)
                    stack.callback(plugins.Observers(pm).bonn_qat_after_comparison, directory=place, page=place / PAGE)
                in_turn(
                    work.recipes, pickle.loads(work.data), work.directory, pm=pm, waits=work.waits,
                    device=torch.device("cuda", index % gpus) if gpus else None,
                    begins=lambda recipe: connection.send(work.recipes.index(recipe)),
                )  # fmt: skip
        except Exception as error:
            with contextlib.suppress(OSError):
                connection.send(_portable(error))
            raise SystemExit(1) from None


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _with_news(running: Sequence[_Job]) -> list[_Job]:
    heard = multiprocessing.connection.wait([job.connection for job in running])
    return [job for job in running if job.connection in heard]


def _stop(running: Sequence[_Job]) -> None:
    """Let the processes stop after their step, with a checkpoint; a second interruption does not wait for them."""
    try:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.join()
    finally:
        for job in running:
            job.process.kill()
            job.process.join()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; those that are started within the block leave it to this one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # its start would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _portable(error: Exception) -> Exception:
    """``error`` with its traceback as a note, or a RuntimeError with its words if it cannot be pickled."""
    note = "in a process of a comparison:\n" + "".join(traceback.format_exception(error))
    error.add_note(note)
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    replacement = RuntimeError(f"{type(error).__name__}: {error}")
    replacement.add_note(note)
    return replacement


def _epitaph(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", which may be for want of memory; try fewer jobs" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"killed by {name}{memory}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
