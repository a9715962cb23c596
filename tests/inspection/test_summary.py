"""Bits and MACs against arithmetic on paper and against three other counters."""

import dataclasses
import io
import math
import random
import warnings

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.binarization.binarize import BypassedLayers, binarize, binary_layers
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidModel
from bonn_qat.inspection.size_report import Report
from bonn_qat.inspection.summary import summary
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer

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
    slopes = 64 + 4 * (64 + 128 + 256 + 512)  # one for each channel
    assert (others["PReLU"].parameters, others["PReLU"].modules) == (slopes, 17)
    assert report.parameters == 11_689_512 + 6_784 + slopes


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
    assert report.macs == sum(layer.macs for layer in report.layers)
    assert report.binary_macs == sum(layer.binary_macs for layer in report.layers)
    assert report.bops == report.binary_macs + (report.macs - report.binary_macs) * 32 * 32
    kib = sum(x.size_kib for x in (*report.layers, *report.others))
    assert report.mbit == pytest.approx(kib * 8 * 1024 / 1e6)


def test_the_text_shows_every_layer_and_total(report):
    text = str(report)
    for layer in report.layers:
        assert layer.name in text
    words = ("33.86 Mbit", "1,676,279,808", "first layer", "36 x BatchNorm2d", "bonn", "layer1.*.bn2 (2)", "64x56x56")
    for word in words:
        assert word in text
    assert "scheme" not in text.splitlines()[2]
    assert "no MACs" not in text
    notes = [" ".join(line.split()) for line in text.splitlines()]
    assert notes[notes.index("stay float first layer: conv1") :][:3] == [
        "stay float first layer: conv1",
        "shortcut projection: layer2.0.downsample.0, layer3.0.downsample.0, layer4.0.downsample.0",
        "classifier: fc",
    ]
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_names_that_differ_in_numbers_alone_are_one_pattern(report):
    layers = [dataclasses.replace(report.layers[0], name=f"blocks.{i}.1.se", kept="gate") for i in range(12)]
    text = str(dataclasses.replace(report, layers=(*report.layers, *layers)))
    assert "gate: blocks.*.*.se (12)\n" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_is_never_too_narrow(report, width):
    lines = printed(report, width)
    assert all(len(line) <= width for line in lines)
    if width == 40:  # where the names break
        assert " ".join(lines[-1].split()).endswith("layer4.*.bn2 (2)")
        return
    numbers = {line.split()[0]: line.split()[-1] for line in lines if line.strip()}
    assert (numbers["conv1"], numbers["layer1.0.conv1"], numbers["fc"]) == ("118.01", "115.61", "0.51")
    left_out = [line for line in lines if line.startswith("not shown")]
    assert bool(left_out) == (width < 120)


def test_a_notebook_shows_the_same_and_escapes_it(report):
    page = dataclasses.replace(report, model="<i>")._repr_html_()
    assert page.startswith("<p>&lt;i&gt;, scheme bonn, one image of 3 x 224 x 224</p><table>")
    assert all(f">{layer.name}</td>" in page for layer in report.layers)
    assert "first layer: conv1" in page


def test_control_characters_do_not_reach_the_terminal(report):
    odd = dataclasses.replace(report, model="a\x1b[31m", layers=(dataclasses.replace(report.layers[0], name="\x07"),))
    assert not any(character in "".join(printed(odd, 80)) for character in "\x1b\x07")


def printed(report: Report, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    return console.file.getvalue().splitlines()


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
    assert (first.output, second.output, last.output) == ((4, 9, 9), (8, 4, 4), (5,))
    assert report.binary_weights == 144
    assert report.parameters == 112 + 152 + 45 + 8
    assert report.binarized_weights_share == 144 / report.parameters
    assert report.trainable == report.parameters + 2 * 9  # the modulation, of one element for each of a kernel's
    cells = next(line for line in str(report).splitlines() if "BinaryConv2d" in line).split()
    assert cells[2:] == ["8x4x4", "1/1", "144", "9", f"{second.size_kib:.2f}", "2,304"]
    assert [(o.type, o.modules, o.parameters) for o in report.others] == [("BatchNorm2d", 1, 8)]


@pytest.mark.parametrize(("activation", "bits"), [(None, 32), (FourBits, 4)], ids=["float", "four bits"])
def test_binary_weights_with_other_inputs_are_not_binary_macs(activation, bits):
    report = summary(binarize(small(), dataclasses.replace(PLAIN, activation=activation)), (3, 9, 9))
    layer = report.layers[1]
    assert (layer.weight_bits, layer.input_bits, layer.is_binary) == (1, bits, False)
    assert layer.bops == layer.macs * bits
    assert report.binary_macs == 0


def test_transposed_and_one_dimensional_convolutions():
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2))
    report = summary(model, (3, 10))
    assert [layer.macs for layer in report.layers] == [8 * 4 * 9, 8 * 4 * 3 * 2]


