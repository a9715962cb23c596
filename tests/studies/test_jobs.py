"""Several runs at once: in processes once, as a user has it; otherwise in threads, for a process costs seconds."""

import contextlib
import errno
import functools
import importlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bonn_qat import hookimpl, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe, TrainingDiverged
from bonn_qat.scheme import Stage
from bonn_qat.studies import compare as comparing
from bonn_qat.studies import jobs
from bonn_qat.studies import run as running
from bonn_qat.studies.comparison import PAGE, Comparison, read_comparison, write_manifest
from bonn_qat.studies.progress import EpochLines
from bonn_qat.training import data
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS

PLUGIN = '''
import multiprocessing, os, signal
from pathlib import Path
from bonn_qat import Regularizer, hookimpl

HERE = Path(__file__).parent

class Deadly(Regularizer):
    """Ends the process that it is in, in the second epoch; with weight 2 only once, otherwise again and again."""

    name = "deadly"

    def __init__(self, model, *, weight=1.0):
        super().__init__(model, weight=weight)
        self.steps = 0

    def loss(self, step):
        self.steps += 1
        mark = HERE / f"died{self.weight:g}"
        if not mark.exists() if self.steps == 3 else self.weight == 1 and mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 0 * step.targets.float().sum()

@hookimpl
def bonn_qat_regularizers():
    yield Deadly

def note(recipe, *words):
    with (HERE / "notes").open("a") as file:
        print(os.getpid(), recipe.name, *words, file=file)

@hookimpl
def bonn_qat_before_run(recipe, model):
    assert multiprocessing.parent_process() is not None, "observers are called in the process that trains"
    note(recipe, "before", sum(parameter.numel() for parameter in model.parameters()))

@hookimpl
def bonn_qat_after_epoch(recipe, epoch):
    note(recipe, "epoch", epoch)

@hookimpl
def bonn_qat_after_run(recipe, result):
    note(recipe, "after", "a result" if result else "nothing")
'''


def _install(patch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    """Install a plugin for this process and those that it starts: a module and its distribution on the path."""
    (folder / f"{name}_plugin.py").write_text(source)
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}_plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bonn_qat]\n{name} = {name}_plugin\n")
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    patch.setenv("BONN_QAT_PLUGINS", name, prepend=",")
    patch.setattr(plugins, "manager", functools.cache(plugins.create_manager))


