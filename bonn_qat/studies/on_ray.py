"""on_ray: the runs of a comparison as tasks of a Ray cluster; only this machine needs the results directory."""

import collections
import contextlib
import importlib.util
import logging
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pluggy
import torch

from bonn_qat import plugins
from bonn_qat.errors import BonnQatError, InvalidRecipe
from bonn_qat.files import plain
from bonn_qat.files.atomic import write_bytes
from bonn_qat.hookspecs import hookimpl
from bonn_qat.studies.jobs import check_plugins, pickled
from bonn_qat.studies.run import Outcome, checkpoint_of, claimed, is_over, note_failure, run
from bonn_qat.training.data import Data
from bonn_qat.training.network import build
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS

_ATTEMPTS = 4  # with a worker that is lost each time, after which a run has failed
_SECONDS_BETWEEN_LOOKS = 0.5
_CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """A Ray cluster, and what each run takes of it.

    ``address`` is ``HOST:PORT``, ``auto`` for the cluster that this machine is a node of, or ``local`` for one that is
    started on this machine. A run has ``cores`` threads and ``gpus`` GPUs, which may be a fraction; by default one
    where the cluster has GPUs. Raises InvalidRecipe for less than one core or a negative number of GPUs, BonnQatError
    without Ray.

    >>> RayCluster(address="head-node:6379", cores=4, gpus=0.5)  # doctest: +SKIP
    """

    address: str = "auto"
    cores: int = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.cores < 1:
            raise InvalidRecipe(f"a run on Ray has {self.cores} cores; allowed: at least 1")
        if self.gpus is not None and self.gpus < 0:
            raise InvalidRecipe(f"a run on Ray has {self.gpus:g} GPUs; allowed: at least 0")
        if not _is_installed():
            raise BonnQatError("runs on a cluster need Ray: pip install 'bonn-qat[ray]'")


def _is_installed() -> bool:
    return importlib.util.find_spec("ray") is not None


def on_ray(
    recipes: Sequence[Recipe],
    data: Data,
    directory: Path,
    *,
    cluster: RayCluster,
    pm: pluggy.PluginManager,
    waits: bool = False,
) -> None:
    """As ``bonn_qat.studies.run.in_turn``, with each run as a task of its own; bonn-qat is installed on each node.

    The data are put into Ray's object store once. Checkpoints come back as they are written, so a run whose worker or
    node is lost resumes from the last one on another; results and weights come back at the end. Observers are called
    here. An interruption stops the tasks after their step, with a checkpoint.

    Raises BonnQatError if the cluster cannot be reached, if a plugin that does more than observe is not an installed
    one, or if the data cannot be pickled.
    """
    check_plugins(pm, observers=False)
    with _connected(cluster) as ray:
        driver = _Driver(ray, data, directory, cluster, pm)
        left: Sequence[Recipe] = recipes
        for waits_now in (False, True) if waits else (False,):
            left = driver.run(left, waits=waits_now)


