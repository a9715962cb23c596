import contextlib
import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bonn_qat import hookimpl, plugins
from bonn_qat.errors import InvalidData, InvalidRecipe, UnknownName
from bonn_qat.files.locks import locked
from bonn_qat.studies.compare import compare, plan
from bonn_qat.studies.comparison import PAGE, read_comparison
from bonn_qat.studies.run import lock_of
from bonn_qat.training import data
from bonn_qat.training.network import build
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS
from bonn_qat.training.resume import write_checkpoint
from bonn_qat.training.train import train

RECIPE = Recipe(model="wrn10_16", epochs=1, batch_size=16, latents="0.01")


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_images=32, test_images=16)


def _names(recipes: list[Recipe]) -> list[str]:
    return [recipe.name for recipe in recipes]


def test_a_plan_crosses_schemes_latents_and_seeds_and_runs_the_float_network_once_a_seed() -> None:
    planned = plan(RECIPE, schemes=["float", "bonn"], seeds=range(2), latents=["0.01", "float"])
    arms = ["float-float", "bonn-0.01", "bonn-float"]
    assert _names(planned) == [f"{arm}-seed{seed}" for seed in (0, 1) for arm in arms]
    with pytest.raises(UnknownName, match="did you mean 'xnor'"):
        plan(RECIPE, schemes=["xnorr"])
    with pytest.raises(InvalidRecipe, match="no scheme to compare"):
        plan(RECIPE, schemes=[])


def test_what_another_process_leaves_unfinished_is_taken_over(tmp_path: Path, digits: data.Data) -> None:
    left, ours = planned = plan(RECIPE, schemes=["bonn"], seeds=range(2))
    lock_of(tmp_path, left.name).parent.mkdir()
    begun: list[int] = []
    with contextlib.ExitStack() as other:
        assert other.enter_context(locked(lock_of(tmp_path, left.name), waits=False))

        class Observer:
            @hookimpl
            def bonn_qat_before_run(self, recipe: Recipe) -> None:
                begun.append(recipe.seed)
                other.close()  # during the first run

        pm = plugins.create_manager()
        pm.register(Observer())
        found = compare(planned, digits, tmp_path, pm=pm)
    assert begun == [ours.seed, left.seed]
    assert [result.name for result in found.results] == _names(planned)
    assert not found.elsewhere


def test_a_scheme_comes_with_options_of_its_own(tmp_path: Path, digits: data.Data) -> None:
    variants = ["xnor", "xnor:gradient=plain+input_scale=true", "bonn:clip=0.5"]
    planned = plan(RECIPE, schemes=variants)
    assert [recipe.scheme_spec for recipe in planned] == variants
    assert planned[1].scheme_options == {"gradient": "plain", "input_scale": True}
    found = compare(planned, digits, tmp_path)
    assert [result.scheme for result in found.results] == variants
    assert len({path.name for path in (tmp_path / RUNS).iterdir()}) == 6
    page = (tmp_path / PAGE).read_text()
    assert "XNOR-Net gradient=plain+input_scale=true" in page
    assert "BONN clip=0.5 is" in page  # the reference, for want of a plain one
    with pytest.raises(InvalidRecipe, match="option 'clip' in 'xnor:clip' has no value; write clip=VALUE"):
        plan(RECIPE, schemes=["xnor:clip"])
    with pytest.raises(UnknownName, match="unknown option of the scheme 'xnor' 'clop'; did you mean 'clip'"):
        compare(plan(RECIPE, schemes=["xnor:clop=1"]), digits, tmp_path)