@pytest.mark.parametrize(
    ("kind", "axes"),
    [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)],
)
@pytest.mark.parametrize(("scheme", "scales"), [("bonn", 1), ("xnor", 6)])
def test_a_binary_layer_of_every_kind_has_the_macs_of_the_float_one_and_bits(kind, axes, scheme, scales):
    model = nn.Sequential(kind(3, 4, 1), kind(4, 6, 3, groups=2, bias=False), kind(6, 2, 1))
    size = (3, *[5] * axes)
    layer, plain = (summary(each, size).layers[1] for each in (binarize(model, scheme, input_size=size), model))
    assert (layer.type, layer.output, layer.macs) == (f"Binary{plain.type}", plain.output, plain.macs)
    assert (layer.weight_bits, layer.input_bits, layer.weights, layer.scales) == (1, 1, plain.weights, scales)


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
    hooks = [len(module._forward_hooks) for module in model.modules()]
    summary(model, (3, 9, 9))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_model_without_a_known_size_asks_for_it():
    with pytest.raises(InvalidModel, match=r"give input_size=\(C, H, W\)"):
        summary(small())


def test_the_size_it_was_binarized_for_is_the_default(resnet18):
    assert summary(binarize(resnet18, input_size=(3, 64, 96))).input_size == (3, 64, 96)


def test_a_vision_transformer_refuses_another_size():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(InvalidModel, match=r"VisionTransformer does not take an image of \(3, 64, 64\).*64.*224"):
        summary(model, (3, 64, 64))


def test_a_size_that_does_not_fit_is_named_and_leaves_no_trace():
    model = small()
    with pytest.raises(InvalidModel, match=r"Sequential does not take an image of \(4, 9, 9\)"):
        summary(model, (4, 9, 9))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_of_double_precision_counts_the_same():
    assert summary(small().double(), (3, 9, 9)) == summary(small(), (3, 9, 9))


