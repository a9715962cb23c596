import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from bonn_qat import FeatureLoss, binarize, hookimpl, plugins
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidData, InvalidModel, InvalidRecipe, TrainingDiverged, UnknownName
from bonn_qat.files.tensors import read_tensors, write_tensors
from bonn_qat.inspection.diagnose import first_non_finite
from bonn_qat.scheme import Stage
from bonn_qat.studies.run import run
from bonn_qat.training import data
from bonn_qat.training.network import build, load, weights_header
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult
from bonn_qat.training.train import train

RECIPE = Recipe(model="wrn10_16", epochs=2, batch_size=32, train_images=96, test_images=64, latents="0.01")


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_images=96, test_images=64)


def test_the_same_recipe_gives_the_same_weights(digits: data.Data) -> None:
    first, second = (build(RECIPE, digits) for _ in range(2))
    results = []
    for model in (first, second):
        torch.manual_seed(123)
        results.append(train(model, RECIPE, digits))
    assert results[0].epochs == results[1].epochs
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_every_scheme_starts_from_the_same_float_network(digits: data.Data) -> None:
    models = {scheme: build(dataclasses.replace(RECIPE, scheme=scheme), digits) for scheme in ("bonn", "xnor", "float")}
    for name in ("conv1.weight", "fc.weight", "layer1.0.bn1.weight"):
        assert len({tuple(model.state_dict()[name].flatten().tolist()) for model in models.values()}) == 1
    signs = {scheme: model.get_submodule("layer1.0.conv1").weight.sign() for scheme, model in models.items()}
    assert torch.equal(signs["bonn"], signs["xnor"])
    assert torch.equal(signs["bonn"], signs["float"])