@pytest.mark.parametrize("key", ["checkpoint", "teacher"])
def test_weights_that_are_not_there_are_named_before_anything_is_written(
    tmp_path: Path, digits: data.Data, key: str
) -> None:
    for source, error, words in [
        ("wrn22_16.nobody", UnknownName, r"unknown pretrained network .wrn22_16\.nobody."),
        ("there/weights", InvalidData, "cannot read there/weights: no such file"),
        ("weights.safetensors", InvalidData, r"cannot read weights\.safetensors: no such file"),
    ]:
        with pytest.raises(error, match=words):
            compare(plan(dataclasses.replace(RECIPE, **{key: source})), digits, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_all_stands_for_every_scheme_with_the_float_network_first_and_bonn_last() -> None:
    names = [recipe.scheme for recipe in plan(RECIPE, schemes=["all"])]
    assert set(names) == set(plugins.schemes())
    assert (names[0], names[-1]) == ("float", "bonn")
    assert [recipe.scheme for recipe in plan(RECIPE, schemes=["xnor", "all"])] == list(dict.fromkeys(["xnor", *names]))


def test_finished_runs_are_kept_and_not_run_again(tmp_path: Path, digits: data.Data) -> None:
    planned = plan(RECIPE, schemes=["float", "bonn"])
    first = compare(planned[:1], digits, tmp_path)
    before = (tmp_path / RUNS / "float-float-seed0.json").stat().st_mtime_ns
    second = compare(planned, digits, tmp_path)
    assert [result.name for result in second.results] == _names(planned)
    assert not second.missing
    assert first.results[0] == second.results[0]
    assert (tmp_path / RUNS / "float-float-seed0.json").stat().st_mtime_ns == before
    assert "BONN" in (tmp_path / PAGE).read_text()


def test_the_weights_beside_a_result_are_those_of_the_trained_model(tmp_path: Path, digits: data.Data) -> None:
    (recipe,) = plan(RECIPE, schemes=["bonn"])
    compare([recipe], digits, tmp_path)
    model = build(recipe, digits)
    train(model, recipe, digits)
    again = build(recipe, digits)
    again.load_state_dict(safetensors.torch.load_file(tmp_path / RUNS / f"{recipe.name}.safetensors"), strict=True)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.equal(b), name


class _Interrupt:
    """Notes what it is told, and raises the error, if any, in the middle of the second run."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.runs = error, 0
        self.calls: list[str] = []

    @hookimpl
    def bonn_qat_before_comparison(self) -> None:
        self.calls.append("before")

    @hookimpl
    def bonn_qat_before_run(self) -> None:
        self.runs += 1

    @hookimpl
    def bonn_qat_after_epoch(self) -> None:
        if self.runs == 2 and self.error:
            raise self.error

    @hookimpl
    def bonn_qat_after_run(self, result: dict[str, Any] | None) -> None:
        self.calls.append("failed" if result is None else "finished")

    @hookimpl
    def bonn_qat_after_comparison(self) -> None:
        self.calls.append("after")


def test_a_run_that_was_interrupted_goes_on_from_its_last_epoch(tmp_path: Path, digits: data.Data) -> None:
    (recipe,) = plan(dataclasses.replace(RECIPE, epochs=3), schemes=["bonn"])
    whole = compare([recipe], digits, tmp_path / "whole")
    pm, observer = plugins.create_manager(), _Interrupt(KeyboardInterrupt())
    observer.runs = 1  # so that the first run is the one that it stops, in its first epoch
    pm.register(observer)
    with pytest.raises(KeyboardInterrupt):
        compare([recipe], digits, tmp_path / "twice", pm=pm)
    assert [path.name for path in (tmp_path / "twice" / RUNS).glob("[!.]*")] == [
        f"{recipe.name}.unfinished.safetensors"
    ]
    twice = compare([recipe], digits, tmp_path / "twice")
    assert twice.results[0].epochs == whole.results[0].epochs
    weights = [safetensors.torch.load_file(tmp_path / part / RUNS / f"{recipe.name}.safetensors")
               for part in ("whole", "twice")]  # fmt: skip
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert {path.suffix for path in (tmp_path / "twice" / RUNS).iterdir()} == {".json", ".safetensors"}
    assert not (tmp_path / "twice" / RUNS / f"{recipe.name}.unfinished.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interruption_keeps_what_was_finished_and_the_report_says_what_is_missing(
    tmp_path: Path, digits: data.Data, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: Any) -> None:
        if observer.runs == 2:
            raise error
        write_checkpoint(*args)

    pm, observer = plugins.create_manager(), _Interrupt()
    pm.register(observer)
    monkeypatch.setattr("bonn_qat.training.train.write_checkpoint", write)
    planned = plan(RECIPE, schemes=["float", "xnor", "bonn"])
    with pytest.raises(type(error)):
        compare(planned, digits, tmp_path, pm=pm)
    found = read_comparison(tmp_path)
    assert [result.name for result in found.results] == ["float-float-seed0"]
    assert found.missing == ["xnor-0.01-seed0", "bonn-0.01-seed0"]
    page = (tmp_path / PAGE).read_text()
    assert all(name in page for name in found.missing)
    assert observer.calls == ["before", "finished", "failed", "after"]
    assert not [path for path in tmp_path.rglob(".*") if path.suffix != ".lock"]


def test_a_full_disk_leaves_no_half_written_result(
    tmp_path: Path, digits: data.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    planned = plan(RECIPE, schemes=["float"])
    compare(planned, digits, tmp_path)
    monkeypatch.setattr("bonn_qat.files.atomic.os.fsync", full)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(InvalidData, match=r"cannot write results to .*: No space left on device"):
        compare(plan(RECIPE, schemes=["float", "bonn"]), digits, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    assert not [path for path in tmp_path.rglob(".*") if path.suffix != ".lock"]


def test_a_diverging_run_fails_alone(tmp_path: Path, digits: data.Data) -> None:
    wild = dataclasses.replace(RECIPE, lr=1e30, scheme="xnor")
    found = compare([wild, *plan(RECIPE, schemes=["bonn"])], digits, tmp_path)
    assert "held NaN or infinity in step" in found.failures["xnor-0.01-seed0"]
    assert [result.name for result in found.results] == ["bonn-0.01-seed0"]
    assert read_comparison(tmp_path).failures == found.failures


def test_a_directory_of_another_comparison_is_refused(tmp_path: Path, digits: data.Data) -> None:
    planned = plan(RECIPE, schemes=["float"])
    compare(planned, digits, tmp_path)
    with pytest.raises(InvalidData, match="holds a comparison of other recipes or data"):
        compare(plan(dataclasses.replace(RECIPE, lr=0.1), schemes=["float"]), digits, tmp_path)


def test_damaged_results_are_named(tmp_path: Path, digits: data.Data) -> None:
    compare(plan(RECIPE, schemes=["float"]), digits, tmp_path)
    run = tmp_path / RUNS / "float-float-seed0.json"
    whole = run.read_text()
    for content, words in (
        (whole[:100], "is not JSON"),
        (json.dumps({"format": 99}), "is not of format 1"),
        (json.dumps({"format": 1, "name": "x"}), "is not a run's result"),
    ):
        run.write_text(content)
        with pytest.raises(InvalidData, match=rf"float-float-seed0\.json {words}"):
            read_comparison(tmp_path)
    with pytest.raises(InvalidData, match="cannot read"):
        read_comparison(tmp_path / "nowhere")
