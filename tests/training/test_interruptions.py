"""A run may end at any moment: its files are intact, and the resumed run gives the same result."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bonn_qat.errors import InvalidData
from bonn_qat.files import atomic
from bonn_qat.files.locks import locked
from bonn_qat.files.tensors import digest, read_tensors, write_tensors
from bonn_qat.scheme import Stage
from bonn_qat.studies import compare as comparing
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.training import data
from bonn_qat.training.checkpoint import Checkpointer, RunState, read_state, write_state
from bonn_qat.training.interrupts import deferred_interrupts
from bonn_qat.training.network import build
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult
from bonn_qat.training.resume import resume
from bonn_qat.training.train import train
from bonn_qat.training.trainer import Trainer

# Every kind of thing that a run remembers: float latents that become binary ones, a clipped sign before the sign,
# classes that are measured, a momentum, norms that are measured anew, a random dropout.
STAGES = (
    Stage(share=0.25, weights="float", activations="relu"),
    Stage(share=0.25, regularizers={"kernel": 1e-3}, activations="leaky_clip"),
    Stage(share=0.5, regularizers={"kernel": 1e-3, "feature": 1e-2}, recompute_norms=True),
)
RECIPE = Recipe(
    epochs=4, batch_size=16, lr=0.05, train_images=35, test_images=10, stages=STAGES,
    model_options={"drop_rate": 0.2},
)  # fmt: skip
STEPS = 4 * 3

Weights = dict[str, Tensor]


class Stop(Exception):
    """Not an error of the package."""


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_images=35, test_images=10)


def run(digits: data.Data, recipe: Recipe = RECIPE, **options: Any) -> tuple[Weights, RunResult]:
    model = build(recipe, digits)
    result = train(model, recipe, digits, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, result


@pytest.fixture(scope="module")
def whole(digits: data.Data) -> tuple[Weights, RunResult]:
    return run(digits)


def at(step: int, act: Callable[[], object]) -> Callable[[], None]:
    """A tick that acts at the n-th step."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == step:
            act()

    return tick


def stop() -> None:
    raise Stop


def assert_same(one: tuple[Weights, RunResult], other: tuple[Weights, RunResult]) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
    assert one[1].epochs == other[1].epochs
    assert one[1].histograms == other[1].histograms


