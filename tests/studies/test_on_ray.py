"""Runs on a Ray cluster of two nodes on this machine, one of whose workers is killed."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch

from bonn_qat import hookimpl, plugins
from bonn_qat.errors import BonnQatError, InvalidRecipe
from bonn_qat.files.locks import locked
from bonn_qat.studies import compare as comparing
from bonn_qat.studies import on_ray
from bonn_qat.studies.comparison import Comparison, read_comparison
from bonn_qat.studies.on_ray import RayCluster
from bonn_qat.studies.run import checkpoint_of, lock_of
from bonn_qat.training import data
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS

NO_RAY = not on_ray._is_installed()
TINY = Recipe(model="wrn10_16", epochs=8, batch_size=16, latents="0.01")
RECIPES = comparing.plan(TINY, schemes=["float", "xnor", "bonn"], seeds=range(2))
# Those that are killed or interrupted after two epochs train for longer: the order comes back over some processes, and
# they must not be done when it arrives.
for _index in (0, 2):
    RECIPES[_index] = dataclasses.replace(RECIPES[_index], epochs=40)


class Observer:
    """Notes what it is told of each run, and does something at the second epoch of ``victim``, once."""

    def __init__(self, victim: Recipe, act: Any) -> None:
        self.victim, self.act = victim.name, act
        self.seen: dict[str, list[Any]] = {}
        self.models: dict[str, Any] = {}

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe, model: Any, run_id: str) -> None:
        self.seen.setdefault(recipe.name, []).append(run_id)
        self.models[recipe.name] = model

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: Recipe, epoch: int, time: float) -> None:
        self.seen[recipe.name].append((epoch, time))
        if (recipe.name, epoch) == (self.victim, 2) and self.act is not None:
            act, self.act = self.act, None
            act(recipe)

    @hookimpl
    def bonn_qat_after_run(self, recipe: Recipe, result: Any) -> None:
        self.seen[recipe.name].append("a result" if result else "nothing")


def _parent(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("PPid:"))


def _kill(recipe: Recipe) -> None:
    """Kill the worker process that trains it, a child of a node that this process has started."""
    title = f"ray::{recipe.name}".encode()
    workers: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # processes come and go
            process = int(path.parent.name)
            if path.read_bytes().startswith(title) and _parent(_parent(process)) == os.getpid():
                workers.append(process)
    (worker,) = workers
    os.kill(worker, signal.SIGKILL)


def _manager(observer: Observer) -> pluggy.PluginManager:
    pm = plugins.create_manager()
    pm.register(observer)
    return pm


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_images=64, test_images=16)


def _ports() -> dict[str, int]:
    """Free ports for a node's agents. Where Ray chooses them, a node waits 15 seconds for its agents and then ends."""
    names = ("dashboard_agent_listen_port", "runtime_env_agent_port", "metrics_agent_port", "metrics_export_port")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in names]
        return {name: found.getsockname()[1] for name, found in zip(names, sockets, strict=True)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    # On a busy machine nodes and agents answer late.
    os.environ |= {"RAY_agent_register_timeout_ms": "300000", "RAY_health_check_failure_threshold": "60"}
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_log_monitor": False}
    nodes = Cluster()
    nodes.add_node(**options, **_ports(), include_dashboard=False)
    nodes.add_node(**options, **_ports())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "_SECONDS_BETWEEN_LOOKS", 0.05)
        yield RayCluster(address=nodes.address)
    nodes.shutdown()