@final
class _Driver:
    """Submits runs, writes what comes back, and calls the observers."""

    def __init__(self, ray: Any, data: Data, directory: Path, cluster: RayCluster, pm: pluggy.PluginManager) -> None:
        self._ray, self._data, self._directory, self._pm = ray, data, directory, pm
        self._models = any("model" in hook.argnames for hook in pm.hook.bonn_qat_before_run.get_hookimpls())
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._inbox = ray.util.queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        gpus = cluster.gpus if cluster.gpus is not None else float(ray.cluster_resources().get("GPU", 0) > 0)
        self._task = ray.remote(_train)
        self._options = {"num_cpus": cluster.cores, "num_gpus": gpus, "max_retries": 0}
        self._common = ray.put(pickled(data, plugins.entry_points(pm), cluster.cores))
        self._recipes: dict[str, Recipe] = {}
        self._observed: set[str] = set()

    def run(self, recipes: Iterable[Recipe], *, waits: bool) -> list[Recipe]:
        """Run what nobody else is at; returns the others."""
        elsewhere = []
        running: dict[Any, str] = {}
        claims: dict[str, contextlib.ExitStack] = {}
        lost: collections.Counter[str] = collections.Counter()
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop, running)
            for recipe in recipes:
                claims[recipe.name] = claim = stack.enter_context(contextlib.ExitStack())
                if not claim.enter_context(claimed(self._directory, recipe.name, waits=waits)):
                    elsewhere.append(recipe)
                elif is_over(self._directory, recipe.name):
                    claim.close()
                else:
                    self._recipes[recipe.name] = recipe
                    running[self._submit(recipe.name)] = recipe.name
            while running:
                ended, _ = self._ray.wait(list(running), timeout=_SECONDS_BETWEEN_LOOKS)
                self._take()
                for task in ended:
                    name = running.pop(task)
                    try:
                        self._finish(name, *self._ray.get(task))
                    except self._ray.exceptions.RayTaskError as error:
                        raise error.cause from error
                    except self._ray.exceptions.RayError as error:
                        lost[name] += 1
                        self._take()  # it may have sent a checkpoint meanwhile
                        if lost[name] < _ATTEMPTS:
                            running[self._submit(name)] = name
                            continue
                        self._forget(name)
                        words = " ".join(str(error).split("\n")[0].split())
                        note_failure(self._directory, name, f"its worker was lost {_ATTEMPTS} times: {words}")
                    claims[name].close()
        return elsewhere

    def _submit(self, name: str) -> Any:
        path = checkpoint_of(self._directory, name)
        checkpoint = None
        if path.exists():
            with plain.open_regular(path) as file:
                checkpoint = file.read()
        task = self._task.options(name=name, **self._options)
        return task.remote(self._recipes[name], self._common, checkpoint, self._inbox)

    def _take(self) -> None:
        for name, kind, content in self._inbox.get_nowait_batch(self._inbox.size()):
            if kind == _CHECKPOINT:
                write_bytes(checkpoint_of(self._directory, name), content)
            else:
                self._tell(name, kind, content)

    def _tell(self, name: str, hook: str, arguments: dict[str, Any]) -> None:
        recipe = self._recipes[name]
        self._observed.add(name)
        if hook == "bonn_qat_before_run":
            arguments["model"] = build(recipe, self._data, self._pm) if self._models else None
        if hook == "bonn_qat_after_run":
            self._observed.remove(name)
        getattr(plugins.Observers(self._pm), hook)(recipe=recipe, **arguments)

    def _finish(self, name: str, outcome: Outcome, files: Mapping[str, bytes], keeps_checkpoint: bool) -> None:
        for file, content in files.items():
            write_bytes(self._directory / RUNS / file, content)
        if not keeps_checkpoint:
            checkpoint_of(self._directory, name).unlink(missing_ok=True)
        if isinstance(outcome, str):
            note_failure(self._directory, name, outcome)

    def _forget(self, name: str) -> None:
        """Tell the observers that a run that they know of has no result."""
        if name in self._observed:
            self._tell(name, "bonn_qat_after_run", {"result": None})

    def _stop(self, running: dict[Any, str]) -> None:
        """Let the tasks stop after their step, and take their checkpoints."""
        if not running:
            return
        for task in running:
            self._ray.cancel(task, recursive=False)  # what it has put into the inbox stays
        self._ray.wait(list(running), num_returns=len(running))
        self._take()
        for name in running.values():
            self._forget(name)


def _train(recipe: Recipe, common: bytes, checkpoint: bytes | None, inbox: Any) -> tuple[Any, ...]:
    """The task: the outcome of the run, its files by name, and whether its checkpoint is of use still."""
    data, names, cores = pickle.loads(common)
    torch.set_num_threads(cores)
    pm = plugins.create_manager(entry_points=names, observes=False)
    pm.observes = True  # of the observers, the reporter alone
    with tempfile.TemporaryDirectory(prefix="bonn-qat-") as folder:
        directory = Path(folder)
        unfinished = checkpoint_of(directory, recipe.name)
        if checkpoint is not None:
            write_bytes(unfinished, checkpoint)
        reporter = _Reporter(recipe.name, unfinished, inbox)
        pm.register(reporter)
        try:
            outcome = run(recipe, data, directory, pm=pm, tick=reporter.tick)
        finally:
            reporter.tick()
        paths = [directory / RUNS / f"{recipe.name}{ending}" for ending in (".safetensors", ".json")]
        return outcome, {path.name: path.read_bytes() for path in paths if path.exists()}, unfinished.exists()


@final
class _Reporter:
    """The observer in a task: puts each new checkpoint and each moment of the run into the driver's inbox."""

    def __init__(self, name: str, checkpoint: Path, inbox: Any) -> None:
        self._name, self._checkpoint, self._inbox = name, checkpoint, inbox
        self._sent: int | None = None

    def tick(self) -> None:
        """Put the checkpoint there if there is a new one."""
        with contextlib.suppress(FileNotFoundError):
            written = self._checkpoint.stat().st_mtime_ns
            if written != self._sent:
                self._sent = written
                self._send(_CHECKPOINT, self._checkpoint.read_bytes())

    def _send(self, kind: str, content: Any) -> None:
        self._inbox.put((self._name, kind, content))  # returns when it is there

    @hookimpl
    def bonn_qat_before_run(self, run_id: str) -> None:
        self.tick()
        self._send("bonn_qat_before_run", {"run_id": run_id})

    @hookimpl
    def bonn_qat_after_epoch(self, epoch: int, metrics: Mapping[str, float], time: float) -> None:
        self.tick()
        self._send("bonn_qat_after_epoch", {"epoch": epoch, "metrics": metrics, "time": time})

    @hookimpl
    def bonn_qat_after_run(self, result: Mapping[str, Any] | None) -> None:
        self._send("bonn_qat_after_run", {"result": result})


@contextlib.contextmanager
def _connected(cluster: RayCluster) -> Iterator[Any]:
    """Ray, connected to the cluster for the block; a connection that there is already is used and left open."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.util.queue
    import ray.util.scheduling_strategies

    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BonnQatError(
            f"cannot reach the Ray cluster {cluster.address!r} ({' '.join(str(error).split())}); start one with "
            "`ray start --head` and name its HOST:PORT, or use local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
