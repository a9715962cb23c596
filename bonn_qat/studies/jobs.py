"""Jobs: the runs of a comparison, one after another here, or several at once, each of these in a process of its own."""

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, final

import pluggy

from bonn_qat import distributed, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe
from bonn_qat.studies.worker import Outcome, Plugin, Task, Watch, receive, run, send, work
from bonn_qat.training.data import Data
from bonn_qat.training.recipe import Recipe

_NAME = "bonn-qat job"
_SECONDS_TO_STOP = 10.0
_TIMELINE = ("bonn_qat_before_", "bonn_qat_after_", "bonn_qat_describe")  # what observers implement
_GUARD = "a script that compares with several jobs does so below `if __name__ == '__main__':`"
# CUDA does not survive a fork, nor do the threads of OpenMP.
_CONTEXT = multiprocessing.get_context("spawn")


def check_jobs(jobs: int) -> None:
    """Raise InvalidRecipe for less than one job and for several in a process group, BonnQatError for several in one."""
    if jobs < 1:
        raise InvalidRecipe(f"jobs is {jobs}; allowed: at least 1")
    if jobs > 1 and distributed.world() > 1:
        raise InvalidRecipe(f"jobs is {jobs} where each run has {distributed.world()} processes; allowed: 1")
    if jobs > 1 and multiprocessing.current_process().name.startswith(_NAME):
        raise BonnQatError(f"jobs is {jobs} in a process that is such a job itself; {_GUARD}")


def in_turn(
    recipes: Sequence[Recipe],
    data: Data,
    directory: Path,
    *,
    watch: Watch,
    pm: pluggy.PluginManager | None,
    waits: bool = False,
) -> Generator[tuple[Recipe, Outcome], None, None]:
    """Run one recipe after another in this process, each as :func:`bonn_qat.studies.worker.run`."""
    for recipe in recipes:
        yield recipe, run(recipe, data, directory, watch=watch, pm=pm, waits=waits)