@pytest.fixture(scope="module")
def alone(digits: data.Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipes, one after another in this process."""
    place = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    comparing.compare(RECIPES, digits, place)
    torch.set_num_threads(threads)
    return place


def _assert_same(place: Path, alone: Path, found: Comparison) -> None:
    assert [result.name for result in found.results] == [recipe.name for recipe in RECIPES]
    assert not found.failures
    assert read_comparison(place).results == found.results
    names = {path.name for path in (alone / RUNS).glob("[!.]*")}
    assert {path.name for path in (place / RUNS).glob("[!.]*")} == names
    changing = dict.fromkeys(("seconds", "environment", "run_id", "started", "times"))
    for name in names:
        if name.endswith(".safetensors"):
            assert (place / RUNS / name).read_bytes() == (alone / RUNS / name).read_bytes(), name
        else:
            results = [json.loads((folder / RUNS / name).read_text()) | changing for folder in (place, alone)]
            assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason="needs ray")
@pytest.mark.filterwarnings("ignore")
def test_six_runs_on_two_nodes_are_the_sequential_ones_although_a_worker_is_killed(
    cluster: RayCluster, digits: data.Data, alone: Path, tmp_path: Path
) -> None:
    killed = RECIPES[2]
    observer = Observer(killed, _kill)
    found = comparing.compare(RECIPES, digits, tmp_path, ray=cluster, pm=_manager(observer))
    _assert_same(tmp_path, alone, found)
    for recipe in RECIPES:
        run_id, *epochs, end = observer.seen[recipe.name]
        assert end == "a result"
        assert isinstance(observer.models[recipe.name], torch.nn.Module)
        if recipe != killed:
            assert [epoch for epoch, _ in epochs] == list(range(1, recipe.epochs + 1))
    # The killed run was resumed: it has its number and the epochs from before.
    run_id, *seen, _ = observer.seen[killed.name]
    again = seen.index(run_id)
    assert again >= 2
    assert seen[again + 1 :][:again] == seen[:again]
    assert [epoch for epoch, _ in seen[again + 1 :]] == list(range(1, killed.epochs + 1))


@pytest.mark.slow
@pytest.mark.skipif(NO_RAY, reason="needs ray")
@pytest.mark.filterwarnings("ignore")
def test_an_interruption_brings_the_checkpoints_home_and_the_runs_go_on_without_ray(
    cluster: RayCluster, digits: data.Data, alone: Path, tmp_path: Path
) -> None:
    def stop(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    observer = Observer(RECIPES[0], stop)
    with pytest.raises(KeyboardInterrupt):
        comparing.compare(RECIPES, digits, tmp_path, ray=cluster, pm=_manager(observer))
    # A run on the other node may have ended before.
    ended = {name for name, seen in observer.seen.items() if seen[-1] == "a result"}
    assert {seen[-1] for name, seen in observer.seen.items() if name not in ended} == {"nothing"}
    assert RECIPES[0].name not in ended
    state = read_state(checkpoint_of(tmp_path, RECIPES[0].name)).progress
    assert (len(state.epochs), state.step) >= (2, 0)
    assert len(read_comparison(tmp_path).missing) == len(RECIPES) - len(ended)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _assert_same(tmp_path, alone, comparing.compare(RECIPES, digits, tmp_path))
    torch.set_num_threads(threads)


# Without a cluster


class Lost(Exception):
    """Stands in for Ray's error for a worker or node that is gone."""


class Failed(Lost):
    """Stands in for Ray's error for a task that raised one."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class Inbox:
    """Stands in for Ray's queue."""

    def __init__(self, actor_options: dict[str, Any]) -> None:
        self.messages: list[Any] = []

    def put(self, message: Any) -> None:
        self.messages.append(message)

    def size(self) -> int:
        return len(self.messages)

    def get_nowait_batch(self, count: int) -> list[Any]:
        return [self.messages.pop(0) for _ in range(count)]


class Here:
    """Stands in for Ray; the worker of a task is lost as often as ``losses`` says."""

    def __init__(self, losses: dict[str, int]) -> None:
        self.losses = losses
        self.checkpoints: list[tuple[str, bool]] = []  # of each task, whether it was given one
        self.cancelled: list[str] = []
        self.exceptions = SimpleNamespace(RayTaskError=Failed, RayError=Lost)
        strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: None)
        self.util = SimpleNamespace(scheduling_strategies=strategies, queue=SimpleNamespace(Queue=Inbox))

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=str)

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, function: Any) -> Any:
        def options(name: str, **others: Any) -> Any:
            return SimpleNamespace(remote=functools.partial(self.task, function, name))

        return SimpleNamespace(options=options)

    def task(self, function: Any, name: str, recipe: Recipe, common: Any, checkpoint: Any, inbox: Any) -> "Task":
        self.checkpoints.append((name, checkpoint is not None))

        def result() -> Any:
            if self.losses.get(name, 0):
                self.losses[name] -= 1
                inbox.put((name, "checkpoint", b"half"))
                inbox.put((name, "bonn_qat_before_run", {"run_id": "x"}))
                raise Lost(f"{name} is lost")
            try:
                return function(recipe, common, None, inbox)
            except Exception as error:
                raise Failed(error) from error

        return Task(name, result)

    def wait(self, tasks: list["Task"], **options: Any) -> tuple[list["Task"], list["Task"]]:
        tasks[0].end()
        return tasks[:1], tasks[1:]

    def get(self, task: "Task") -> Any:
        if task.error is not None:
            raise task.error
        return task.value

    def cancel(self, task: "Task", recursive: bool) -> None:
        self.cancelled.append(task.name)