@pytest.mark.parametrize("step", [2, 3, 8, STEPS])
def test_a_run_that_ends_at_a_step_goes_on_to_the_same_weights(
    digits: data.Data, whole: tuple[Weights, RunResult], tmp_path: Path, step: int
) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(digits, checkpoint=path, tick=at(step, stop))
    progress = read_state(path).progress
    assert (len(progress.epochs), progress.step) == ((step - 1) // 3, (step - 1) % 3 + 1)
    ticks: list[None] = []
    resumed = run(digits, checkpoint=path, tick=lambda: ticks.append(None))
    assert_same(resumed, whole)
    assert len(ticks) == STEPS
    result, done = resumed[1], len(progress.epochs)
    assert (result.run_id, result.started, result.times[:done]) == (progress.run_id, progress.started, progress.times)
    assert result.started < result.times[0]
    assert result.times == sorted(set(result.times))
    assert len(result.times) == RECIPE.epochs


def test_a_checkpoint_of_an_earlier_version_has_no_times_and_goes_on(digits: data.Data, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=2, stages=())
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(digits, recipe, checkpoint=path, tick=at(4, stop))
    tensors, header = read_tensors(path)
    header = {key: header[key] for key in header if key not in ("started", "times", "sha256")}
    write_tensors(path, tensors, header | {"sha256": digest(tensors, header)})
    assert read_state(path).progress.times == []
    _, result = run(digits, recipe, checkpoint=path)
    assert len(result.times) == len(result.epochs) == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_run_goes_on_with_equal_data_and_is_refused_with_others_of_the_same_size(
    digits: data.Data, tmp_path: Path, seed: int
) -> None:
    recipe, draw = replace(RECIPE, epochs=1, stages=()), torch.Generator().manual_seed(seed)
    train_set, test_set = digits._train, digits._test  # type: ignore[attr-defined]

    def changed(part: str) -> data.Data:
        sets = {"train": [x.clone() for x in train_set], "test": [x.clone() for x in test_set]}
        of, _, what = part.partition(" ")
        if what:
            flat = sets[of][what == "label"].view(-1)
            flat[torch.randint(len(flat), (), generator=draw)] += 1 if what == "pixel" else 0
            if what == "label":
                flat.copy_(flat.roll(1))
        return data.TensorData("digits", tuple(sets["train"]), tuple(sets["test"]), classes=10, pad=1, flip=False)

    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(digits, recipe, checkpoint=path, tick=at(2, stop))
    kept = path.read_bytes()
    for part in ("train pixel", "train label", "test pixel", "test label"):
        with pytest.raises(InvalidData, match="it was trained on other images or labels, which also go by the name"):
            run(changed(part), recipe, checkpoint=path)
        assert path.read_bytes() == kept
    run(changed("none"), recipe, checkpoint=path)


def test_a_checkpoint_of_an_earlier_version_without_a_fingerprint_goes_on_with_a_warning(
    digits: data.Data, tmp_path: Path
) -> None:
    recipe, path = replace(RECIPE, epochs=1, stages=()), tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(digits, recipe, checkpoint=path, tick=at(2, stop))
    tensors, header = read_tensors(path)
    header = {key: header[key] for key in header if key not in ("fingerprint", "sha256")}
    write_tensors(path, tensors, header | {"sha256": digest(tensors, header)})
    with pytest.warns(UserWarning, match="was written by an earlier version, which kept no hash of the data"):
        run(digits, recipe, checkpoint=path)


def test_a_run_that_ends_at_every_step_goes_on(
    digits: data.Data, whole: tuple[Weights, RunResult], tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    for step in range(1, STEPS + 1):
        with pytest.raises(Stop):
            run(digits, checkpoint=path, tick=at(step, stop))
    assert_same(run(digits, checkpoint=path), whole)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_with_another_optimizer_goes_on_in_the_middle_of_an_epoch(
    digits: data.Data, tmp_path: Path, optimizer: str
) -> None:
    recipe = replace(RECIPE, optimizer=optimizer, momentum=0.0, lr=1e-3, epochs=2, stages=(), model_options={})
    with pytest.raises(Stop):
        run(digits, recipe, checkpoint=tmp_path / "x", tick=at(4, stop))
    assert_same(run(digits, recipe, checkpoint=tmp_path / "x"), run(digits, recipe))


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_lets_the_step_end_and_leaves_a_checkpoint(
    digits: data.Data,
    whole: tuple[Weights, RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    raised: type[BaseException],
) -> None:
    path, before = tmp_path / "run.safetensors", signal.getsignal(number)
    step = Trainer.step

    def hit(self: Trainer, images: Tensor, targets: Tensor) -> Any:
        if self.epochs and self.done == 1:
            os.kill(os.getpid(), number)  # in the middle of the second step of the second epoch
        return step(self, images, targets)

    monkeypatch.setattr(Trainer, "step", hit)
    with pytest.raises(raised):
        run(digits, checkpoint=path)
    monkeypatch.undo()
    progress = read_state(path).progress
    assert (len(progress.epochs), progress.step) == (1, 2)
    assert signal.getsignal(number) == before
    assert_same(run(digits, checkpoint=path), whole)


@pytest.mark.parametrize("where", ["test", "measure", "norms"])
def test_a_signal_outside_the_steps_does_not_wait_for_the_pass_to_end(
    digits: data.Data, whole: tuple[Weights, RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """During a test, the measuring of the classes, and that of the norms."""
    path, passes = tmp_path / "run.safetensors", list[None]()
    name, wanted = {"test": ("test_batches", 2), "measure": ("measure_batches", 1), "norms": ("measure_batches", 2)}[
        where
    ]
    original = getattr(data.TensorData, name)

    def batches(self: data.TensorData, *args: Any, **kwargs: Any) -> Iterator[data.Batch]:
        passes.append(None)
        is_it = len(passes) == wanted
        for index, batch in enumerate(original(self, 5) if is_it else original(self, *args, **kwargs)):
            assert index < 1 or not is_it, "it went on"
            if is_it:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(data.TensorData, name, batches)
    with pytest.raises(KeyboardInterrupt):
        run(digits, checkpoint=path)
    monkeypatch.undo()
    assert_same(run(digits, checkpoint=path), whole)


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as interrupts:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it was held back too")


def test_what_came_and_was_not_let_through_comes_at_the_end() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached


def test_in_another_thread_nothing_is_held() -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[object]()

    def look() -> None:
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_checkpoint_is_written_as_often_as_was_asked(digits: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    found: list[tuple[int, int]] = []

    def look() -> None:
        progress = read_state(path).progress
        found.append((len(progress.epochs), progress.step))

    run(digits, checkpoint=path, checkpoint_seconds=0.0, tick=look)
    assert found[:5] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


# ------------------------------------------------------------------------------- files that cannot be written or read


@pytest.mark.parametrize(
    ("moment", "number"),
    [("open", errno.EROFS), ("write", errno.ENOSPC), ("fsync", errno.ENOSPC), ("replace", errno.EACCES)],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    digits: data.Data,
    whole: tuple[Weights, RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    moment: str,
) -> None:
    path = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(digits, checkpoint=path, tick=at(4, stop))
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    class Disk:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> "Disk":
            return self

        def __exit__(self, *args: object) -> None:
            self._file.close()

        def write(self, content: bytes) -> None:
            self._file.write(content[: len(content) // 2])
            fail()

    with monkeypatch.context() as patch:
        if moment == "fsync":
            patch.setattr(atomic.os, "fsync", fail)
        elif moment == "write":
            opened = Path.open
            patch.setattr(Path, "open", lambda self, mode="r": Disk(opened(self, mode)))
        else:
            patch.setattr(Path, moment, fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            run(digits, checkpoint=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert_same(run(digits, checkpoint=path), whole)


def test_what_a_killed_process_left_of_a_file_is_swept_away(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    kept = [path, tmp_path / ".a.json.lock", tmp_path / ".ab.json.12", tmp_path / "a.json.12"]
    for file in (*kept, tmp_path / ".a.json.12", tmp_path / ".a.json.7"):
        file.touch()
    atomic.remove_leftovers(path)
    assert set(tmp_path.iterdir()) == set(kept)
    atomic.remove_leftovers(tmp_path / "nowhere" / "a.json")


@pytest.fixture(scope="module")
def state(digits: data.Data, tmp_path_factory: pytest.TempPathFactory) -> RunState:
    path = tmp_path_factory.mktemp("state") / "run.safetensors"
    with pytest.raises(Stop):
        run(digits, checkpoint=path, tick=at(8, stop))
    return read_state(path)


def trainer(digits: data.Data, recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(build(recipe, digits), recipe, digits, torch.device("cpu"), task=torch.nn.CrossEntropyLoss())


def _without(tensors: Any, name: str) -> Any:
    return {key: tensor for key, tensor in tensors.items() if key != name}


FIRST = "objective.model.conv1.weight"
MISFITS: dict[str, tuple[Callable[[RunState], RunState], str]] = {
    "a tensor that is missing": (lambda s: s._replace(tensors=_without(s.tensors, FIRST)), "is missing"),
    "a tensor more": (lambda s: s._replace(tensors={**s.tensors, "other": torch.zeros(1)}), "other is unknown"),
    "another shape": (lambda s: s._replace(tensors={**s.tensors, FIRST: torch.zeros(3)}), r"is torch.float32 \(3,\)"),
    "another type": (lambda s: s._replace(tensors={**s.tensors, FIRST: s.tensors[FIRST].double()}), "torch.float64"),
    "no sums": (lambda s: s._replace(tensors=_without(s.tensors, "epoch.sums")), "epoch.sums is missing"),
    "a state of no generator": (
        lambda s: s._replace(tensors={**s.tensors, "random.data": s.tensors["random.data"] * 0 + 255}),
        "random.data is not the state of a random number generator",
    ),
    "momentum of nothing": (
        lambda s: s._replace(tensors={**s.tensors, "optimizer.9999.momentum_buffer": torch.zeros(1)}), "is unknown"
    ),
    "another stage": (lambda s: s._replace(progress=replace(s.progress, stage=0)), "claims stage 0"),
    "too many steps": (lambda s: s._replace(progress=replace(s.progress, step=4)), "step 4"),
    "other data": (
        lambda s: s._replace(progress=replace(s.progress, data={**s.progress.data, "train": 36})), "was trained on"
    ),
    "an epoch without its number": (
        lambda s: s._replace(progress=replace(s.progress, epochs=[{}, *s.progress.epochs[1:]])),
        "epoch 1 are incomplete",
    ),
    "another recipe": (
        lambda s: s._replace(progress=replace(s.progress, recipe={**s.progress.recipe, "lr": 0.06})), "different recipe"
    ),
    "no recipe": (lambda s: s._replace(progress=replace(s.progress, recipe={"lrr": 1})), "its recipe is invalid"),
    "a scaled loss": (
        lambda s: s._replace(progress=replace(s.progress, scaler={"scale": 2.0})), "loss scaler is different"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    digits: data.Data, state: RunState, tmp_path: Path, name: str
) -> None:
    change, words = MISFITS[name]
    path = write_state(tmp_path / "run.safetensors", change(state))
    fresh = trainer(digits)
    before = {name: tensor.clone() for name, tensor in fresh.objective.state_dict().items()}
    with pytest.raises(InvalidData, match=words) as caught:
        resume(fresh, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.objective.state_dict().items())
    assert not fresh.optimizer.state
    assert (fresh.stage, fresh.done, fresh.epochs) == (-1, 0, [])


def test_a_bit_that_flipped_anywhere_is_told(digits: data.Data, state: RunState, tmp_path: Path) -> None:
    path = write_state(tmp_path / "run.safetensors", state)
    content = path.read_bytes()
    for place in torch.linspace(0, 1, 40).tolist():
        index = min(int(place * len(content)), len(content) - 1)
        path.write_bytes(content[:index] + bytes([content[index] ^ 4]) + content[index + 1 :])
        with pytest.raises(InvalidData, match=r"run\.safetensors"):
            read_state(path)


# ----------------------------------------------------------------------- several processes in one directory


def test_two_processes_that_compare_in_one_directory_share_the_runs(tmp_path: Path, digits: data.Data) -> None:
    recipe = replace(RECIPE, epochs=1, stages=(), model_options={}, latents="0.01")
    planned = comparing.plan(recipe, schemes=["bonn", "xnor"])
    busy, free = planned
    (tmp_path / RUNS).mkdir()
    with locked(tmp_path / RUNS / f".{busy.name}.lock", waits=False) as is_ours:
        assert is_ours
        found = comparing.compare(planned, digits, tmp_path)
    assert [result.name for result in found.results] == [free.name]
    assert found.elsewhere == found.missing == [busy.name]
    assert not found.failures
    again = comparing.compare(planned, digits, tmp_path)
    assert [result.name for result in again.results] == [busy.name, free.name]
    assert not again.elsewhere
    assert read_comparison(tmp_path).recipes == {run.name: run.to_dict() for run in planned}


def test_what_another_process_finished_meanwhile_is_not_run_again(
    tmp_path: Path, digits: data.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, epochs=1, stages=(), model_options={}, latents="0.01")
    planned = comparing.plan(recipe, schemes=["bonn"])
    first = comparing.compare(planned, digits, tmp_path)
    written = (tmp_path / RUNS / f"{planned[0].name}.json").stat().st_mtime_ns
    began = comparing._begin

    def begin(*args: Any) -> Any:  # as it was when the other one had not finished
        return replace(began(*args), results=())

    monkeypatch.setattr(comparing, "_begin", begin)
    second = comparing.compare(planned, digits, tmp_path)
    assert second.results[0].epochs == first.results[0].epochs
    assert (tmp_path / RUNS / f"{planned[0].name}.json").stat().st_mtime_ns == written


def test_a_failure_in_another_process_is_kept(tmp_path: Path, digits: data.Data) -> None:
    recipe = replace(RECIPE, epochs=1, stages=(), model_options={}, latents="0.01")
    wild = replace(recipe, lr=1e30, scheme="xnor")
    assert comparing.compare([wild], digits, tmp_path).failures.keys() == {wild.name}
    found = comparing.compare(comparing.plan(recipe, schemes=["bonn"]), digits, tmp_path)
    assert found.failures.keys() == read_comparison(tmp_path).failures.keys() == {wild.name}


def test_a_checkpointer_that_writes_nothing_still_stops_the_run() -> None:
    with pytest.raises(KeyboardInterrupt), deferred_interrupts() as interrupts:  # noqa: PT012
        checkpointer = Checkpointer(seconds=0.0, interrupts=interrupts)
        checkpointer.save()
        checkpointer.after_step(torch.device("cpu"), may_wait=True)
        os.kill(os.getpid(), signal.SIGINT)
        checkpointer.after_step(torch.device("cpu"), may_wait=True)
