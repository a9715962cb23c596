"""Quantizers: the contract that all of them keep, and what BONN's adds."""

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidRecipe
from bonn_qat.layers import BinaryConv2d
from bonn_qat.quantizers import ApproxSign, BonnWeight, ParameterRule, Quantized, SteSign, WeightQuantizer

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1
INPUT = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))

QUANTIZERS = {
    "bonn kernel": (BonnWeight(WEIGHT), WEIGHT),
    "bonn plane": (BonnWeight(WEIGHT, granularity="plane"), WEIGHT),
    "bonn filter": (BonnWeight(WEIGHT, granularity="filter"), WEIGHT),
    "bonn inverse": (BonnWeight(WEIGHT, reading="inverse"), WEIGHT),
    "bonn inverse filter": (BonnWeight(WEIGHT, reading="inverse", granularity="filter"), WEIGHT),
    "bonn derivative": (BonnWeight(WEIGHT, gradient="derivative"), WEIGHT),
    "bonn linear": (BonnWeight(WEIGHT[:, :, 0, 0]), WEIGHT[:, :, 0, 0]),
    "bonn linear filter": (BonnWeight(WEIGHT[:, :, 0, 0], granularity="filter"), WEIGHT[:, :, 0, 0]),
    "ste": (SteSign(), INPUT),
    "approx": (ApproxSign(), INPUT),
}


