"""Several runs at once: in processes once, as a user has it; otherwise in threads, for a process costs seconds."""

import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from torch import nn

from bonn_qat import hookimpl, hookspecs, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe, TrainingDiverged
from bonn_qat.scheme import Stage
from bonn_qat.studies import compare as comparing
from bonn_qat.studies import jobs, worker
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.training import data
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS

DEADLY = '''
import multiprocessing, os, signal
from bonn_qat import Regularizer, hookimpl

class Deadly(Regularizer):
    """Ends the process that it is in."""

    name = "deadly"

    def __init__(self, model, *, weight=1.0):
        super().__init__(model, weight=weight)

    def loss(self, step):
        os.kill(os.getpid(), signal.SIGKILL)

@hookimpl
def bonn_qat_regularizers():
    yield Deadly

@hookimpl
def bonn_qat_before_run():
    assert multiprocessing.parent_process() is None, "observers are called in the process that compares"
'''


class Observer:
    """Writes down what it is told of each run, and can do something at a moment."""

    def __init__(self, **moments: Any) -> None:
        self.seen: dict[str, list[str]] = {}
        self.models: dict[str, nn.Module] = {}
        self.moments = moments

    def note(self, recipe: Recipe, moment: str, told: str = "") -> None:
        self.seen.setdefault(recipe.name, []).append(moment + told)
        self.moments.get(moment, lambda recipe: None)(recipe)

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe) -> None:
        self.note(recipe, "before")

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: Recipe, epoch: int) -> None:
        self.note(recipe, "epoch", f" {epoch}")

    @hookimpl
    def bonn_qat_after_run(self, recipe: Recipe, result: Any) -> None:
        self.note(recipe, "after", "" if result else " nothing")


class ModelObserver(Observer):
    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe, model: nn.Module) -> None:
        super().bonn_qat_before_run(recipe)
        self.models[recipe.name] = model


class Bars:
    """A ``watch`` that counts the steps of each run and notes how its context is left."""

    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}
        self.ends: dict[str, str] = {}

    @contextlib.contextmanager
    def __call__(self, recipe: Recipe, steps: int) -> Iterator[Any]:
        self.steps[recipe.name] = 0, steps
        try:
            yield lambda: self.steps.update({recipe.name: (self.steps[recipe.name][0] + 1, steps)})
        except BaseException as error:
            self.ends[recipe.name] = type(error).__name__
            raise
        self.ends[recipe.name] = "done"


def _manager(*others: object) -> pluggy.PluginManager:
    pm = plugins.create_manager()
    for plugin in others:
        pm.register(plugin)
    return pm


