"""The config for torchao: prepare gives the network of binarize, convert changes no output."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidModel, UnknownName
from bonn_qat.layers import BinaryConv2d, BinaryLinear

timm = pytest.importorskip("timm")
pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torchao's, at import

from torchao.quantization import FqnToConfig, quantize_  # noqa: E402

from bonn_qat.adapters.torchao import BonnConfig, whole_model  # noqa: E402


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("resnet18", num_classes=5)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def of_binarize(module: nn.Module, name: str) -> bool:
    """The layers that binarize picks in a resnet18, and every ReLU."""
    is_block_conv = name.startswith("layer") and isinstance(module, nn.Conv2d) and "downsample" not in name
    return is_block_conv or isinstance(module, nn.ReLU)


def test_the_whole_model_becomes_what_binarize_makes_of_it(model: nn.Module, images: Tensor) -> None:
    expected = bonn_qat.binarize(model)
    quantize_(model, BonnConfig(), whole_model)
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in state)
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    assert model.binarization == expected.binarization
    assert torch.equal(model.eval()(images), expected.eval()(images))


def test_layer_by_layer_the_same_but_for_norms_at_zero_and_one_slope_for_all_channels(
    model: nn.Module, images: Tensor
) -> None:
    expected = bonn_qat.binarize(model)
    quantize_(model, BonnConfig(), of_binarize)
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    slopes = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.PReLU)}
    assert all(torch.equal(state[key].expand_as(wanted[key]), wanted[key]) for key in slopes)
    different = {key for key in state if key not in slopes and not torch.equal(state[key], wanted[key])}
    assert different == {f"{name}.weight" for name in expected.binarization.revived}
    model.load_state_dict({key: value[:1] if key in slopes else value for key, value in wanted.items()})
    # One layout for both, because torch's float layers may round differently in another.
    images = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.eval()(images), expected.eval()(images))
    assert torch.equal(bonn_qat.KernelLoss(model)(), bonn_qat.KernelLoss(expected)())


def test_skip_and_include_are_those_of_binarize(model: nn.Module) -> None:
    expected = bonn_qat.binarize(model, "xnor", skip=("layer1.*",), include=("fc",))
    quantize_(model, BonnConfig("xnor", skip=("layer1.*",), include=("fc",)), whole_model)
    assert model.binarization == expected.binarization
    assert "fc" in model.binarization.binary


def test_names_may_have_schemes_of_their_own(model: nn.Module) -> None:
    configs = OrderedDict([("layer1.0.conv1", BonnConfig("xnor")), (r"re:layer2\.\d\.conv2", BonnConfig("bonn"))])
    quantize_(model, FqnToConfig(configs), filter_fn=None)
    assert [name for name, _ in binary_layers(model)] == ["layer1.0.conv1", "layer2.0.conv2", "layer2.1.conv2"]
    assert type(model.layer1[0].conv1.weight_quant) is not type(model.layer2[0].conv2.weight_quant)


def test_torchao_s_default_filter_takes_the_linear_layers(model: nn.Module) -> None:
    quantize_(model, BonnConfig())
    assert {name: type(layer) for name, layer in binary_layers(model)} == {"fc": BinaryLinear}


@pytest.mark.parametrize("scheme", ["bonn", "xnor"])
def test_converting_changes_no_output_and_leaves_signs(model: nn.Module, images: Tensor, scheme: str) -> None:
    quantize_(model, BonnConfig(scheme), whole_model)
    with torch.no_grad():
        model(images)  # moves the norms' statistics, as a training does
        for parameter in model.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn_like(parameter)
    expected = model.eval()(images)
    quantize_(model, BonnConfig(scheme, step="convert"), whole_model)
    torch.testing.assert_close(model(images), expected)
    for _, layer in binary_layers(model):
        assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.int8, False)
        assert set(layer.weight.unique().tolist()) == {-1, 1}


def test_converting_layer_by_layer_is_converting_the_whole(model: nn.Module) -> None:
    quantize_(model, BonnConfig(), whole_model)
    other = copy.deepcopy(model)
    quantize_(model, BonnConfig(step="convert"), whole_model)
    quantize_(other, BonnConfig(step="convert"), lambda module, name: isinstance(module, BinaryConv2d))
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_bad_input_is_told(model: nn.Module) -> None:
    with pytest.raises(UnknownName, match="step of BonnConfig 'prepar'; did you mean 'prepare'"):
        BonnConfig(step="prepar")
    with pytest.raises(UnknownName, match="scheme 'bon'; did you mean 'bonn'"):
        BonnConfig("bon")
    with pytest.raises(InvalidModel, match=r"does not fit BatchNorm2d.*neither a convolution nor a Linear"):
        quantize_(model, BonnConfig(), lambda module, name: isinstance(module, nn.BatchNorm2d))
    with pytest.raises(InvalidModel, match="nothing to convert in ResNet"):
        quantize_(model, BonnConfig(step="convert"), whole_model)
    quantize_(model, BonnConfig(), whole_model)
    with pytest.raises(InvalidModel, match="already bin"):
        quantize_(model, BonnConfig(), whole_model)
    with pytest.raises(InvalidModel, match="BinaryConv2d is already binary"):
        quantize_(model, BonnConfig(), lambda module, name: name == "layer1.0.conv1")