class Task:
    """A task that is run here when one waits for it."""

    def __init__(self, name: str, result: Any) -> None:
        self.name, self._result = name, result
        self.value: Any = None
        self.error: Exception | None = None

    def end(self) -> None:
        try:
            self.value = self._result()
        except Exception as error:
            self.error = error


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    found = Here({})
    monkeypatch.setattr(on_ray, "_connected", lambda cluster: contextlib.nullcontext(found))
    monkeypatch.setattr(on_ray, "_is_installed", lambda: True)
    return found


SHORT = comparing.plan(Recipe(model="wrn10_16", epochs=1, batch_size=16), schemes=["bonn", "float"])


def test_a_run_whose_worker_is_lost_is_submitted_again_with_its_checkpoint_and_fails_in_the_end(
    here: Here, digits: data.Data, tmp_path: Path
) -> None:
    lost, fine = SHORT
    here.losses = {lost.name: 99, fine.name: 1}
    observer = Observer(lost, None)
    found = comparing.compare(SHORT, digits, tmp_path, ray=RayCluster(), pm=_manager(observer))
    assert [result.name for result in found.results] == [fine.name]
    assert found.failures == {lost.name: f"its worker was lost 4 times: {lost.name} is lost"}
    assert [given for name, given in here.checkpoints if name == lost.name] == [False, True, True, True]
    assert observer.seen[lost.name] == ["x", "x", "x", "x", "nothing"]
    assert checkpoint_of(tmp_path, lost.name).read_bytes() == b"half"
    assert not checkpoint_of(tmp_path, fine.name).exists()


def test_a_run_that_diverges_fails_alone_and_leaves_no_checkpoint(
    here: Here, digits: data.Data, tmp_path: Path
) -> None:
    wild = dataclasses.replace(SHORT[0], lr=1e30, scheme="xnor")
    found = comparing.compare([wild, SHORT[1]], digits, tmp_path, ray=RayCluster())
    assert "held NaN or infinity in step" in found.failures[wild.name]
    assert [result.name for result in found.results] == [SHORT[1].name]
    assert not checkpoint_of(tmp_path, wild.name).exists()


def test_an_error_of_a_task_stops_the_others_and_is_raised_here(
    here: Here, digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **others: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(on_ray, "run", full)
    with pytest.raises(OSError, match="No space left"):
        comparing.compare(SHORT, digits, tmp_path, ray=RayCluster())
    assert here.cancelled == [SHORT[1].name]


def test_runs_that_another_process_is_at_are_left_to_it(here: Here, digits: data.Data, tmp_path: Path) -> None:
    busy, free = SHORT
    lock_of(tmp_path, busy.name).parent.mkdir()
    with locked(lock_of(tmp_path, busy.name), waits=False):
        found = comparing.compare(SHORT, digits, tmp_path, ray=RayCluster())
    assert [result.name for result in found.results] == [free.name]
    assert found.elsewhere == [busy.name]
    again = comparing.compare(SHORT, digits, tmp_path, ray=RayCluster(), waits=True)
    assert not again.missing
    assert [name for name, _ in here.checkpoints] == [free.name, busy.name]


def test_jobs_and_ray_exclude_each_other(here: Here, digits: data.Data, tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="to Ray or to several processes here, not both"):
        comparing.compare(RECIPES, digits, tmp_path / "none", jobs=2, ray=RayCluster())
    assert not (tmp_path / "none").exists()


def test_what_a_run_takes_of_the_cluster_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "_is_installed", lambda: True)
    with pytest.raises(InvalidRecipe, match="a run on Ray has 0 cores; allowed: at least 1"):
        RayCluster(cores=0)
    with pytest.raises(InvalidRecipe, match="a run on Ray has -1 GPUs; allowed: at least 0"):
        RayCluster(gpus=-1)
    monkeypatch.setattr(on_ray, "_is_installed", lambda: False)
    with pytest.raises(BonnQatError, match=r"runs on a cluster need Ray: pip install 'bonn-qat\[ray\]'"):
        RayCluster()