# In processes


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same recipes with one job and with two, of which the second has one more, that is the end of its process."""
    place = tmp_path_factory.mktemp("jobs")
    digits = data.load("digits", train_images=32, test_images=16)
    tiny = Recipe(model="wrn10_16", epochs=2, batch_size=16, latents="0.01")
    recipes = [*comparing.plan(tiny, schemes=["bonn", "float"]), replace(tiny, scheme="xnor", lr=1e30)]
    deadly = replace(tiny, stages=(Stage(regularizers={"deadly": 1.0}),), seed=1)
    observer, bars = ModelObserver(), Bars()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        (place / "deadly_plugin.py").write_text(DEADLY)
        patch.syspath_prepend(place)
        module = importlib.import_module("deadly_plugin")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
        one = comparing.compare(recipes, digits, place / "one")
        torch.set_num_threads(threads)
        pm = _manager(observer, module)
        patch.chdir(place)
        two = comparing.compare([*recipes, deadly], digits, Path("two"), jobs=2, watch=bars, pm=pm)
        patch.setattr(jobs, "_Worker", None)
        again = comparing.compare(recipes[:2], digits, Path("two"), jobs=2)
    return SimpleNamespace(
        place=place, recipes=recipes, deadly=deadly.name, data=digits, one=one, two=two, again=again,
        observer=observer, bars=bars,
    )  # fmt: skip


def test_two_jobs_leave_the_files_of_one(compared: SimpleNamespace) -> None:
    one, two = compared.place / "one" / RUNS, compared.place / "two" / RUNS
    names = {path.name for path in one.glob("[!.]*")}
    # The run whose process died can go on from there.
    assert {path.name for path in two.glob("[!.]*")} == {*names, f"{compared.deadly}.unfinished.safetensors"}
    assert len(names) == 2 * len(compared.one.results) == 4
    for name in names:
        if name.endswith(".safetensors"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
        else:
            results = [{**json.loads((place / name).read_text()), "seconds": None} for place in (one, two)]
            assert results[0] == results[1]


def test_two_jobs_give_what_is_on_disk(compared: SimpleNamespace) -> None:
    assert read_comparison(compared.place / "two").results == compared.two.results
    assert [run.name for run in compared.two.results] == [run.name for run in compared.one.results]
    assert not compared.two.missing


def test_what_is_finished_needs_no_process(compared: SimpleNamespace) -> None:
    assert compared.again.results == compared.two.results


def test_a_run_that_fails_and_one_whose_process_dies_are_reported(compared: SimpleNamespace) -> None:
    (wild,) = compared.one.failures
    assert compared.two.failures[wild] == compared.one.failures[wild]
    assert compared.two.failures[compared.deadly] == (
        "its process ended: killed by SIGKILL, which may be for want of memory; try fewer jobs"
    )
    assert len(compared.two.failures) == 2


def test_observers_are_told_here_and_of_each_run_in_order(compared: SimpleNamespace) -> None:
    (wild,) = compared.one.failures
    whole = ["before", "epoch 1", "epoch 2", "after"]
    none = ["before", "after nothing"]
    finished = {result.name: whole for result in compared.one.results}
    assert compared.observer.seen == {**finished, wild: none, compared.deadly: none}


def test_an_observer_gets_a_copy_of_the_network_as_it_was_built(compared: SimpleNamespace) -> None:
    recipe = compared.recipes[0]
    built, copy = worker.build(recipe, compared.data).state_dict(), compared.observer.models[recipe.name].state_dict()
    assert built.keys() == copy.keys()
    assert all(torch.equal(built[name], copy[name]) for name in built)


def test_every_step_is_told_and_how_a_run_ended(compared: SimpleNamespace) -> None:
    (wild,) = compared.one.failures
    for result in compared.one.results:
        assert compared.bars.steps[result.name] == (4, 4)
        assert compared.bars.ends[result.name] == "done"
    assert compared.bars.ends[wild] == compared.bars.ends[compared.deadly] == "BonnQatError"


# In threads


class Thread(threading.Thread):
    """Stands in for a process: hears and tells the same through its end of the pipe."""

    exitcode: int | None = None

    def __init__(self, target: Any, args: tuple[Connection, int], name: str) -> None:
        connection, index = args
        self.connection = Connection(os.dup(connection.fileno()))
        super().__init__(target=target, args=(self.connection, index), name=name)

    def run(self) -> None:
        try:
            super().run()
            self.exitcode = 0
        except SystemExit as stop:
            self.exitcode = int(stop.code or 0)
        finally:
            self.connection.close()

    def kill(self) -> None:
        """Nothing: it ends with its pipe."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What happens in each of a run's three steps, by the run's seed, instead of training."""
    happens: dict[str, Any] = {}

    def train(model: nn.Module, recipe: Recipe, data: Any, *, tick: Any, pm: Any, **others: Any) -> tuple[str, str]:
        pm.hook.bonn_qat_before_run(recipe=recipe, model=model, run_id="x")
        report = None
        try:
            for epoch in (1, 2, 3):
                happens.get(recipe.seed, lambda tick: None)(tick)
                tick()
                pm.hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics={})
            report = {"name": recipe.name}
        finally:
            pm.hook.bonn_qat_after_run(recipe=recipe, result=report)
        return recipe.name, "finished"

    monkeypatch.setattr(jobs, "_CONTEXT", SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Thread))
    monkeypatch.setattr(jobs, "_cores", lambda: 2 * torch.get_num_threads())
    monkeypatch.setattr(jobs, "_SECONDS_TO_STOP", 60.0)
    monkeypatch.setattr(worker, "_SECONDS_BETWEEN_TICKS", 0.0)
    monkeypatch.setattr(worker, "build", lambda recipe, data, pm: nn.Linear(1, 1))
    monkeypatch.setattr(worker, "steps", lambda recipe, data: 3)
    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker, "write_tensors", lambda path, tensors, header: None)
    monkeypatch.setattr(worker, "write_run", lambda directory, result: None)
    return happens


