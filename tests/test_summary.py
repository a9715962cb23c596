"""Bits and MACs against arithmetic on paper and against two other counters."""

import dataclasses
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from bonn_qat import binarize, functional
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidModel
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat.summary import Report, summary

PLAIN = dataclasses.replace(BONN, norm=None, nonlinearity=None)


class PerFilter(WeightQuantizer):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.detach().abs().mean((1, 2, 3), keepdim=True)
        return scale * functional.ste_sign(x), scale


class FourBits(ActivationQuantizer):
    bits = 4

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x.clamp(0, 1) * 15).round() / 15, x.new_ones(())


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return timm.create_model("resnet18")


@pytest.fixture(scope="module")
def report(resnet18) -> Report:
    return summary(binarize(resnet18))


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, groups=2),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def test_float_resnet18_has_the_known_size(resnet18):
    report = summary(resnet18)
    assert report.input_size == (3, 224, 224)
    assert report.parameters == 11_689_512
    assert report.mbit == report.float_mbit == pytest.approx(374.06, abs=0.005)
    assert report.macs == pytest.approx(1.81e9, rel=0.005)
    assert report.binary_macs == report.binarized_share == 0
    assert report.compression == 1
    assert report.scheme is None


def test_binary_resnet18_has_the_known_size(resnet18):
    report = summary(binarize(resnet18, PLAIN))
    assert report.parameters == 11_689_512
    binary = [layer for layer in report.layers if layer.is_binary]
    assert len(binary) == sum(layer.scales for layer in binary) == 16
    assert sum(layer.weights for layer in binary) == 10_985_472
    assert report.mbit == pytest.approx((10_985_472 + 704_040 * 32 + 16 * 32) / 1e6, rel=1e-12)
    assert report.mbit == pytest.approx(33.52, abs=0.005)
    assert report.compression == pytest.approx(11.16, abs=0.005)
    assert report.binary_macs == sum(layer.macs for layer in binary) == pytest.approx(1.68e9, rel=0.005)


def test_a_scale_per_filter_costs_a_float_each(resnet18):
    report = summary(binarize(resnet18, dataclasses.replace(PLAIN, weight=PerFilter)))
    assert sum(layer.scales for layer in report.layers) == 3_840
    assert report.mbit == pytest.approx(33.64, abs=0.005)
    assert report.compression == pytest.approx(11.12, abs=0.005)


def test_norms_and_nonlinearities_that_the_scheme_adds_are_counted(report):
    others = {other.type: other for other in report.others}
    assert others["BatchNorm2d"].parameters == 9_600 + 2 * (64 * 5 + 128 * 4 + 256 * 4 + 512 * 3)
    assert others["BatchNorm2d"].modules == 20 + 16
    assert others["PReLU"].parameters == others["PReLU"].modules == 17
    assert report.parameters == 11_689_512 + 6_784 + 17


def test_kept_layers_say_why(report):
    reasons = {layer.name: layer.kept for layer in report.layers}
    assert reasons["conv1"] == "first layer"
    assert reasons["fc"] == "classifier"
    assert reasons["layer2.0.downsample.0"] == "shortcut projection"
    assert reasons["layer1.0.conv1"] is None
    assert report.kept["fc"] == "classifier"
    assert report.scheme == "bonn"
    assert "layer1.0.bn2" in report.revived


def test_totals_are_the_sums_of_the_layers(report):
    assert report.macs == sum(layer.binary_macs + layer.float_macs for layer in report.layers)
    assert report.bops == report.binary_macs + (report.macs - report.binary_macs) * 32 * 32
    kib = sum(x.size_kib for x in (*report.layers, *report.others))
    assert report.mbit == pytest.approx(kib * 8 * 1024 / 1e6)


def test_the_text_shows_every_layer_and_total(report):
    text = str(report)
    for layer in report.layers:
        assert layer.name in text
    for word in ("33.73 Mbit", "1,676,279,808", "first layer", "36 x BatchNorm2d", "bonn", "layer1.0.bn2"):
        assert word in text
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_a_pattern_with_brackets_is_shown_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    assert "skip '[12]'" not in str(summary(model, (3, 9, 9)))
    assert "skip '[2]'" in str(summary(binarize(model, skip=["[2]"]), (3, 9, 9)))


def test_macs_and_bits_of_a_small_network_by_hand():
    report = summary(binarize(small(), PLAIN), (3, 9, 9))
    first, second, last = report.layers
    assert (first.macs, second.macs, last.macs) == (81 * 4 * 27, 16 * 8 * 2 * 9, 8 * 5)
    assert (first.weights, first.biases) == (108, 4)
    assert second.size_bits == 144 * 1 + 8 * 32 + 1 * 32
    assert (second.weight_bits, second.input_bits) == (1, 1)
    assert [(o.type, o.modules, o.parameters) for o in report.others] == [("BatchNorm2d", 1, 8)]


@pytest.mark.parametrize(("activation", "bits"), [(None, 32), (FourBits, 4)], ids=["float", "four bits"])
def test_binary_weights_with_other_inputs_are_not_binary_macs(activation, bits):
    report = summary(binarize(small(), dataclasses.replace(PLAIN, activation=activation)), (3, 9, 9))
    layer = report.layers[1]
    assert (layer.weight_bits, layer.input_bits, layer.is_binary) == (1, bits, False)
    assert layer.bops == layer.float_macs * bits
    assert report.binary_macs == 0


def test_transposed_and_one_dimensional_convolutions():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2))
    report = summary(model, (3, 10))
    assert [layer.macs for layer in report.layers] == [8 * 4 * 9, 8 * 4 * 3 * 2]


def test_a_shared_layer_costs_its_bits_once_and_its_macs_twice():
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    report = summary(nn.Sequential(conv, nn.ReLU(), conv), (3, 5, 5))
    assert report.parameters == 81
    assert report.macs == 2 * 25 * 3 * 27


def test_a_shared_weight_is_counted_once():
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    report = summary(nn.Sequential(one, two), (4,))
    assert report.parameters == 16
    assert report.macs == 32


def test_the_model_is_left_as_it_was():
    model = binarize(small())
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    summary(model, (3, 9, 9))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_a_known_size_asks_for_it():
    with pytest.raises(InvalidModel, match=r"give input_size=\(C, H, W\)"):
        summary(small())


def test_a_size_that_does_not_fit_is_named_and_leaves_no_trace():
    model = small()
    with pytest.raises(InvalidModel, match=r"Sequential does not take an image of \(4, 9, 9\)"):
        summary(model, (4, 9, 9))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_of_double_precision_counts_the_same():
    assert summary(small().double(), (3, 9, 9)) == summary(small(), (3, 9, 9))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "convnext_atto"])
def test_torchinfo_counts_the_same(name):
    torchinfo = pytest.importorskip("torchinfo")
    model = timm.create_model(name, num_classes=10)
    own = summary(model, (3, 64, 64))
    other = torchinfo.summary(model, (1, 3, 64, 64), verbose=0, device="cpu")
    assert own.parameters == other.total_params
    layers = [x for x in other.summary_list if isinstance(x.module, nn.Conv2d | nn.Linear)]
    # torchinfo takes the addition of a bias for one more multiply-accumulate of each output.
    additions = sum(math.prod(x.output_size) for x in layers if x.module.bias is not None)
    assert own.macs == sum(x.macs for x in layers) - additions