def test_a_result_holds_what_the_run_did(digits: data.Data) -> None:
    ticks: list[None] = []
    recipe = dataclasses.replace(RECIPE, stages=(Stage(regularizers={"kernel": 1e-4, "feature": 1e-3}),))
    result = train(build(recipe, digits), recipe, digits, tick=lambda: ticks.append(None))
    assert len(ticks) == 6
    assert [epoch["epoch"] for epoch in result.epochs] == [1, 2]
    last = result.epochs[-1]
    assert last["train/loss"] == pytest.approx(last["train/task"] + last["train/kernel"] + last["train/feature"])
    assert result.top1 == last["test/top1"]
    assert 0 <= result.top1 <= 100
    assert (result.bits, result.latents, result.recipe) == ("1/1", "0.01", recipe.to_dict())
    assert len([key for key in last if key.startswith("scale/")]) == 6
    weights = 16 * 16 * 9
    histogram = result.histograms["layer1.0.conv1"]
    assert {"0", "1", "2"} <= set(histogram)
    assert all(sum(part["counts"]) == weights and len(part["edges"]) == 62 for part in histogram.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learning_lowers_the_loss(precision: str) -> None:
    digits = data.load("digits")
    recipe = Recipe(model="wrn10_16", epochs=3, latents="0.01", precision=precision)
    result = train(build(recipe, digits), recipe, digits)
    assert result.top1 > 40  # chance is 10
    assert result.epochs[-1]["train/task"] < 0.7 * math.log(10)


class _Feature:
    """Remembers in which epochs the feature loss was on."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    @hookimpl
    def bonn_qat_after_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        self.seen.append((epoch, "train/feature" in metrics))


def test_stages_switch_terms_on_and_the_feature_loss_starts_from_measured_classes(
    digits: data.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []
    measure = FeatureLoss.measure

    def counted(self: FeatureLoss, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> object:
        spread, count = measure(self, batches)
        measured.append((len(observer.seen), int(count.sum())))
        assert self.centres.any()
        return spread, count

    monkeypatch.setattr(FeatureLoss, "measure", counted)
    stages = (Stage(share=0.5, regularizers={"kernel": 1e-4}), Stage(share=0.5, regularizers={"feature": 1e-3}))
    recipe = dataclasses.replace(RECIPE, stages=stages)
    pm, observer = plugins.create_manager(), _Feature()
    pm.register(observer)
    result = train(build(recipe, digits), recipe, digits, pm=pm)
    assert observer.seen == [(1, False), (2, True)]
    assert measured == [(1, digits.train_size)]  # once, after the first epoch, on the whole training set
    assert "train/kernel" in result.epochs[0]
    assert "train/kernel" not in result.epochs[1]


def test_divergence_names_the_layer_and_the_step(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, lr=1e30)
    words = (
        r"epoch 1: the input of layer\d\.0\.conv\d held NaN or infinity in step \d; the (parameter|buffer) .* holds .*"
    )
    with pytest.raises(TrainingDiverged, match=words + r"; try a lower learning rate than 1e\+30"):
        train(build(recipe, digits), recipe, digits)
    recipe = dataclasses.replace(recipe, scheme="float")
    with pytest.raises(TrainingDiverged, match=r"epoch 1: the loss term 'task' held NaN or infinity in step \d; the "):
        train(build(recipe, digits), recipe, digits)


def test_first_non_finite_looks_at_parameters_then_at_outputs() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    images = torch.full((1, 2), 3e38)
    found = first_non_finite(nn.Sequential(_Infinite(), model), images)
    assert found == "the first layer whose output is not finite is 0 (_Infinite)"
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    assert first_non_finite(model, images) == "the parameter 1.weight is not finite"
    assert first_non_finite(nn.Sequential(nn.Identity()), images) == "no layer's output is"
    assert "images hold NaN" in first_non_finite(nn.Sequential(), torch.full((1, 2), math.nan))


class _Infinite(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e10


def test_a_model_with_too_few_classes_is_told(digits: data.Data) -> None:
    model = binarize(
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
    )
    with pytest.raises(InvalidData, match="the model has 3 classes"):
        train(model, RECIPE, digits)


def test_a_model_that_is_not_binarized_is_told(digits: data.Data) -> None:
    with pytest.raises(InvalidModel, match=r"Linear is not binarized; train\(binarize\(model\)"):
        train(nn.Linear(2, 2), RECIPE, digits)


def test_a_result_has_the_scheme_of_the_model_and_no_checkpoint_that_was_not_loaded(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, scheme="xnor", scheme_options={"gradient": "exact"}, epochs=1)
    model = build(recipe, digits)
    result = train(model, dataclasses.replace(recipe, scheme="bonn", scheme_options={}), digits)
    assert (result.scheme, result.recipe["scheme"]) == ("xnor:gradient=exact", "xnor")
    with pytest.raises(InvalidRecipe, match=r"does not load checkpoint = 'net.safetensors'; load it before"):
        train(model, dataclasses.replace(recipe, checkpoint="net.safetensors"), digits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "wrn22_61"}, "unknown model 'wrn22_61'; did you mean 'wrn22_64' or 'wrn22_16'"),
        ({"scheme": "bon"}, "unknown scheme 'bon'; did you mean 'bonn'"),
        ({"scheme_options": {"granularty": "plane"}}, "unknown option of the scheme 'bonn' 'granularty'; did you mean"),
        ({"skip": ("layer9",)}, "unknown module of WideResNet in skip 'layer9'; did you mean"),
    ],
)
def test_unknown_names_come_with_the_nearest(digits: data.Data, change: dict[str, object], words: str) -> None:
    with pytest.raises(UnknownName) as caught:
        build(dataclasses.replace(RECIPE, **change), digits)
    assert words in str(caught.value)


def test_scheme_options_reach_the_quantizer(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, scheme_options={"granularity": "plane", "shortcut": "block"})
    shapes = {name: tuple(p.shape) for name, p in build(recipe, digits).named_parameters() if "modulation" in name}
    assert set(shapes.values()) == {(1, 1, 3, 3)}


def test_skip_and_include_of_a_recipe_reach_the_network(digits: data.Data) -> None:
    record: Any = build(dataclasses.replace(RECIPE, skip=("layer3",), include=("conv1",)), digits).binarization
    assert record.kept["layer3.0.conv1"] == "skip 'layer3'"
    assert "conv1" in record.binary


# ------------------------------------------------------------------------------------------------ from a weights file


def test_a_run_leaves_weights_that_restore_the_network_without_its_data(digits: data.Data, tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    recipe = dataclasses.replace(
        RECIPE, scheme="xnor", scheme_options={"gradient": "plain"}, skip=("layer3",), checkpoint=str(start)
    )
    write_tensors(start, build(dataclasses.replace(recipe, checkpoint=""), digits).state_dict())
    kept: list[nn.Module] = []
    pm = plugins.create_manager()
    observer = ModuleType("observer")
    observer.bonn_qat_before_run = hookimpl(lambda model: kept.append(model))  # type: ignore[attr-defined]
    pm.register(observer)
    result = run(recipe, digits, tmp_path, pm=pm)
    assert isinstance(result, RunResult)
    start.unlink()
    state = torch.get_rng_state()
    model = load(tmp_path / RUNS / f"{recipe.name}.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    record: Any = model.binarization
    assert record.input_size == digits.image
    assert (record.scheme.name, record.kept["layer3.0.conv1"]) == ("xnor", "skip 'layer3'")
    images, targets = next(iter(digits.test_batches()))
    with torch.no_grad():
        assert torch.equal(model(images), kept[0].eval()(images))
        assert 100 * float((model(images).argmax(1) == targets).float().mean()) == pytest.approx(result.top1)


def test_what_a_run_left_float_is_restored_as_float(digits: data.Data, tmp_path: Path) -> None:
    stages = (Stage(share=0.5), Stage(share=0.5, weights="float", activations="clip"))
    recipe = dataclasses.replace(RECIPE, stages=stages)
    model = build(recipe, digits)
    train(model, recipe, digits)
    restored = load(write_tensors(tmp_path / "run.safetensors", model.state_dict(), weights_header(recipe, digits)))
    assert not any(layer.binary_weight for _, layer in binary_layers(restored))
    images, _ = next(iter(digits.test_batches()))
    with torch.no_grad():
        assert torch.equal(restored(images), model.eval()(images))


@pytest.mark.parametrize("scheme", ["float", "bireal-staged", "adabin"])
def test_every_kind_of_scheme_is_restored(scheme: str, digits: data.Data, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, scheme=scheme, latents="scheme")
    model = build(recipe, digits).eval()
    restored = load(write_tensors(tmp_path / "run.safetensors", model.state_dict(), weights_header(recipe, digits)))
    images, _ = next(iter(digits.test_batches()))
    assert torch.equal(restored(images), model(images))


def test_restoring_downloads_no_pretrained_weights(digits: data.Data, tmp_path: Path) -> None:
    model = build(RECIPE, digits)
    recipe = dataclasses.replace(RECIPE, model_options={"pretrained": True})
    load(write_tensors(tmp_path / "run.safetensors", model.state_dict(), weights_header(recipe, digits)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.clear(), "does not describe the network of its weights: an earlier version of"),
        (lambda header: header.update(stage=0), "is the checkpoint of an unfinished run"),
        (lambda header: header.update(format=2), "is of format 2; this version of bonn-qat reads 1"),
        (lambda header: header.pop("format"), "is of format None; this version of bonn-qat reads 1"),
        (lambda header: header.pop("classes"), r"is not a weights file: its keys differ in \['classes'\]"),
        (lambda header: header.update(image=[1, 8]), r"image is \(1, 8\); allowed: \[C, H, W\], each 1 to 1048576"),
        (lambda header: header.update(classes="ten"), "classes is 'ten'; a value of type int"),
        (lambda header: header.update(recipe=[]), r"recipe is \[\]; a value of type table"),
        (lambda header: header.update(classes=2**20), "it holds 79,.* numbers, but describes .* more than 67,"),
        (lambda header: header["recipe"].update(model="wrn40_64"), "describes a network of more than"),
        (
            lambda header: header["recipe"].update(model="vit_tiny_patch16_224", model_options={"depth": 20000}),
            "describes a network of more than",
        ),
        (lambda header: header.update(classes=2**21), "classes is 2097152; allowed: 1 to 1048576"),
        (lambda header: header["recipe"].update(model_options={"a": 1}), "timm cannot create 'wrn10_16' for 10 class"),
        (lambda header: header["recipe"].update(lrr=1), "cannot be restored: unknown key of a recipe 'lrr'; did you"),
        (lambda header: header["recipe"].update(lr="x"), "cannot be restored: lr of a recipe is 'x'"),
        (lambda header: header["recipe"].update(scheme="bon"), "cannot be restored: unknown scheme 'bon'; did you"),
        (lambda header: header["recipe"].update(scheme="xnor"), "not a checkpoint of this WideResNet: Unexpected key"),
        (lambda header: header.update(classes=3), "not a checkpoint of this WideResNet: size mismatch for fc.we"),
    ],
)  # fmt: skip
def test_a_file_that_restores_nothing_is_told(change: Any, words: str, digits: data.Data, tmp_path: Path) -> None:
    path, header = tmp_path / "run.safetensors", weights_header(RECIPE, digits)
    change(header)
    write_tensors(path, build(RECIPE, digits).state_dict(), header)
    with pytest.raises(InvalidData, match=rf"run\.safetensors .*{words}"):
        load(path)


def test_the_weights_of_an_earlier_version_and_an_unfinished_run_are_told(digits: data.Data, tmp_path: Path) -> None:
    model = build(RECIPE, digits)
    with pytest.raises(InvalidData, match="does not describe the network of its weights"):
        load(write_tensors(tmp_path / "run.safetensors", model.state_dict()))
    train(model, RECIPE, digits, checkpoint=tmp_path / "unfinished.safetensors")
    assert read_tensors(tmp_path / "unfinished.safetensors")[1]["recipe"] == RECIPE.to_dict()
    with pytest.raises(InvalidData, match="is the checkpoint of an unfinished run"):
        load(tmp_path / "unfinished.safetensors")