# In processes


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same recipes with one job and with two; of the latter two more end their processes, one of them always."""
    place = tmp_path_factory.mktemp("jobs")
    digits = data.load("digits", train_images=32, test_images=16)
    tiny = Recipe(model="wrn10_16", epochs=2, batch_size=16, latents="0.01")
    wild = replace(tiny, scheme="xnor", lr=1e30)
    once, deadly = (
        replace(tiny, stages=(Stage(regularizers={"deadly": weight}),), seed=int(weight)) for weight in (2.0, 1.0)
    )
    recipes = [*comparing.plan(tiny, schemes=["bonn", "float"]), wild]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        patch.setattr(comparing, "write_report", lambda comparison: comparison.directory / PAGE)  # it costs seconds
        _install(patch, place, "deadly", PLUGIN)
        module = importlib.import_module("deadly_plugin")
        patch.chdir(place)
        two = comparing.compare([once, *recipes, deadly], digits, Path("two"), jobs=2)
        patch.setattr(module, "note", lambda *words: None)
        patch.setattr(multiprocessing, "parent_process", lambda: "itself")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
        one = comparing.compare(
            [once, *recipes], digits, place / "one", pm=plugins.create_manager()
        )  # it has died already
        torch.set_num_threads(threads)
        patch.setattr(jobs, "_start", None)
        again = comparing.compare(recipes[:2], digits, Path("two"), jobs=2)
    notes: dict[str, list[str]] = {}
    pids = set()
    for line in (place / "notes").read_text().splitlines():
        pid, name, note = line.split(" ", 2)
        notes.setdefault(name, []).append(note)
        pids.add(int(pid))
    return SimpleNamespace(
        place=place, recipes=recipes, once=once.name, deadly=deadly.name, wild=wild.name, one=one, two=two, again=again,
        notes=notes, pids=pids,
    )  # fmt: skip


def test_two_jobs_leave_the_files_of_one(compared: SimpleNamespace) -> None:
    one, two = compared.place / "one" / RUNS, compared.place / "two" / RUNS
    names = {path.name for path in one.glob("[!.]*")}
    # The run whose process died twice can be resumed.
    assert {path.name for path in two.glob("[!.]*")} == {*names, f"{compared.deadly}.unfinished.safetensors"}
    assert len(names) == 2 * len(compared.one.results) == 6
    changing = dict.fromkeys(("seconds", "run_id", "started", "times"))
    for name in names:
        if name.endswith(".safetensors"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
        else:
            results = [json.loads((place / name).read_text()) | changing for place in (one, two)]
            assert results[0] == results[1]


def test_two_jobs_give_what_is_on_disk(compared: SimpleNamespace) -> None:
    assert read_comparison(compared.place / "two").results == compared.two.results
    assert [run.name for run in compared.two.results] == [run.name for run in compared.one.results]
    assert not compared.two.missing
    assert not compared.two.elsewhere


def test_what_is_finished_needs_no_process(compared: SimpleNamespace) -> None:
    assert {run.name for run in compared.again.results} == {run.name for run in compared.two.results}


def test_a_run_that_fails_and_one_whose_process_dies_twice_are_reported(compared: SimpleNamespace) -> None:
    assert compared.two.failures[compared.wild] == compared.one.failures[compared.wild]
    assert compared.two.failures[compared.deadly] == (
        "its process ended: killed by SIGKILL, which may be for want of memory; try fewer jobs"
    )
    assert len(compared.two.failures) == 2


def test_observers_are_told_in_the_process_that_trains_and_of_each_run_in_order(compared: SimpleNamespace) -> None:
    assert os.getpid() not in compared.pids
    assert len(compared.pids) >= 3
    before = {name: notes[0] for name, notes in compared.notes.items()}
    assert all(note.startswith("before ") and int(note.split()[1]) > 1e4 for note in before.values())
    whole = ["epoch 1", "epoch 2", "after a result"]
    for result in compared.one.results:
        if result.name != compared.once:
            assert compared.notes[result.name] == [before[result.name], *whole]
    assert compared.notes[compared.wild] == [before[compared.wild], "after nothing"]


def test_a_run_whose_process_died_is_resumed_from_its_checkpoint(compared: SimpleNamespace) -> None:
    before = compared.notes[compared.once][0]
    # The first epoch is told again.
    assert compared.notes[compared.once] == [before, "epoch 1", before, "epoch 1", "epoch 2", "after a result"]
    before = compared.notes[compared.deadly][0]
    assert compared.notes[compared.deadly] == [before, "epoch 1"] * 2


def _children(pid: int) -> list[int]:
    """The processes whose parent it is and that have imported torch or are about to."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in status.read_text().splitlines() if line.startswith("PPid:"))
            command = status.with_name("cmdline").read_text()
        except (OSError, StopIteration):
            continue
        if int(parent.split()[1]) == pid and "spawn_main" in command:
            found.append(int(status.parent.name))
    return found


_SECONDS = 600.0  # for what takes ten, on a machine that has nothing else to do


