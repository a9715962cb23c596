"""Trained networks as files: what is saved is loaded, to the bit, or is refused before anything is written."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from bonn_qat_baselines.xnor import XnorWeight
from safetensors.torch import save_file
from torch import nn

import bonn_qat
from bonn_qat.errors import InvalidModel
from bonn_qat.plugins import find_scheme
from bonn_qat.scheme import Scheme
from bonn_qat.training import data
from bonn_qat.training.network import build, load, save
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.train import train

SIZE = (3, 32, 32)


def trained(model: nn.Module, size: tuple[int, ...] = SIZE) -> nn.Module:
    """One step of somebody's own loop, so that weights and statistics are nobody's defaults."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(torch.randn(4, *size)), torch.arange(4)).backward()
    optimizer.step()
    return model


def small(**options: object) -> nn.Module:
    model: nn.Module = timm.create_model("resnet10t", num_classes=5, **options)
    return model


OWN: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "by default": (lambda: bonn_qat.binarize(small(), input_size=SIZE), {}),
    "with options": (
        lambda: bonn_qat.binarize(small(), find_scheme("xnor").configure(
            {"gradient": "plain", "nonlinearity": "hardtanh", "latent_std": 0.02}), input_size=SIZE), {}
    ),
    "with layers of choice": (
        lambda: bonn_qat.binarize(small(), skip=["layer3"], include=["fc"], input_size=SIZE), {}
    ),
    "float": (lambda: bonn_qat.binarize(small(), "float", input_size=SIZE), {}),
    "with a predicate": (
        lambda: bonn_qat.binarize(small(), input_size=SIZE, predicate=lambda name, _: "conv2" not in name and None),
        {},
    ),
    "in another memory format": (
        lambda: bonn_qat.binarize(small(), input_size=SIZE).to(memory_format=torch.channels_last), {}
    ),
    "with one channel": (lambda: bonn_qat.binarize(small(in_chans=1), input_size=(1, 32, 32)), {}),
    "with options of its own": (
        lambda: bonn_qat.binarize(small(act_layer="gelu", stem_width=16), "reactnet", input_size=SIZE),
        {"act_layer": "gelu", "stem_width": 16},
    ),
    "of the paper, with norms at both places and equal outputs": (
        lambda: bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=5), find_scheme("bireal").configure(
            {"norm_position": "both", "projection": "conv_norm_pool", "latent_std": "equal-output"})), {}
    ),
    "of the paper": (
        lambda: bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=5), "adabin", input_size=SIZE), {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_network_of_ones_own_loop_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    make, options = OWN[name]
    model = make()
    size = model.binarization.input_size  # type: ignore[union-attr]
    trained(model, size)  # type: ignore[arg-type]
    was_training, state = model.training, torch.get_rng_state()
    path = save(model, tmp_path / "x.safetensors", model_options=options)
    assert model.training == was_training
    assert torch.equal(torch.get_rng_state(), state)
    found = load(str(path))
    assert not any(module.training for module in found.modules())
    assert found.binarization.input_size == size  # type: ignore[union-attr]
    assert found.binarization.binary == model.binarization.binary  # type: ignore[union-attr]
    images = torch.randn(8, *size)  # type: ignore[misc]
    with torch.no_grad():
        assert torch.equal(found(images), model.to(memory_format=torch.contiguous_format).eval()(images))


def gammas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def test_gammas_start_from_a_uniform_distribution_alike_in_every_scheme_and_nothing_else_changes() -> None:
    digits = data.load("digits", train_images=16, test_images=8)
    models = {}
    for scheme in ("float", "bonn", "bireal"):
        recipe = Recipe(model="wrn22_16", scheme=scheme, seed=3)
        plain = build(recipe, digits)
        random = torch.rand(2)
        models[scheme] = build(dataclasses.replace(recipe, norm_start="uniform"), digits)
        assert torch.equal(torch.rand(2), random)
        names = {f"{name}.weight" for name in gammas(plain)}
        assert all((gamma == 1).all() for gamma in gammas(plain).values())
        for key, value in models[scheme].state_dict().items():
            assert torch.equal(value, plain.state_dict()[key]) == (key not in names), key
        drawn = torch.cat(list(gammas(models[scheme]).values())).sort().values
        distance = (drawn - torch.linspace(0, 1, len(drawn))).abs().max()
        assert distance < 1.63 / len(drawn) ** 0.5  # Kolmogorov's, which 1% of samples exceed
    one, two, three = map(gammas, models.values())
    assert len({gamma[0].item() for gamma in three.values()}) == len(three)
    for other in (two, three):
        assert all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())
    assert one.keys() == two.keys() != three.keys()
    other_seed = build(Recipe(model="wrn22_16", scheme="float", seed=4, norm_start="uniform"), digits)
    assert not torch.equal(gammas(other_seed)["bn"], one["bn"])