@pytest.mark.parametrize(("quantizer", "x"), QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_quantizer_follows_the_contract_of_brevitas(quantizer, x):
    answer = quantizer(x)
    assert isinstance(answer, Quantized)
    assert answer._fields == ("value", "scale", "zero_point", "bit_width")
    assert answer.value.shape == x.shape
    assert torch.equal(answer.value, answer.scale * functional.sign(x))
    assert answer.zero_point == 0
    assert answer.bit_width == 1
    assert not answer.scale.requires_grad


@pytest.mark.parametrize(("quantizer", "x"), QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_quantizer_keeps_the_dtype(quantizer, x, dtype):
    made = type(quantizer)(x.to(dtype)) if isinstance(quantizer, WeightQuantizer) else quantizer
    value, scale = made.quantize(x.to(dtype))
    assert value.dtype == scale.dtype == dtype


@pytest.mark.parametrize(("quantizer", "x"), QUANTIZERS.values(), ids=QUANTIZERS)
def test_parameter_rules_name_parameters(quantizer, x):
    assert set(quantizer.parameter_rules) <= set(dict(quantizer.named_parameters()))


@pytest.mark.parametrize(
    ("granularity", "shape"), [("kernel", (1, 4, 3, 3)), ("plane", (1, 1, 3, 3))], ids=["kernel", "plane"]
)
def test_the_modulation_starts_at_the_mean_magnitude(granularity, shape):
    quantizer = BonnWeight(WEIGHT, granularity=granularity)
    assert quantizer.modulation.shape == shape
    assert torch.equal(quantizer.modulation, WEIGHT.abs().mean().expand(shape))
    assert isinstance(quantizer.modulation, nn.Parameter)
    assert quantizer.parameter_rules["modulation"] == ParameterRule(slow=True, decay=True)


READINGS = ["algorithm1", "inverse"]


def test_a_modulation_of_filters_starts_at_the_mean_magnitude_of_each():
    quantizer = BonnWeight(WEIGHT, granularity="filter")
    assert quantizer.modulation.shape == (6, 1, 1, 1)
    expected = torch.stack([kernel.abs().mean() for kernel in WEIGHT])
    torch.testing.assert_close(quantizer.modulation.detach().flatten(), expected)
    assert quantizer.constants(WEIGHT) == 6
    assert BonnWeight(WEIGHT, granularity="plane").constants(WEIGHT) == 1


@pytest.mark.parametrize("start", ["mean_magnitude", "msra", "msra_fan_out", 0.05])
@pytest.mark.parametrize("granularity", ["kernel", "plane", "filter"])
def test_both_readings_start_at_the_same_values(granularity, start):
    one, other = (BonnWeight(WEIGHT, granularity=granularity, reading=r, start=start) for r in READINGS)
    (value, scale), (inverse_value, inverse_scale) = one.quantize(WEIGHT), other.quantize(WEIGHT)
    torch.testing.assert_close(value, inverse_value)
    torch.testing.assert_close(scale, inverse_scale)
    assert scale.shape == inverse_scale.shape
    torch.testing.assert_close(other.modulation, 1 / one.modulation)
    expected = {"msra": (2 / (4 * 3 * 3)) ** 0.5, "msra_fan_out": (2 / (6 * 3 * 3)) ** 0.5, 0.05: 0.05}
    if start in expected:
        torch.testing.assert_close(scale, torch.full_like(scale, expected[start]))


def test_the_papers_networks_start_at_the_mean_magnitude_of_the_msra_initialization():
    torch.manual_seed(0)
    model = timm.create_model("wrn10_16", scheme="bonn")
    for layer in (model.layer2[0].conv1, model.layer3[0].conv1, model.layer3[0].conv2):
        std = BonnWeight(layer.weight, start="msra_fan_out").modulation.mean().item()
        assert layer.weight_quant.modulation.mean().item() == pytest.approx((2 / math.pi) ** 0.5 * std, rel=0.03)


@pytest.mark.parametrize("granularity", ["kernel", "plane", "filter"])
@pytest.mark.parametrize("reading", READINGS)
def test_the_derivative_is_that_of_a_scale_times_an_estimated_sign(reading, granularity):
    weight = (8 * WEIGHT).double()  # beyond 1, too
    quantizer = BonnWeight(weight, granularity=granularity, reading=reading, gradient="derivative")
    with torch.no_grad():
        quantizer.modulation.mul_(torch.rand(quantizer.modulation.shape).double() + 0.5)
    latent = weight.clone().requires_grad_()
    value, scale = quantizer.quantize(latent)
    assert torch.equal(value, scale * functional.sign(weight))
    grad = torch.randn(value.shape).double()
    value.backward(grad)
    torch.testing.assert_close(latent.grad, grad * scale * (weight.abs() <= 1))

    # The value is linear in the scale, so its derivative by w is a difference of the scale alone.
    def through(w: Tensor) -> Tensor:
        values = 1 / w if reading == "inverse" else w
        return (values.mean((1, 2, 3), keepdim=True) * functional.sign(weight) * grad).sum()

    expected = torch.zeros_like(quantizer.modulation)
    for index in range(expected.numel()):
        step = torch.zeros_like(expected)
        step.view(-1)[index] = 1e-5
        w = quantizer.modulation.detach()
        expected.view(-1)[index] = (through(w + step) - through(w - step)) / 2e-5
    torch.testing.assert_close(quantizer.modulation.grad, expected, rtol=1e-6, atol=1e-9)


def test_the_inverse_modulation_stays_above_zero_and_no_other_is_touched():
    for reading, expected in (("algorithm1", [-1, 0, 5e-3, 3]), ("inverse", [0.01, 0.01, 0.01, 3])):
        quantizer = BonnWeight(WEIGHT[:4], granularity="filter", reading=reading)
        with torch.no_grad():
            quantizer.modulation.copy_(torch.tensor([-1, 0, 5e-3, 3]).reshape(4, 1, 1, 1))
        quantizer.constrain(WEIGHT)
        assert quantizer.modulation.flatten().tolist() == pytest.approx(expected)
    zeros = torch.zeros(2, 3, 3, 3)
    value, _ = BonnWeight(zeros, reading="inverse").quantize(zeros)
    assert value.isfinite().all()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("granularity", "granularity of BONN's modulation must be 'kernel', 'plane' or 'filter'; got 'none'"),
        ("reading", "reading of BONN's modulation must be 'algorithm1' or 'inverse'; got 'none'"),
        ("gradient", "gradient of BONN's weights must be 'printed' or 'derivative'; got 'none'"),
        ("start", "start of .*a number above 0, must be 'mean_magnitude', 'msra' or 'msra_fan_out'; got 'none'"),
    ],
)
def test_an_unknown_value_of_an_option_is_an_error(option, words):
    with pytest.raises(InvalidRecipe, match=words):
        BONN.configure({option: "none"})
    assert f"{option}={BONN.options[option]!r}" in repr(BonnWeight(WEIGHT))