def at_once(
    recipes: Sequence[Recipe],
    data: Data,
    directory: Path,
    *,
    jobs: int,
    watch: Watch,
    pm: pluggy.PluginManager | None,
    waits: bool = False,
) -> Generator[tuple[Recipe, Outcome], None, None]:
    """As :func:`in_turn`, but ``jobs`` at once and in the order in which they end.

    A process takes one run after another; the run of one that dies has failed, and another takes its place.
    ``watch`` and the observers of ``pm`` are called here. When the generator is closed or interrupted, the runs stop
    after the step that they are at.

    Raises BonnQatError if a process does not begin, or if the data or a plugin cannot be sent to it.
    """
    pm = pm or plugins.manager()
    task = Task(
        directory=directory.resolve(),
        working_directory=os.getcwd(),
        threads=max(1, _cores() // jobs),
        plugins=_sendable(pm),
        sends_models=any("model" in hook.argnames for hook in pm.hook.bonn_qat_before_run.get_hookimpls()),
        waits=waits,
    )
    first = [pickle.dumps((task,)), _pickled((data,), InvalidData, f"the data {data.name!r}")]
    waiting = collections.deque(recipes)
    workers: list[_Worker] = []
    ended: list[_Worker] = []
    try:
        while waiting or any(worker.recipe for worker in workers):
            starting = sum(worker.recipe is None for worker in workers)
            for _ in range(min(jobs - len(workers), len(waiting) - starting)):
                index = min(set(range(jobs)) - {worker.index for worker in workers})
                workers.append(_Worker(index, first, watch, pm))
            for worker in _with_news(workers):
                recipe, outcome = worker.recipe, worker.hear()
                if worker.free and waiting:
                    worker.give(waiting.popleft())
                elif worker.free or worker.dead:
                    workers.remove(worker)
                    worker.connection.close()
                    ended.append(worker)
                if recipe is not None and outcome is not None:
                    yield recipe, outcome
    finally:
        _stop(workers, ended)


@final
class _Worker:
    """A process, and what is known here of the run in it."""

    def __init__(self, index: int, first: Sequence[bytes], watch: Watch, pm: pluggy.PluginManager) -> None:
        self.index, self._first, self._watch, self._hook = index, first, watch, pm.hook
        self.recipe: Recipe | None = None
        self.free = self.dead = False
        self._observed = False
        self._watched = contextlib.ExitStack()
        self._tick: Callable[[], None] = lambda: None
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=work, args=(theirs, index), name=f"{_NAME} {index}")
        with _without_interrupts():
            self._process.start()
        theirs.close()

    def give(self, recipe: Recipe) -> None:
        """Let the process, which is free, run ``recipe``."""
        self.recipe, self.free = recipe, False
        with contextlib.suppress(ConnectionError):  # it died: the next that is heard
            send(self.connection, recipe)

    def hear(self) -> Outcome | None:
        """Take in what the process tells next; gives the outcome when with that its run is over."""
        try:
            message = receive(self.connection)
        except (EOFError, OSError):
            self.dead = True
            self._process.join()
            words = _epitaph(self._process.exitcode)
            if self.recipe is None:
                raise BonnQatError(f"a process for runs ended before it began one ({words}); {_GUARD}") from None
            return self._end(f"its process ended: {words}")
        return self._take(message)

    def _take(self, message: tuple[Any, ...]) -> Outcome | None:
        match message:
            case ("ready",):
                self.free = True
                with contextlib.suppress(ConnectionError):
                    for part in self._first:
                        self.connection.send_bytes(part)
            case ("begun", steps):
                assert self.recipe is not None
                self._tick = self._watched.enter_context(self._watch(self.recipe, steps))
            case ("ticks", count):
                for _ in range(count):
                    self._tick()
            case ("hook", name, arguments):
                self._call(name, arguments)
            case ("over", outcome):
                self.free = True
                return self._end(outcome)
            case ("broken", error):
                raise error
        return None

    def _call(self, name: str, arguments: dict[str, Any]) -> None:
        if name == "bonn_qat_before_run" and arguments["model"] is not None:
            arguments["model"] = pickle.loads(arguments["model"])
        self._observed = name != "bonn_qat_after_run"
        getattr(self._hook, name)(recipe=self.recipe, **arguments)

    def _end(self, outcome: Outcome) -> Outcome:
        if isinstance(outcome, str):
            error = BonnQatError(outcome)
            self._watched.__exit__(type(error), error, None)
        else:
            self._watched.close()
        self._forget()
        return outcome

    def _forget(self) -> None:
        if self._observed:
            self._call("bonn_qat_after_run", {"report": None})
        self.recipe = None

    def ask_to_stop(self) -> None:
        """Let the run stop after its step; a process that has none yet is killed."""
        if self.recipe is None:
            self._process.kill()
        with contextlib.suppress(ConnectionError):
            send(self.connection)

    def drain(self, deadline: float) -> None:
        """Take in what a process that was asked to stop still tells, until ``deadline`` (monotonic seconds)."""
        # What fails now must not hide why all stops.
        with contextlib.suppress(Exception, KeyboardInterrupt):
            while self.recipe is not None and self.connection.poll(max(0.0, deadline - time.monotonic())):
                self._take(receive(self.connection))
        with contextlib.suppress(Exception, KeyboardInterrupt):
            self._watched.__exit__(*sys.exc_info())
            self._forget()

    def end(self, deadline: float) -> None:
        """Wait for the process to end, and make it end at ``deadline``."""
        self.connection.close()
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


def _with_news(workers: Sequence[_Worker]) -> list[_Worker]:
    heard = multiprocessing.connection.wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in heard]


def _stop(workers: Sequence[_Worker], ended: Sequence[_Worker]) -> None:
    deadline = time.monotonic() + _SECONDS_TO_STOP
    try:
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            worker.drain(deadline)
    finally:
        for worker in (*workers, *ended):
            worker.end(deadline)


def _sendable(pm: pluggy.PluginManager) -> list[Plugin]:
    """What plugins offer and decide; what they observe is called here."""
    sent = []
    for name, plugin in pm.list_name_plugin():
        if plugin is None or name in plugins.DEFAULT_PLUGINS:
            continue
        hooks = [hook for hook in pm.get_hookcallers(plugin) or () if not hook.name.startswith(_TIMELINE)]
        functions = [found.function for hook in hooks for found in hook.get_hookimpls() if found.plugin is plugin]
        # A module is sent for what its import alone does, such as offering networks to timm.
        module = plugin.__name__ if isinstance(plugin, ModuleType) else ""
        if functions or module:
            sent.append(Plugin(name, module, _pickled(functions, BonnQatError, f"the plugin {name!r}")))
    return sent


def _pickled(thing: object, kind: type[BonnQatError], words: str) -> bytes:
    try:
        return pickle.dumps(thing)
    except Exception as error:
        raise kind(f"{words} cannot be sent to another process ({error}); compare with jobs=1") from error


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal: those that are started within leave it to this one."""
    here = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if here else None
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGINT, before)


def _epitaph(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", which may be for want of memory; try fewer jobs" if -code == getattr(signal, "SIGKILL", None) else ""
    return f"killed by {name}{memory}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
