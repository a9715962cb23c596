"""The schemes give what the code of their authors gives.

``official/NAME.json`` holds inputs, outputs and gradients of one module of that code, computed once in float64, with
its address, its commit and the files that it is in; nothing of the code itself. Parameters have the names of ours.
No input is 0, where the authors' sign is 0 and ours +1.
"""

import json
from pathlib import Path

import pytest
import torch
from bonn_qat_baselines.adabin import ADABIN
from bonn_qat_baselines.bireal import BIREAL
from bonn_qat_baselines.bnn import BnnSign, BnnWeight
from bonn_qat_baselines.dorefa import DorefaActivation, DorefaWeight
from bonn_qat_baselines.irnet import IRNET
from bonn_qat_baselines.reactnet import REACTNET
from bonn_qat_baselines.recu import RECU
from bonn_qat_baselines.tbn import TBN
from bonn_qat_baselines.xnor import XnorSign, XnorWeight
from torch import Tensor, nn

import bonn_qat.models  # noqa: F401
from bonn_qat import layers
from bonn_qat.models.birealnet import OneConvBlock

ROUNDING = {"rtol": 1e-12, "atol": 1e-13}
# The blocks of the papers, in the order of their code: two convolutions of AdaBin and ReCU are two of our blocks.
BLOCKS = {
    "bireal": (1, BIREAL.configure({"gradient": "clipped", "nonlinearity": "identity"})),
    "reactnet": (1, REACTNET),
    "adabin": (2, ADABIN.configure({"centre": "code"})),
    "recu": (2, RECU.configure({"nonlinearity": "hardtanh"})),
}


def official(name: str) -> dict:
    """The file's content, with lists of numbers as tensors of float64."""

    def tensors(value):
        if isinstance(value, dict):
            return {key: tensors(part) for key, part in value.items()}
        is_numbers = isinstance(value, list) and not isinstance(value[0], str)
        return torch.tensor(value, dtype=torch.float64) if is_numbers else value

    return tensors(json.loads((Path(__file__).parent / "official" / f"{name}.json").read_text(encoding="utf-8")))


def check_gradients(module: nn.Module, x: Tensor, y: Tensor, content: dict) -> None:
    parameters = {"x": x, **dict(module.named_parameters())}
    y.backward(content["grad"])
    for name, expected in content["gradients"].items():
        found = parameters[name].grad
        expected = torch.as_tensor(expected, dtype=torch.float64).reshape(found.shape)
        torch.testing.assert_close(found, expected, **ROUNDING, msg=lambda m, n=name: f"{n}: {m}")


def convolution(weight: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False, dtype=torch.float64)
    conv.weight.data.copy_(weight)
    return conv


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_with_its_norm_after_the_convolution_is_the_authors(name):
    content = official(name)
    count, scheme = BLOCKS[name]
    blocks = nn.Sequential(*(OneConvBlock(2, 2, 1).binary_form(scheme) for _ in range(count))).double()
    for block in blocks:
        block.conv = layers.binary_form(block.conv, scheme, normalize=False).double()
    block = blocks if count > 1 else blocks[0]
    own = dict(block.named_parameters())
    assert own.keys() == content["parameters"].keys()
    for key, value in content["parameters"].items():
        own[key].data.copy_(value)
    for part in block.modules():
        if "t" in content and hasattr(part, "t"):
            part.t.fill_(content["t"])
        if "tau" in content and hasattr(part, "bound"):
            part.bound.fill_(-torch.tensor(2 - 2 * content["tau"], dtype=torch.float64).log())
    x = content["x"].requires_grad_()
    y = block.train()(x)
    torch.testing.assert_close(y, content["y"], **ROUNDING)
    check_gradients(block, x, y, content)


@pytest.mark.parametrize(
    ("name", "scheme"), [("irnet", IRNET), ("tbn", TBN.configure({"variant": "tbnv2", "delta": 0.5}))]
)
def test_a_layer_is_the_authors(name, scheme):
    content = official(name)
    layer = layers.binary_form(convolution(content["weight"]), scheme, normalize=False).double().train()
    for part in layer.modules():
        if "t" in content and hasattr(part, "t"):
            part.t.fill_(content["t"])
    if name == "tbn":
        quantizer = layer.input_quant
        assert quantizer.running_threshold.item() == pytest.approx(content["running_before"], abs=1e-5)  # 0.7979
        quantizer.running_threshold.fill_(content["running_before"])
    x = content["x"].requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, content["y"], **ROUNDING)
    check_gradients(layer, x, y, content)
    if name == "tbn":
        assert quantizer.running_threshold.item() == pytest.approx(content["running_after"], rel=1e-12)


def test_xnor_with_centring_is_the_authors_up_to_their_factors_of_the_gradient():
    content = official("xnor")
    quantizer, weight = XnorWeight(content["weight"], centre=True), content["weight"].clone()
    quantizer.constrain(weight)
    torch.testing.assert_close(weight, content["constrained"], **ROUNDING)
    value, _ = quantizer.quantize(weight.requires_grad_())
    torch.testing.assert_close(value, content["value"], **ROUNDING)
    value.backward(content["grad"])
    inputs, elements = weight.shape[1], weight[0].numel()
    torch.testing.assert_close(weight.grad * (1 - 1 / inputs) * elements, content["weight_gradient"], **ROUNDING)


def test_xnor_signs_are_the_authors_but_for_the_gradient_at_one():
    content = official("xnor")
    x = content["x"].requires_grad_()
    value, mean = XnorSign(3, input_scale=True).quantize(x)
    torch.testing.assert_close(value, content["signs"], **ROUNDING)
    torch.testing.assert_close(mean, content["mean"], **ROUNDING)
    value.backward(content["x_grad"])
    at_one = x.abs() == 1
    assert at_one.sum() == 2
    torch.testing.assert_close(x.grad[~at_one], content["x_gradient"][~at_one], **ROUNDING)
    assert torch.equal(x.grad[at_one], content["x_grad"][at_one])
    assert not content["x_gradient"][at_one].any()


def test_bnn_is_the_authors():
    content = official("bnn")
    for quantizer, part, value, gradient in (
        (BnnWeight(content["weight"]), ("weight", "grad"), "value", "weight_gradient"),
        (BnnSign(), ("x", "x_grad"), "signs", "x_gradient"),
    ):
        x = content[part[0]].requires_grad_()
        y, _ = quantizer.quantize(x)
        assert torch.equal(y, content[value])
        y.backward(content[part[1]])
        assert torch.equal(x.grad, content[gradient])


@pytest.mark.parametrize("bits", ["1", "2", "4"])
def test_dorefa_is_tensorpacks(bits):
    content = official("dorefa")
    expected = content["bits"][bits]
    for quantizer, part, value, gradient in (
        (DorefaWeight(content["weight"], weight_bits=int(bits)), ("weight", "grad"), "value", "weight_gradient"),
        (DorefaActivation(activation_bits=int(bits)), ("x", "x_grad"), "levels", "x_gradient"),
    ):
        x = content[part[0]].requires_grad_()
        y, _ = quantizer.quantize(x)
        torch.testing.assert_close(y, expected[value], **ROUNDING)
        y.backward(content[part[1]])
        torch.testing.assert_close(x.grad, expected[gradient], **ROUNDING)
