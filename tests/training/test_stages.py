"""Stages, initializations and teachers of a run; an interruption changes nothing."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonn_qat import binarize, hookimpl, plugins
from bonn_qat.binarization.binarize import NORMS, binary_layers
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidData, InvalidRecipe, UnknownName
from bonn_qat.files.preprocessing import Preprocessing
from bonn_qat.layers import BinaryConv2d
from bonn_qat.scheme import ACTIVATIONS, Scheme, Stage
from bonn_qat.training import data
from bonn_qat.training.network import build, load, save, to_memory_format
from bonn_qat.training.precision import autocast
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.train import train

RECIPE = Recipe(model="wrn10_16", epochs=4, batch_size=32, train_images=96, test_images=64, latents="0.01", lr=0.1)
FLOAT_FIRST = (Stage(share=0.5, weights="float", activations="relu"), Stage(share=0.5))


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_images=96, test_images=64)


class _At:
    """Calls ``action(model)`` after an epoch, and keeps the model."""

    def __init__(self, epoch: int, action: Any) -> None:
        self.epoch, self.action, self.model = epoch, action, nn.Module()

    @hookimpl
    def bonn_qat_before_run(self, model: nn.Module) -> None:
        self.model = model

    @hookimpl
    def bonn_qat_after_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            self.action(self.model)


def _interrupt(model: nn.Module) -> None:
    raise KeyboardInterrupt


def _manager(*plugin: object) -> Any:
    pm = plugins.create_manager(entry_points=False)
    for one in plugin:
        pm.register(one)
    return pm


STAGED = (
    Stage(share=0.5, weights="float", activations="clip", regularizers={"center": 1e-3}),
    Stage(share=0.25, regularizers={"kernel": 1e-4, "feature": 1e-3}),
    Stage(share=0.25, regularizers={"kernel": 1e-4}, trains="norms", recompute_norms=True),
)


@pytest.mark.parametrize(
    ("changes", "at"),
    [({}, 1), ({}, 3), ({"optimizer": "adam", "lr": 0.01}, 2), ({"stages": STAGED}, 1), ({"stages": STAGED}, 3)],
    ids=["bonn-1", "bonn-3", "adam-2", "staged-1", "staged-3"],
)
def test_a_run_that_was_interrupted_ends_with_the_very_weights_of_one_that_was_not(
    tmp_path: Path, digits: data.Data, changes: dict[str, Any], at: int
) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    whole = build(recipe, digits)
    stopped, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
    undisturbed = train(whole, recipe, digits, pm=_manager())

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, recipe, digits, checkpoint=path, pm=_manager(_At(at, _interrupt)))
    torch.manual_seed(999)  # the process that goes on has other random numbers
    ticks: list[int] = []
    result = train(resumed, recipe, digits, checkpoint=path, tick=lambda: ticks.append(1), pm=_manager())
    assert result.epochs == undisturbed.epochs
    assert result.histograms == undisturbed.histograms
    assert len(ticks) == 4 * 3
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, digits: data.Data) -> None:
    path = tmp_path / "run.safetensors"
    train(build(RECIPE, digits), dataclasses.replace(RECIPE, epochs=1), digits, checkpoint=path, pm=_manager())
    with pytest.raises(
        InvalidData, match=r"run\.safetensors is not a checkpoint of this run: it has a different recipe; delete it"
    ):
        train(build(RECIPE, digits), RECIPE, digits, checkpoint=path, pm=_manager())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidData, match=r"run\.safetensors is not a complete safetensors file"):
        train(build(RECIPE, digits), RECIPE, digits, checkpoint=path, pm=_manager())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("float", lambda x: x),
        ("relu", lambda x: x.clamp(min=0)),
        ("clip", lambda x: x.clamp(-1, 1)),
        ("leaky_clip", lambda x: torch.where(x.abs() <= 1, x, x.sign() + 0.1 * (x - x.sign()))),
    ],
)
def test_a_stage_makes_a_layer_the_float_convolution_of_its_function(name: str, function: Any) -> None:
    layer = BinaryConv2d.from_float(nn.Conv2d(3, 4, 3, padding=1), BONN).eval()
    x = 2 * torch.randn(2, 3, 5, 5)
    binary = layer(x)
    layer.enter(Stage(weights="float", activations=name))
    expected = torch.conv2d(function(layer.norm(x)), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)
    layer.enter(Stage(activations=name))
    value = layer.weight.sign() * layer.weight_quant.modulation.mean()
    torch.testing.assert_close(layer(x), torch.conv2d(function(layer.norm(x)), value, layer.bias, padding=1))
    layer.enter(Stage())
    assert torch.equal(layer(x), binary)


def test_every_stand_in_is_tested() -> None:
    assert set(ACTIVATIONS) == {"binary", "float", "relu", "clip", "leaky_clip"}


def test_float_weights_keep_their_scale_until_the_first_binary_stage_adopts_them(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, stages=FLOAT_FIRST)
    float_net = build(dataclasses.replace(RECIPE, scheme="float"), digits)
    seen: dict[int, dict[str, Tensor]] = {}

    def look(epoch: int) -> _At:
        return _At(epoch, lambda model: seen.update({epoch: {k: v.clone() for k, v in model.state_dict().items()}}))

    model = build(recipe, digits, _manager())
    assert model.binarization.scheme.latent_std == 0.01
    for name, layer in binary_layers(model):
        assert torch.equal(layer.weight, float_net.get_parameter(f"{name}.weight"))
    result = train(model, recipe, digits, pm=_manager(look(2), look(3)))
    assert [epoch["stage"] for epoch in result.epochs] == [0, 0, 1, 1]
    for name, layer in binary_layers(model):
        key = f"{name}.weight"
        assert seen[2][key].std() > 0.03
        assert seen[3][key].std() < 0.02  # 0.01, and what the third epoch moved it by
        modulation = f"{name}.weight_quant.modulation"
        torch.testing.assert_close(seen[3][modulation].mean(), seen[2][key].abs().mean(), rtol=0.2, atol=0)
        assert layer.binary_weight
        assert layer.stand_in is None


def test_a_stage_that_trains_the_norms_leaves_everything_else(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, stages=(Stage(trains="norms"),))
    model = build(recipe, digits)
    frozen = next(p for n, p in model.named_parameters() if n == "bn.bias")
    frozen.requires_grad_(False)  # by the user: no stage thaws it
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, recipe, digits, pm=_manager())
    norms = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, NORMS) for k in ("weight", "bias")}
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved <= norms - {"bn.bias"}
    assert not frozen.requires_grad
    assert model.fc.weight.requires_grad is False
    train(model, dataclasses.replace(recipe, stages=(Stage(),)), digits, pm=_manager())


def test_norm_statistics_are_those_of_the_training_set_where_a_stage_asks_for_it(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=1, stages=(Stage(recompute_norms=True),))
    model = build(recipe, digits)
    train(model, recipe, digits, pm=_manager())
    inputs: list[Tensor] = []
    first = model.layer1[0].bn1
    handle = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for images, _ in digits.measure_batches():
            model.eval()(images)
    handle.remove()
    (whole,) = inputs  # 96 images are one batch
    torch.testing.assert_close(first.running_mean, whole.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, whole.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def _save(model: nn.Module, path: Path) -> str:
    safetensors.torch.save_file(model.state_dict(), path)
    return str(path)


def test_a_run_starts_from_a_float_checkpoint_or_from_an_earlier_run(tmp_path: Path, digits: data.Data) -> None:
    other = build(dataclasses.replace(RECIPE, scheme="float", seed=7), digits)
    recipe = dataclasses.replace(RECIPE, checkpoint=_save(other, tmp_path / "float.safetensors"))
    expected = binarize(other_float(other), dataclasses.replace(BONN, latent_std=0.01))
    for (name, a), (_, b) in zip(
        build(recipe, digits).state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    staged = dataclasses.replace(recipe, stages=FLOAT_FIRST)
    for name, layer in binary_layers(build(staged, digits)):
        assert torch.equal(layer.weight, other.get_parameter(f"{name}.weight"))

    model = build(RECIPE, digits)
    train(model, dataclasses.replace(RECIPE, epochs=1), digits, pm=_manager())
    recipe = dataclasses.replace(RECIPE, checkpoint=_save(model, tmp_path / "bonn.safetensors"))
    for (name, a), (_, b) in zip(model.state_dict().items(), build(recipe, digits).state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def other_float(model: nn.Module) -> nn.Module:
    """``model`` without the record that a scheme has treated it."""
    del model.binarization
    return model


@pytest.mark.parametrize("key", ["checkpoint", "teacher"])
def test_a_checkpoint_of_another_network_is_named(tmp_path: Path, digits: data.Data, key: str) -> None:
    wrong = _save(nn.Linear(2, 3), tmp_path / "linear.safetensors")
    recipe = dataclasses.replace(RECIPE, **{key: wrong})
    with pytest.raises(InvalidData, match=r"linear\.safetensors is not a checkpoint of this WideResNet: Missing key"):
        train(build(recipe, digits), recipe, digits, pm=_manager())
    recipe = dataclasses.replace(RECIPE, **{key: str(tmp_path / "nowhere")})
    with pytest.raises(InvalidData, match=r"cannot read .*nowhere"):
        train(build(recipe, digits), recipe, digits, pm=_manager())


class _Offers:
    """A plugin with one trained network."""

    def __init__(self, name: str, path: str) -> None:
        self.offered = plugins.Pretrained(name, Path(path))

    @hookimpl
    def bonn_qat_pretrained(self) -> list[plugins.Pretrained]:
        return [self.offered]


def _teacher(form: str, path: Path, digits: data.Data) -> nn.Module:
    """A network in a file: the state dict of the float one, or that of a binary one with images of its own kind."""
    if form == "state dict":
        teacher = build(dataclasses.replace(RECIPE, scheme="float", seed=3), digits)
        _save(teacher, path)
        return teacher
    teacher = build(dataclasses.replace(RECIPE, model="wrn22_16", seed=3), digits)
    teacher.preprocessing = Preprocessing(mean=(0.7,), std=(0.2,))  # type: ignore[assignment]
    save(teacher, path)
    return teacher


@pytest.mark.parametrize(
    ("form", "precision"),
    [("state dict", "float32"), ("state dict", "bfloat16"), ("file", "float32"), ("name", "float32")],
)
def test_a_teachers_logits_are_a_part_of_the_loss(tmp_path: Path, digits: data.Data, form: str, precision: str) -> None:
    path = tmp_path / "teacher.safetensors"
    teacher = _teacher(form, path, digits)
    # One step on all images without augmentation: the loss that is logged is that of the fresh network.
    recipe = dataclasses.replace(
        RECIPE, epochs=1, batch_size=96, augment=False, teacher="net.mine" if form == "name" else str(path),
        distillation=0.7, temperature=3.0, precision=precision,
    )  # fmt: skip
    model = build(recipe, digits)
    student = build(recipe, digits)
    ((images, targets),) = digits.measure_batches()
    images = images.contiguous(memory_format=torch.channels_last)
    to_memory_format(student, torch.channels_last)
    seen = images
    if form != "state dict":
        own = digits.preprocessing
        assert own is not None
        seen = (images * own.std[0] + own.mean[0] - 0.7) / 0.2
    with autocast(precision, torch.device("cpu")):
        logits, ours = teacher.eval()(seen).float(), student.train()(images).float()
    divergence = F.softmax(logits / 3, 1) * (F.log_softmax(logits / 3, 1) - F.log_softmax(ours / 3, 1))
    expected = 0.3 * F.cross_entropy(ours, targets) + 0.7 * 9 * divergence.sum(1).mean()
    result = train(model, recipe, digits, pm=_manager(_Offers("net.mine", str(path))))
    assert result.epochs[0]["train/task"] == pytest.approx(expected.item(), rel=1e-5)
    plain = train(student := build(RECIPE, digits), dataclasses.replace(RECIPE, epochs=1), digits, pm=_manager())
    assert plain.epochs[0]["train/task"] != result.epochs[0]["train/task"]
    assert student.state_dict().keys() == model.state_dict().keys()  # no teacher in it


def test_a_teacher_of_other_classes_is_named(tmp_path: Path, digits: data.Data) -> None:
    path = tmp_path / "teacher.safetensors"
    save(build(RECIPE, digits), path)
    save(load(path, num_classes=7), path)
    recipe = dataclasses.replace(RECIPE, teacher=str(path))
    with pytest.raises(InvalidData, match="of 1 channels into 7 classes; these data have 1 and 10"):
        train(build(recipe, digits), recipe, digits, pm=_manager())
    teacher = build(RECIPE, digits)
    assert digits.preprocessing
    teacher.preprocessing = dataclasses.replace(digits.preprocessing, labels=tuple("1023456789"))  # type: ignore[assignment]
    save(teacher, path)
    with pytest.warns(UserWarning, match="class 0 is '1' for the network and '0' in digits; the teacher .*teacher.saf"):
        train(build(recipe, digits), dataclasses.replace(recipe, epochs=1), digits, pm=_manager())
    recipe = dataclasses.replace(RECIPE, teacher="wrn22_16.nobody")
    with pytest.raises(UnknownName, match=r"unknown pretrained network .wrn22_16\.nobody."):
        train(build(recipe, digits), recipe, digits, pm=_manager())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "bin"}, UnknownName, "unknown weights of a stage 'bin'; .*known: binary, float"),
        ({"activations": "clop"}, UnknownName, "unknown activations of a stage 'clop'; did you mean 'clip'"),
        ({"trains": "none"}, UnknownName, "unknown trains of a stage 'none'; known: all, norms"),
        ({"share": 0.0}, InvalidRecipe, "above 0 and at most 1; got 0"),
    ],
)
def test_an_impossible_stage_is_told(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Stage(**options)


def test_stages_come_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        'teacher = "t.safetensors"\ndistillation = 1\n'
        '[[stages]]\nshare = 0.5\nweights = "float"\nactivations = "relu"\n'
        '[[stages]]\nshare = 0.5\ntrains = "norms"\nrecompute_norms = true\n'
    )
    recipe = Recipe.from_toml(file)
    assert recipe.stages == (
        Stage(share=0.5, weights="float", activations="relu"),
        Stage(share=0.5, trains="norms", recompute_norms=True),
    )
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(InvalidRecipe, match="distillation in the recipe is 2"):
        Recipe(distillation=2)


def test_quantizers_hear_of_the_progress_and_weights_are_constrained_after_each_step(digits: data.Data) -> None:
    from bonn_qat.quantizers import SteSign, WeightQuantizer

    heard: list[float] = []

    class Bounded(WeightQuantizer):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()

        def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sign() + x - x.detach(), x.new_ones(())

        def advance(self, progress: float) -> None:
            heard.append(progress)

        @torch.no_grad()
        def constrain(self, weight: Tensor) -> None:
            weight.clamp_(-1e-3, 1e-3)

    scheme = Scheme(name="bounded", title="Bounded", reference="none", weight=Bounded, activation=SteSign)

    class Plugin:
        @hookimpl
        def bonn_qat_schemes(self) -> list[Scheme]:
            return [scheme]

    pm = _manager(Plugin())
    recipe = dataclasses.replace(RECIPE, scheme="bounded", stages=(Stage(),))
    model = build(recipe, digits, pm)
    train(model, recipe, digits, pm=pm)
    count = len(dict(binary_layers(model)))
    assert heard == [progress for progress in (0, 0.25, 0.5, 0.75) for _ in range(count)]
    assert all(layer.weight.abs().max() == 1e-3 for _, layer in binary_layers(model))