@pytest.mark.parametrize(
    "options",
    [{"granularity": "filter"}, {"reading": "inverse"}, {"reading": "inverse", "granularity": "filter"}],
    ids=lambda options: "+".join(options.values()),
)
def test_a_layer_convolves_with_the_values_and_freezes_to_the_same(options):
    torch.manual_seed(0)
    layer = BinaryConv2d.from_float(nn.Conv2d(4, 6, 3, groups=2, padding=1), BONN.configure(options)).eval()
    with torch.no_grad():
        layer.weight_quant.modulation.mul_(torch.rand(layer.weight_quant.modulation.shape) + 0.5)
        if options.get("reading") != "inverse":
            layer.weight_quant.modulation[0].neg_()  # a learned scale may change its sign
    x = torch.randn(2, 4, 5, 5)
    y = layer(x)
    value, scale = layer.weight_quant.quantize(layer.weight)
    expected = torch.conv2d(functional.sign(layer.norm(x)), value, layer.bias, padding=1, groups=2)
    torch.testing.assert_close(y, expected)
    layer.freeze()
    assert layer.weight.dtype == torch.int8
    torch.testing.assert_close(layer(x), y)
    assert layer.weight_quant.constants(layer.weight) == scale.numel() == (6 if "granularity" in options else 1)


def test_the_scale_is_the_mean_of_the_modulation_with_its_sign():
    quantizer = BonnWeight(WEIGHT)
    with torch.no_grad():
        quantizer.modulation.copy_(torch.linspace(-3, 1, quantizer.modulation.numel()).view_as(quantizer.modulation))
    value, scale = quantizer.quantize(WEIGHT)
    assert scale.item() == pytest.approx(-1)
    assert torch.equal(value, scale * functional.sign(WEIGHT))


def test_adopt_follows_new_weights():
    quantizer = BonnWeight(WEIGHT)
    parameter = quantizer.modulation
    quantizer.adopt(3 * WEIGHT)
    assert quantizer.modulation is parameter
    torch.testing.assert_close(parameter.detach(), (3 * WEIGHT).abs().mean().expand_as(parameter))


def test_gradients_reach_latents_and_modulation():
    quantizer, latent = BonnWeight(WEIGHT), WEIGHT.clone().requires_grad_()
    value, _ = quantizer.quantize(latent)
    grad = torch.ones_like(value)
    value.backward(grad)
    torch.testing.assert_close(latent.grad, quantizer.modulation.detach().expand_as(latent))
    torch.testing.assert_close(quantizer.modulation.grad, WEIGHT.sum(0, keepdim=True))


def test_ste_sign_takes_its_clip():
    quantizer = SteSign(clip=0.5)
    x = torch.tensor([-1.0, -0.5, 0.2, 0.6], requires_grad=True)
    quantizer.quantize(x)[0].sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert "clip=0.5" in repr(quantizer)


def test_a_quantizer_of_ones_own_needs_one_method():
    class PerFilter(WeightQuantizer):
        def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
            scale = x.detach().abs().mean((1, 2, 3), keepdim=True)
            return scale * functional.ste_sign(x), scale

    answer = PerFilter()(WEIGHT)
    assert answer.scale.shape == (6, 1, 1, 1)
    assert answer.bit_width == 1
    with pytest.raises(TypeError, match="abstract"):
        WeightQuantizer()  # type: ignore[abstract]


@pytest.mark.parametrize("granularity", ["kernel", "filter"])
@pytest.mark.parametrize("options", [{}, {"reading": "inverse"}, {"gradient": "derivative"}], ids=str)
def test_every_reading_of_bonns_weights_compiles_as_one_graph(options, granularity):
    quantizer = BonnWeight(WEIGHT, granularity=granularity, **options)
    results = []
    for call in (quantizer.quantize, torch.compile(quantizer.quantize, backend="eager", fullgraph=True)):
        latent = WEIGHT.clone().requires_grad_()
        value, scale = call(latent)
        gradients = torch.autograd.grad(value, [latent, quantizer.modulation], WEIGHT.flip(0))
        results.append((value.detach(), scale, *gradients))
    for mine, compiled in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(mine, compiled)
    # The kernel, which has the printed reading with one w for all filters, adds in another order.
    by_kernel = granularity == "kernel" and not options
    torch.testing.assert_close(results[0][3], results[1][3], rtol=1e-6 * by_kernel, atol=1e-7 * by_kernel)
    assert results[0][3].any()