def _until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + _SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_stops_all_jobs_after_their_step_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    options = ["--schemes", "bonn,float", "--model", "wrn10_16", "--epochs", "1", "-b", "2", "--jobs", "2"]
    command = [sys.executable, "-m", "bonn_qat", "compare", *options, "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _until(lambda: len(list((tmp_path / RUNS).glob("[!.]*.unfinished.safetensors"))) == 2)
            time.sleep(0.5)
            children = _children(process.pid)
            process.send_signal(number)
            _, said = process.communicate(timeout=_SECONDS)
        finally:
            process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert said.count("\n") == (number != signal.SIGKILL)
    assert len(children) == 2
    _until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    steps = [read_state(path).progress.step for path in (tmp_path / RUNS).glob("[!.]*.unfinished.safetensors")]
    assert len(steps) == 2
    assert all(0 < step < 718 for step in steps)


# In threads


class Thread(threading.Thread):
    """Stands in for a process; as with multiprocessing, an exception there makes the exit code 1."""

    exitcode: int | None = None

    def __init__(self, target: Any, args: tuple[Path, int], name: str) -> None:
        self.sentinel, self.open_end = multiprocessing.Pipe(duplex=False)
        super().__init__(target=target, args=args, name=name)

    def run(self) -> None:
        try:
            super().run()
            self.exitcode = 0
        except SystemExit as stop:
            self.exitcode = int(stop.code or 0)
        except Exception:
            self.exitcode = 1
        finally:
            self.open_end.close()

    def terminate(self) -> None:
        STOPPED.set()

    def kill(self) -> None:
        """Nothing: it has stopped."""


SEEN: list[str] = []  # what the observer was told, in all threads
STOPPED = threading.Event()


class Observer:
    """Notes what it is told."""

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        SEEN.append(f"{threading.current_thread().name} before {directory.name}")

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path) -> None:
        SEEN.append(f"{threading.current_thread().name} after {directory.name}")


