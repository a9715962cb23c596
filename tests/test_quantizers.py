"""Quantizers: what every one of them owes its callers, and what BONN's adds."""

import pytest
import torch
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.quantizers import ApproxSign, BonnWeight, ParameterRule, Quantized, SteSign, WeightQuantizer

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.1
INPUT = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))

QUANTIZERS = {
    "bonn kernel": (BonnWeight(WEIGHT), WEIGHT),
    "bonn plane": (BonnWeight(WEIGHT, granularity="plane"), WEIGHT),
    "bonn linear": (BonnWeight(WEIGHT[:, :, 0, 0]), WEIGHT[:, :, 0, 0]),
    "ste": (SteSign(), INPUT),
    "approx": (ApproxSign(), INPUT),
}


@pytest.mark.parametrize(("quantizer", "x"), QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_quantizer_answers_brevitas_contract(quantizer, x):
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
