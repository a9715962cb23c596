"""Loading the state of a float model, or of a part of one, is binarizing after loading."""

import copy
import random
import re

import pytest
import timm
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.regularizers import KernelLoss

SCHEMES = ["bonn", "xnor", "reactnet", "adabin", "tbn", "mcn"]  # without and with parameters of their own


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x))))))


def net(blocks: int = 3, classes: int = 5) -> nn.Sequential:
    stem = nn.Conv2d(3, 8, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    return nn.Sequential(stem, *(Block(8) for _ in range(blocks)), head)


MODELS = {
    "net": net,
    "wrn10_16": lambda: timm.create_model("wrn10_16"),
    "resnet10t": lambda: timm.create_model("resnet10t", num_classes=5),
    "standardized": lambda: timm.create_model("resnetv2_18d", layers=(1, 1, 1, 1), num_classes=5,
                                              conv_layer=timm.layers.StdConv2d),
}  # fmt: skip


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(tensor, others[key]) for key, tensor in mine.items())


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """``model`` with every number away from its start; a quarter of the norms scale by zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) + 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and torch.rand((), generator=generator) < 0.25:
                module.weight.zero_()
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_float_model(name, scheme):
    other = scrambled(MODELS[name](), 0)
    given = other.state_dict()
    keys = list(given)
    expected = bonn_qat.binarize(other, scheme)
    model = scrambled(bonn_qat.binarize(MODELS[name](), scheme), 1)
    wrapped = nn.ModuleDict({"net": copy.deepcopy(model)})
    model.load_state_dict(given)
    assert list(given) == keys
    assert equal(model, expected)
    wrapped.load_state_dict({f"net.{key}": tensor for key, tensor in given.items()})
    assert equal(wrapped["net"], expected)


@pytest.mark.parametrize("seed", range(24))
def test_any_part_of_a_float_model(seed):
    """Random blocks and heads are missing or of another shape, below a random prefix: every layer counts for itself."""
    rng, scheme = random.Random(seed), SCHEMES[seed % len(SCHEMES)]
    other = scrambled(net(classes=rng.choice([5, 7])), seed)
    expected = dict(bonn_qat.binarize(other, scheme).named_modules())
    model = scrambled(bonn_qat.binarize(net(), scheme), seed + 100)
    before = copy.deepcopy(model)
    dropped = rng.sample(["0", "1", "2", "3", "4"], rng.randint(1, 3))
    given = {key: tensor for key, tensor in other.state_dict().items() if key.split(".")[0] not in dropped}
    prefix = rng.choice(["", "body.", "a.b."])
    outer = model
    for part in reversed(prefix.split(".")[:-1]):
        outer = nn.ModuleDict({part: outer})
    if given.get("4.2.weight", model[4][2].weight).shape != model[4][2].weight.shape:
        with pytest.raises(RuntimeError, match=r"size mismatch for .*4\.2\.weight"):
            outer.load_state_dict({prefix + key: tensor for key, tensor in given.items()}, strict=False)
        given = {key: tensor for key, tensor in given.items() if key[0] != "4"}
    else:
        found = outer.load_state_dict({prefix + key: tensor for key, tensor in given.items()}, strict=False)
        missing = {key for key in model.state_dict() if key[0] in dropped}
        missing -= {key for key in missing if "num_batches" in key}  # which torch supplies to old state dicts
        assert (set(found.missing_keys), found.unexpected_keys) == ({prefix + key for key in missing}, [])
    for block in ("0", "1", "2", "3"):
        source = before.get_submodule(block) if block in dropped else expected[block]
        assert equal(model.get_submodule(block), source), block


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_any_submodule_of_a_float_model(name, scheme):
    """Each is given its own state: the same as if the whole model were given."""
    other = scrambled(MODELS[name](), 0)
    expected = bonn_qat.binarize(other, scheme)
    model = scrambled(bonn_qat.binarize(MODELS[name](), scheme), 1)
    binary = scrambled(copy.deepcopy(expected), 2)
    parts = {key[: match.start()] for key in model.binarization.added for match in re.finditer(r"\.", key)}
    parts = [part for part in parts if any(True for _ in binary_layers(model.get_submodule(part)))]
    assert len(parts) > len(model.binarization.binary) / 2
    for part in parts:
        loaded = copy.deepcopy(model.get_submodule(part))
        loaded.load_state_dict(other.get_submodule(part).state_dict())
        assert equal(loaded, expected.get_submodule(part)), part
        loaded.load_state_dict(binary.get_submodule(part).state_dict())  # whose zeros stay
        assert equal(loaded, binary.get_submodule(part)), part


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_memory_is_filled(name, scheme):
    other = scrambled(MODELS[name](), 0)
    expected = bonn_qat.binarize(other, scheme, input_size=(3, 32, 32))
    with torch.device("meta"):
        assigned, emptied = (bonn_qat.binarize(MODELS[name](), scheme, input_size=(3, 32, 32)) for _ in range(2))
    assigned.load_state_dict(other.state_dict(), assign=True)
    assert equal(assigned, expected)
    emptied.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert equal(emptied, expected)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in other.state_dict().items()}
    with torch.device("meta"):
        model = bonn_qat.binarize(MODELS[name](), scheme, input_size=(3, 32, 32))
    model.load_state_dict(half, assign=True)
    assert {tensor.dtype for tensor in model.state_dict().values()} <= {torch.bfloat16, torch.int64}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_updating_the_models_own_state_dict_leaves_nothing_of_the_old_weights(scheme):
    other = scrambled(net(), 0)
    model = scrambled(bonn_qat.binarize(net(), scheme), 1)
    own = model.state_dict()
    own.update(other.state_dict())
    model.load_state_dict(own)
    assert equal(model, bonn_qat.binarize(other, scheme))
    before = copy.deepcopy(model)
    model.load_state_dict(model.state_dict())
    assert equal(model, before)


def test_layers_taken_out_of_the_model_load_float_weights_too():
    other = scrambled(net(), 0)
    parts = nn.Sequential(*list(scrambled(bonn_qat.binarize(net()), 1).children())[:-1])
    parts.load_state_dict({key: value for key, value in other.state_dict().items() if key[0] != "4"}, strict=False)
    expected = dict(binary_layers(bonn_qat.binarize(other)))
    for name, layer in binary_layers(parts):
        assert equal(layer, expected[name])


def test_a_frozen_layer_refuses_float_weights():
    model = bonn_qat.binarize(net())
    for _, layer in binary_layers(model):
        layer.freeze()
    with pytest.raises(
        RuntimeError, match=r"1\.conv1\.weight is a float weight, but this layer is frozen; load it before"
    ):
        model.load_state_dict(net().state_dict())


def test_the_kernel_loss_follows_float_weights_that_are_loaded_later_and_keeps_what_it_loads_itself():
    other, model = scrambled(net(), 0), bonn_qat.binarize(net())
    kernel = KernelLoss(model)
    model.load_state_dict(other.state_dict())
    kernel()
    fresh = KernelLoss(bonn_qat.binarize(other))
    assert equal(kernel, fresh)
    saved = scrambled(fresh, 1).state_dict()
    model.load_state_dict(other.state_dict())
    kernel.load_state_dict(saved)
    kernel()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in kernel.state_dict().items())


def test_loading_is_strict():
    model = bonn_qat.binarize(MODELS["wrn10_16"]())
    given = MODELS["wrn10_16"]().state_dict()
    given["layer9.weight"] = given.pop("fc.weight")
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        model.load_state_dict(given)
    wide = timm.create_model("wrn10_16", num_classes=11).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        model.load_state_dict(wide)
    half = model.state_dict()
    del half["layer1.0.conv1.weight_quant.modulation"]
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv1\.weight_quant\.modulation"):
        model.load_state_dict(half)