DATA = data.TensorData(
    "noise",
    *[(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))] * 2,
    classes=2, pad=0, flip=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of :func:`at_once` leave their locks in the working directory."""
    monkeypatch.chdir(tmp_path)


def at_once(
    count: int, pm: pluggy.PluginManager, *, watch: Any = None, data: Any = DATA
) -> Iterator[tuple[Recipe, worker.Outcome]]:
    recipes = [Recipe(seed=seed) for seed in range(count)]
    return jobs.at_once(recipes, data, Path("nowhere"), jobs=2, watch=watch or Bars(), pm=pm)


NAMES = [Recipe(seed=seed).name for seed in range(5)]
FINISHED = {name: (name, "finished") for name in NAMES}
WHOLE = ["before", "epoch 1", "epoch 2", "epoch 3", "after"]


def test_each_run_has_its_observers_and_its_bar(runs: dict[str, Any]) -> None:
    observer, bars = Observer(), Bars()
    outcomes = {recipe.name: outcome for recipe, outcome in at_once(5, _manager(observer), watch=bars)}
    assert outcomes == FINISHED
    assert observer.seen == dict.fromkeys(NAMES, WHOLE)
    assert bars.steps == dict.fromkeys(NAMES, (3, 3))
    assert bars.ends == dict.fromkeys(NAMES, "done")


def test_two_runs_go_on_at_once(runs: dict[str, Any]) -> None:
    together = threading.Barrier(2, timeout=30)
    runs[0] = runs[1] = lambda tick: together.wait()
    assert len(list(at_once(2, _manager()))) == 2


def _dies(tick: Any) -> None:
    sys.exit(-9)


def test_another_process_takes_the_place_of_one_that_dies(runs: dict[str, Any]) -> None:
    observer, bars = Observer(), Bars()
    runs[0] = runs[1] = runs[2] = _dies
    outcomes = {recipe.name: outcome for recipe, outcome in at_once(5, _manager(observer), watch=bars)}
    assert [name for name in NAMES if "killed by SIGKILL" in str(outcomes[name])] == NAMES[:3]
    assert all(outcomes[name] == FINISHED[name] for name in NAMES[3:])
    assert [observer.seen[name] for name in NAMES] == [["before", "after nothing"]] * 3 + [WHOLE] * 2
    assert [bars.ends[name] for name in NAMES] == ["BonnQatError"] * 3 + ["done"] * 2


LONG = 6000


def _goes_on(tick: Any) -> None:
    for _ in range(LONG):
        tick()
        time.sleep(0.01)


def _raise(error: BaseException) -> Any:
    def moment(recipe: Recipe) -> None:
        raise error

    return moment


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_what_stops_the_observer_stops_all_runs_after_a_step(runs: dict[str, Any], error: BaseException) -> None:
    observer, bars = Observer(epoch=_raise(error)), Bars()
    begun = threading.Event()

    def goes_on(tick: Any) -> None:
        begun.set()
        _goes_on(tick)

    runs[0], runs[1] = lambda tick: begun.wait(30), goes_on
    with pytest.raises(type(error)):
        list(at_once(3, _manager(observer), watch=bars))
    assert bars.steps[NAMES[1]][0] < LONG
    assert {name: seen[-1] for name, seen in observer.seen.items()} == dict.fromkeys(NAMES[:2], "after nothing")
    assert bars.ends == dict.fromkeys(NAMES[:2], type(error).__name__)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Thread)]


def test_closing_stops_what_is_under_way(runs: dict[str, Any]) -> None:
    observer = Observer()
    runs[1] = _goes_on
    outcomes = at_once(2, _manager(observer))
    assert next(outcomes)[0].name == NAMES[0]
    outcomes.close()
    assert observer.seen[NAMES[0]] == WHOLE
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Thread)]


def test_what_is_no_error_of_a_run_is_raised_here(runs: dict[str, Any]) -> None:
    def full(tick: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    observer = Observer()
    runs[0], runs[1] = full, _goes_on
    with pytest.raises(OSError, match="No space left") as raised:
        list(at_once(3, _manager(observer)))
    assert raised.value.errno == errno.ENOSPC
    assert "in full" in raised.value.__notes__[0]
    assert {name: seen[-1] for name, seen in observer.seen.items()} == dict.fromkeys(NAMES[:2], "after nothing")


def test_an_error_that_cannot_be_sent_is_told_in_words(runs: dict[str, Any]) -> None:
    class Local(Exception):
        pass

    def fails(tick: Any) -> None:
        raise Local("of its own")

    runs[0] = fails
    with pytest.raises(RuntimeError, match="Local: of its own"):
        list(at_once(1, _manager()))


@pytest.mark.parametrize("error", [TrainingDiverged("nan"), torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_a_failed_run_fails_alone(runs: dict[str, Any], error: Exception) -> None:
    def fails(tick: Any) -> None:
        raise error

    runs[0] = fails
    outcomes = {recipe.name: outcome for recipe, outcome in at_once(3, _manager())}
    assert outcomes.pop(NAMES[0]) in ("nan", "out of memory; try fewer jobs, or a batch_size below 64")
    assert outcomes == {name: FINISHED[name] for name in NAMES[1:3]}


def test_a_process_that_does_not_begin_is_an_error(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "work", lambda connection, index: sys.exit(1))
    words = r"ended before it began one \(exit code 1\); a script .* below `if __name__ == '__main__':`"
    with pytest.raises(BonnQatError, match=words):
        list(at_once(3, _manager()))


def test_there_are_no_jobs_within_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", "bonn-qat job 1")
    jobs.check_jobs(1)
    with pytest.raises(BonnQatError, match="in a process that is such a job itself"):
        jobs.check_jobs(2)


def test_less_than_one_job_is_an_error() -> None:
    with pytest.raises(InvalidRecipe, match="jobs is 0; allowed: at least 1"):
        jobs.check_jobs(0)


def test_the_cores_are_shared_as_threads(runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores in (1, 5):
        monkeypatch.setattr(jobs, "_cores", lambda cores=cores: cores)
        list(at_once(1, _manager()))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    list(at_once(1, _manager()))
    assert set_threads == [1, 2]


def test_what_cannot_be_sent_is_named(runs: dict[str, Any]) -> None:
    class Local:
        @hookimpl
        def bonn_qat_schemes(self) -> list[Any]:
            return []

    class LocalData:
        name = "local"

    with pytest.raises(InvalidData, match=r"the data 'local' cannot be sent to another process .* with jobs=1"):
        list(at_once(1, _manager(), data=LocalData()))
    pm = _manager()
    pm.register(Local(), name="mine")
    with pytest.raises(BonnQatError, match=r"the plugin 'mine' cannot be sent to another process .* with jobs=1"):
        list(at_once(1, pm))


def test_a_network_that_cannot_be_sent_fails_where_an_observer_asks_for_it(
    runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(1, 1)
    model.register_forward_hook(lambda module, inputs, output: None)
    monkeypatch.setattr(worker, "build", lambda recipe, data, pm: model)
    assert [outcome for _, outcome in at_once(1, _manager(Observer()))] == [FINISHED[NAMES[0]]]
    ((_, outcome),) = at_once(1, _manager(ModelObserver()))
    assert "Linear cannot be sent to an observer that asks for it" in str(outcome)


def test_every_moment_of_a_run_is_forwarded() -> None:
    moments = {name for name in vars(hookspecs) if name.startswith(("bonn_qat_before_", "bonn_qat_after_"))}
    moments -= {"bonn_qat_before_comparison", "bonn_qat_after_comparison"}
    assert moments == {name for name in vars(worker._Parent) if name.startswith("bonn_qat_")}


def test_data_are_the_same_after_they_were_sent(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(6):
        (tmp_path / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (40 * index, 0, 0)).save(tmp_path / "ab"[index % 2] / f"{index}.png")
    for one in (data.load("digits", train_images=5, test_images=2), data.load(str(tmp_path), size=8)):
        other = pickle.loads(pickle.dumps(one))
        batches = [list(part.train_batches(3, torch.Generator().manual_seed(0), augment=True)) for part in (one, other)]
        for pair in zip(*batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