class Odd(nn.Module):
    """A layer that is passed by, one that is of another kind, and one that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read, self.unused = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.grid = nn.Bilinear(6, 6, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return self.last(self.grid(x, nn.functional.linear(x, self.read.weight)))


def test_what_has_no_macs_here_is_told():
    with pytest.warns(BypassedLayers):
        model = binarize(Odd(), include=["first"], input_size=(1, 2, 2))
    report = summary(model)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["read"].output is layers["unused"].output is None
    assert (layers["grid"].type, layers["grid"].output, layers["grid"].weights) == ("Bilinear", (5,), 180)
    assert report.uncounted == ("read", "unused", "grid")
    assert report.macs == 24 + 10
    text = str(report)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "not called" in rows["read"]
    assert "the model reads its weight itself: read\n" in text
    assert "not reached by a forward pass: unused\n" in text
    assert "Bilinear is neither a convolution nor a Linear: grid\n" in text
    assert "not called, or of another kind: read, unused, grid" in text


def test_a_scheme_of_its_own_is_told():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.Conv2d(4, 4, 3, bias=False) for _ in range(2)), nn.Conv2d(4, 4, 3))
    per_filter = dataclasses.replace(PLAIN, name="per-filter", weight=PerFilter)
    report = summary(binarize(model, schemes={"2": per_filter}, include=["*"], skip=["0"]), (3, 9, 9))
    assert [layer.scheme for layer in report.layers] == [None, None, "per-filter", None]
    assert [layer.scales for layer in report.layers] == [0, 1, 4, 1]
    assert " per-filter" in str(report)


def test_the_scales_of_a_linear_layer_are_those_of_its_outputs():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    report = summary(binarize(model, dataclasses.replace(PLAIN, weight=PerFilter), input_size=(6,)), (6,))
    assert [layer.scales for layer in report.layers] == [0, 4, 0]
    assert [layer.binary_macs for layer in report.layers] == [0, 20, 0]


def test_the_gain_of_a_standardized_convolution_is_no_bit():
    report = summary(binarize(timm.create_model("test_nfnet", num_classes=10)))
    layer = next(layer for layer in report.layers if layer.name == "stages.0.0.conv2")
    assert (layer.weights, layer.biases) == (8 * 8 * 9, 8 + 8)


def test_a_frozen_model_costs_the_same():
    model = binarize(timm.create_model("test_resnet", num_classes=10))
    before = summary(model)
    for _, layer in binary_layers(model):
        layer.freeze()
    assert dataclasses.replace(summary(model), trainable=before.trainable) == before


NETS = ["resnet18", "mobilenetv2_050", "convnext_atto", "test_vit", "test_nfnet", "mixer_s32_224"]


@pytest.mark.parametrize("name", NETS)
def test_fvcore_counts_the_same_macs(name):
    fvcore = pytest.importorskip("fvcore.nn")
    model = timm.create_model(name, num_classes=10).eval()
    own = summary(model)
    other = fvcore.FlopCountAnalysis(model, torch.zeros(1, *own.input_size))
    other.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # Its FLOPs are MACs. Norms and pooling, which it counts too, are none, and attention's products have no weights.
    operators = other.by_operator()
    assert own.macs == operators["conv"] + operators["linear"]
    assert summary(binarize(model)).macs == own.macs


def test_qonnx_counts_the_same_macs_and_bits(tmp_path):
    # Of Brevitas' layers, for qonnx knows them; it takes a MAC for binary if both factors are -1 and +1, scales of 1.
    cost = pytest.importorskip("qonnx.util.inference_cost")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import brevitas.nn as qnn
        from brevitas.export import export_qonnx
        from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst

        options = {
            "weight_quant": SignedBinaryWeightPerTensorConst, "weight_scaling_init": 1.0, "return_quant_tensor": False,
            "input_quant": SignedBinaryActPerTensorConst, "input_scaling_init": 1.0, "bias": False,
        }  # fmt: skip
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), qnn.QuantConv2d(8, 16, 3, padding=1, stride=2, **options),
            nn.BatchNorm2d(16), qnn.QuantConv2d(16, 16, 3, groups=4, **options), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            qnn.QuantLinear(16, 12, **options), nn.Linear(12, 10),
        ).eval()  # fmt: skip
        own = summary(model, (3, 16, 16))
        export_qonnx(model, args=torch.zeros(1, 3, 16, 16), export_path=tmp_path / "model.onnx", dynamo=False)
        other = cost.inference_cost(str(tmp_path / "model.onnx"))["total_cost"]
    assert own.macs == other["total_macs"] == 150_072
    assert own.binary_macs == other["op_mac_BIPOLAR_BIPOLAR"] == 94_656
    assert own.bops == other["total_bops"]
    assert own.binary_weights == other["mem_w_BIPOLAR"]
    # It has no scales, biases and norms among the weights.
    floats = sum(layer.weights for layer in own.layers if not layer.is_binary)
    assert other["total_mem_w_bits"] == own.binary_weights + 32 * floats


@pytest.mark.parametrize("name", NETS)
def test_torchinfo_counts_the_same(name):
    torchinfo = pytest.importorskip("torchinfo")
    model = timm.create_model(name, num_classes=10)
    own = summary(model)
    other = torchinfo.summary(model, (1, *own.input_size), verbose=0, device="cpu")
    assert own.parameters == own.trainable == other.total_params
    layers = [x for x in other.summary_list if isinstance(x.module, nn.Conv2d)]
    # torchinfo takes the addition of a bias for one more multiply-accumulate of each output, and a linear layer's
    # product once, at however many positions it is.
    additions = sum(math.prod(x.output_size) for x in layers if x.module.bias is not None)
    convolutions = [layer.macs for layer in own.layers if "Conv2d" in layer.type]
    assert sum(convolutions) == sum(x.macs for x in layers) - additions


@pytest.mark.parametrize("seed", range(6))
def test_inputs_may_have_any_number_of_axes(seed):
    pick = random.Random(seed)
    width, axes = pick.randint(4, 9), seed % 3
    lead = tuple(pick.randint(2, 5) for _ in range(axes))  # none: a vector; one: tokens; two: a grid of them
    model = nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    binary = binarize(model, input_size=(*lead, width))
    report, positions = summary(binary), math.prod(lead)
    assert report.input_size == (*lead, width)
    assert report.macs == summary(model, (*lead, width)).macs == positions * (width * 8 + 64 + 24)
    assert report.binary_macs == positions * 64
    assert [layer.output for layer in report.layers] == [(*lead, 8), (*lead, 8), (*lead, 3)]
    assert f"one image of {' x '.join(map(str, (*lead, width)))}" in str(report)
    signal = nn.Sequential(nn.Conv1d(width, 8, 3), nn.Flatten(), nn.Linear(8 * 10, 8), nn.Linear(8, 3))
    assert summary(binarize(signal, input_size=(width, 12)), (width, 12)).macs == 10 * width * 8 * 3 + 640 + 24


@pytest.mark.parametrize("wrong", [16, "16", (3.0, 8, 8), (0,), (), torch.Size])
def test_a_size_that_is_none_is_told(wrong):
    with pytest.raises(InvalidModel, match=r"input_size is \(C, H, W\), such as \(3, 224, 224\); got"):
        summary(small(), wrong)