def _with_plugins(monkeypatch: pytest.MonkeyPatch, *others: object) -> None:
    """Have each process register these, in place of installed plugins."""
    create = plugins.create_manager

    def create_manager(**options: Any) -> plugins.Manager:
        pm = create(**options)
        for plugin in others:
            pm.register(plugin)
        return pm

    monkeypatch.setattr(plugins, "create_manager", create_manager)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What happens in each of a run's three steps, by the run's seed, instead of training."""
    happens: dict[int, Any] = {}

    def train(model: nn.Module, recipe: Recipe, data: Any, *, pm: Any, device: Any, **others: Any) -> SimpleNamespace:
        for epoch in (1, 2, 3):
            happens.get(recipe.seed, lambda: None)()
            if STOPPED.is_set():
                raise SystemExit(143)
            pm.hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics={}, time=0.0)
        return SimpleNamespace(name=recipe.name, device=device)

    def write_run(directory: Path, result: SimpleNamespace) -> None:
        (directory / RUNS / f"{result.name}.json").write_text(str(result.device))

    SEEN.clear()
    STOPPED.clear()
    monkeypatch.setattr(jobs, "_CONTEXT", SimpleNamespace(Process=Thread))
    monkeypatch.setattr(jobs, "_stop_with_parent", lambda: None)
    monkeypatch.setattr(jobs, "_cores", lambda: 2 * torch.get_num_threads())
    monkeypatch.setattr(running, "build", lambda recipe, data, pm: nn.Linear(1, 1))
    monkeypatch.setattr(running, "train", train)
    monkeypatch.setattr(running, "write_tensors", lambda path, tensors, header: None)
    monkeypatch.setattr(running, "write_run", write_run)
    monkeypatch.setattr(running, "read_run", lambda path: path.stem)
    return happens


DATA = data.TensorData(
    "noise",
    *[(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))] * 2,
    classes=2, pad=0, flip=False,
)  # fmt: skip
NAMES = [Recipe(seed=seed).name for seed in range(5)]


@pytest.fixture
def at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """Runs recipes of seeds 0, 1, ... in two jobs; gives the names of those with a result, and the failures."""

    pm = plugins.create_manager()

    def run(
        count: int, *others: object, data: Any = DATA, around: Path | None = None
    ) -> tuple[list[str], dict[str, str]]:
        for plugin in others:
            pm.register(plugin)
        recipes = [Recipe(seed=seed) for seed in range(count)]
        write_manifest(Comparison(directory=tmp_path, data=DATA.describe(), planned=NAMES[:count], results=()))
        monkeypatch.setattr(running, "read_comparison", lambda directory: SimpleNamespace(failures=noted()))
        monkeypatch.setattr(running, "replace", lambda comparison, failures: failures)
        monkeypatch.setattr(running, "write_manifest", lambda found: failures.update(found))
        monkeypatch.setattr(running, "_failures", lambda directory: noted())
        jobs.at_once(recipes, data, tmp_path, jobs=2, pm=pm, around=around)
        return sorted(path.stem for path in (tmp_path / RUNS).glob("*.json")), noted()

    failures: dict[str, str] = {}

    def noted() -> dict[str, str]:
        return dict(failures)

    return run


def test_every_run_is_made_once(runs: dict[int, Any], at_once: Any) -> None:
    made: list[int] = []
    for seed in range(5):
        runs[seed] = lambda seed=seed: made.append(seed)
    assert at_once(5) == (NAMES, {})
    assert sorted(made) == [seed for seed in range(5) for _ in range(3)]


def test_two_runs_go_on_at_once(runs: dict[int, Any], at_once: Any) -> None:
    together = threading.Barrier(2, timeout=30)
    runs[0] = runs[1] = together.wait
    assert at_once(2) == (NAMES[:2], {})


def test_each_job_tells_its_observers_of_the_study_and_the_comparison(
    runs: dict[int, Any], at_once: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(2, timeout=30)
    runs[0] = runs[1] = together.wait
    study = tmp_path.parent
    _with_plugins(monkeypatch, Observer())
    at_once(2, around=study)
    for job in ("bonn-qat job 0", "bonn-qat job 1"):
        moments = [f"before {study.name}", f"before {tmp_path.name}", f"after {tmp_path.name}", f"after {study.name}"]
        assert [line for line in SEEN if line.startswith(job)] == [f"{job} {moment}" for moment in moments]


def _dies() -> None:
    sys.exit(-9)


def test_another_process_takes_the_place_of_one_that_dies_and_its_run(runs: dict[int, Any], at_once: Any) -> None:
    deaths: list[int] = []

    def dies_once() -> None:
        if not deaths:
            deaths.append(1)
            _dies()

    runs[0] = dies_once
    runs[1] = runs[2] = _dies
    finished, failures = at_once(5)
    assert finished == [NAMES[0], *NAMES[3:]]
    assert failures.keys() == {*NAMES[1:3]}
    assert all("killed by SIGKILL" in why for why in failures.values())


def _goes_on() -> None:
    STOPPED.wait(60)


@pytest.mark.parametrize("file", [None, "runs/x.json"])
def test_a_full_disk_in_one_job_stops_all_and_is_raised_here(
    runs: dict[int, Any], at_once: Any, file: str | None
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", file)

    def fails() -> None:
        raise error

    runs[0], runs[1] = fails, _goes_on
    with pytest.raises(OSError, match="No space left on device") as raised:
        at_once(3)
    assert (raised.value.errno, raised.value.strerror, raised.value.filename) == (*error.args[:2], file)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Thread)]


def test_an_exception_in_one_job_stops_all_and_names_the_run(runs: dict[int, Any], at_once: Any) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    runs[0], runs[1] = fails, _goes_on
    words = rf"{NAMES[0]}: an exception ended its process \(exit code 1\); see the traceback above"
    with pytest.raises(BonnQatError, match=words):
        at_once(3)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Thread)]


def test_an_interruption_here_stops_all(
    runs: dict[int, Any], at_once: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(sentinels: Any) -> Any:
        raise KeyboardInterrupt

    runs[0] = runs[1] = _goes_on
    monkeypatch.setattr("multiprocessing.connection.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        at_once(3)
    assert not list((tmp_path / RUNS).glob("*.json"))
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Thread)]


@pytest.mark.parametrize("error", [TrainingDiverged("nan"), torch.OutOfMemoryError("CUDA"), MemoryError()])
def test_a_failed_run_fails_alone(runs: dict[int, Any], at_once: Any, error: Exception) -> None:
    def fails() -> None:
        raise error

    runs[0] = fails
    finished, failures = at_once(3)
    assert finished == NAMES[1:3]
    assert failures[NAMES[0]] in ("nan", "out of memory; try fewer jobs, or a batch_size below 64")


@pytest.mark.parametrize("before", [0, 1])
def test_a_process_that_does_not_begin_is_an_error(
    runs: dict[int, Any], at_once: Any, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    train = jobs._train
    begun: list[int] = []

    def begins_not(folder: Path, job: int) -> None:
        begun.append(job)
        if len(begun) > before:
            sys.exit(1)
        train(folder, job)

    runs[0] = _dies
    monkeypatch.setattr(jobs, "_train", begins_not)
    words = r"ended before it began one \(exit code 1\); a script .* below `if __name__ == '__main__':`"
    with pytest.raises(BonnQatError, match=words):
        at_once(1)


def test_there_are_no_jobs_within_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "name", "bonn-qat job 1")
    jobs.check_jobs(1)
    with pytest.raises(BonnQatError, match="in a process that is such a job itself"):
        jobs.check_jobs(2)


def test_less_than_one_job_and_several_in_a_process_group_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRecipe, match="jobs is 0; allowed: at least 1"):
        jobs.check_jobs(0)
    monkeypatch.setattr("bonn_qat.distributed.world", lambda: 2)
    jobs.check_jobs(1)
    with pytest.raises(InvalidRecipe, match="jobs is 3 where each run has 2 processes; allowed: 1"):
        jobs.check_jobs(3)


def test_the_cores_are_shared_as_threads(runs: dict[int, Any], at_once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores in (1, 5):
        monkeypatch.setattr(jobs, "_cores", lambda cores=cores: cores)
        at_once(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    at_once(1)
    assert set_threads == [1, 2]


def test_gpus_are_dealt_in_turn(
    runs: dict[int, Any], at_once: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together = threading.Barrier(2, timeout=30)
    runs[0] = runs[1] = together.wait
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gpus, devices in ((1, {"cuda:0"}), (2, {"cuda:0", "cuda:1"})):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        at_once(2)
        results = list((tmp_path / RUNS).glob("*.json"))
        assert {path.read_text() for path in results} == devices
        for path in results:
            path.unlink()


# What is sent


class LocalData:
    name = "local"

    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def test_data_that_cannot_be_sent_are_named(runs: dict[int, Any], at_once: Any) -> None:
    with pytest.raises(InvalidData, match=r"the data 'local' cannot be sent to another process .* with jobs=1"):
        at_once(1, data=LocalData())


class Both:
    """Offers and observes."""

    @hookimpl
    def bonn_qat_schemes(self) -> list[Any]:
        return [replace(plugins.find_scheme("bonn"), name="mine")]

    @hookimpl
    def bonn_qat_after_epoch(self) -> None:
        raise AssertionError


@pytest.mark.parametrize("plugin", [Both(), Observer()], ids=lambda plugin: type(plugin).__name__)
def test_a_plugin_that_is_not_installed_is_an_error_before_anything_is_run(plugin: object, tmp_path: Path) -> None:
    pm = plugins.create_manager()
    pm.register(plugin, name="mine")
    words = (
        "the plugin 'mine' is registered in this process only; install it with an entry point, or compare with jobs=1 "
        "and without Ray"
    )
    with pytest.raises(BonnQatError, match=words):
        comparing.compare([Recipe()], DATA, tmp_path / "none", jobs=2, pm=pm)
    assert not (tmp_path / "none").exists()
    # Observers are called by the process that submits the runs to Ray.
    with pytest.raises(BonnQatError, match=words) if isinstance(plugin, Both) else contextlib.nullcontext():
        jobs.check_plugins(pm, observers=False)


def test_each_job_prints_the_lines_of_its_epochs_and_loads_the_same_plugins(
    runs: dict[int, Any], at_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[plugins.Manager] = []
    create = plugins.create_manager

    def create_manager(**options: Any) -> plugins.Manager:
        made.append(create(**options))
        return made[-1]

    monkeypatch.setattr(plugins, "create_manager", create_manager)
    monkeypatch.setattr(EpochLines, "bonn_qat_after_epoch", hookimpl(lambda self: SEEN.append("a line")))
    at_once(1)
    assert not SEEN
    at_once(2, EpochLines())
    assert SEEN == ["a line"] * 3
    names = {name for name, _ in create().list_name_plugin()}
    assert all(names <= {name for name, _ in pm.list_name_plugin()} for pm in made)


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