def test_a_checkpoint_keeps_its_gammas(tmp_path: Path) -> None:
    digits = data.load("digits", train_images=16, test_images=8)
    recipe = Recipe(scheme="float")
    path = tmp_path / "float.safetensors"
    save_file({key: value + 1 for key, value in build(recipe, digits).state_dict().items()}, path)
    for scheme in ("float", "bireal"):
        started = dataclasses.replace(recipe, scheme=scheme, checkpoint=str(path))
        one, other = (build(dataclasses.replace(started, norm_start=start), digits) for start in ("one", "uniform"))
        assert all(torch.equal(gamma, gammas(one)[name]) for name, gamma in gammas(other).items())


def test_a_checkpoint_for_other_classes_starts_with_a_new_classifier(tmp_path: Path) -> None:
    digits = data.load("digits", train_images=16, test_images=8)
    recipe = Recipe(scheme="bonn", checkpoint=str(tmp_path / "five.safetensors"))
    five = build(dataclasses.replace(recipe, checkpoint="", model_options={}), digits)
    five.reset_classifier(5)  # type: ignore[operator]
    save_file({key: value + 1 for key, value in five.state_dict().items()}, recipe.checkpoint)
    with pytest.warns(UserWarning, match=r"five.safetensors sorts into 5 classes, the data have 10: fc starts anew"):
        found = build(recipe, digits).state_dict()
    expected = build(dataclasses.replace(recipe, checkpoint=""), digits).state_dict()
    for key, value in five.state_dict().items():
        assert torch.equal(found[key], expected[key] if key.startswith("fc.") else value + 1), key


def test_a_network_of_a_recipe_comes_back_and_can_be_trained_on_and_saved_again(tmp_path: Path) -> None:
    recipe = Recipe(
        model="wrn10_16", scheme="xnor", scheme_options={"gradient": "plain"}, model_options={"drop_rate": 0.1},
        epochs=1, batch_size=8, train_images=16, test_images=8,
    )  # fmt: skip
    digits = data.load("digits", train_images=16, test_images=8)
    model = build(recipe, digits)
    train(model, recipe, digits, device="cpu")
    found = load(save(model, str(tmp_path / "x.safetensors")))
    assert found.recipe.model_options["drop_rate"] == 0.1  # type: ignore[union-attr, index]
    images, _ = next(iter(digits.test_batches()))
    with torch.no_grad():
        assert torch.equal(found(images), model.eval()(images))
    train(found, recipe, digits, device="cpu")
    again = load(save(found, tmp_path / "y.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images), found.eval()(images))


def xnor(**changes: Any) -> Scheme:
    return dataclasses.replace(find_scheme("xnor"), **changes)


class Own(nn.Sequential):
    """Nobody's but the test's."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(5))
        self(torch.zeros(1, *SIZE))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a float network": (small, "ResNet cannot be rebuilt from a file: it is not binarized"),
    "a class of one's own": (
        lambda: bonn_qat.binarize(Own(), input_size=SIZE), "Own cannot be rebuilt from a file: it was not created"
    ),
    "other options of timm's": (
        lambda: bonn_qat.binarize(small(act_layer="gelu"), "reactnet", skip=["layer1"], input_size=SIZE),
        "builds another network .*; pass its arguments as model_options",
    ),
    "a network that was changed": (
        lambda: bonn_qat.binarize(nn.Sequential(small(), nn.Softmax(1)), input_size=SIZE), "not created by"
    ),
    "several schemes": (
        lambda: bonn_qat.binarize(small(), schemes={"layer4": "bireal"}, input_size=SIZE),
        "builds another network",
    ),
    "a scheme of one's own": (
        lambda: bonn_qat.binarize(small(), xnor(name="mine"), input_size=SIZE), "unknown scheme 'mine'"
    ),
    "a scheme that was changed": (
        lambda: bonn_qat.binarize(small(), xnor(weight=lambda weight: XnorWeight(weight, gradient="plain")),
                                  input_size=SIZE), "is not 'xnor' with options: the weight differs",
    ),
    "a function as an option": (
        lambda: bonn_qat.binarize(small(), xnor(nonlinearity=lambda channels: nn.ELU()), input_size=SIZE),
        "a value that no recipe can hold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(InvalidModel, match=words) as caught:
        save(make(), tmp_path / "x.safetensors")
    assert "safetensors.torch.save_file" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
