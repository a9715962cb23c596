"""DoReFa-Net's three quantizers against formulas in plain Python, in double precision."""

import math

import pytest
import torch
from bonn_qat_baselines.dorefa import DOREFA, DorefaActivation, DorefaWeight, GradientQuantizer
from torch import nn

from bonn_qat import BonnQatError
from bonn_qat.layers import BinaryConv2d

SHAPES = [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)]
BITS = [1, 2, 4, 8, 32]


def quantize_k(r, bits):
    n = 2**bits - 1
    return round(n * r) / n  # Python's round, too, takes halves to the even neighbour


def double(values, like):
    return torch.tensor(values, dtype=torch.float64).view_as(like)


def weights(shape):
    generator = torch.manual_seed(0)
    weight = 0.9 * torch.randn(shape, dtype=torch.float64, generator=generator)
    weight.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    weight.view(-1)[-1] = -2.5  # the largest, alone
    return weight, torch.randn(shape, dtype=torch.float64, generator=generator)


def f_w(weight, grad, bits):
    """Quantized weights and the gradient of W."""
    w, g = weight.flatten().tolist(), grad.flatten().tolist()
    if bits == 32:
        return weight, grad
    if bits == 1:
        scale = sum(map(abs, w)) / len(w)
        return double([scale if e >= 0 else -scale for e in w], weight), grad
    v = [math.tanh(e) for e in w]
    m = max(map(abs, v))
    j = [abs(e) for e in v].index(m)
    value = [2 * quantize_k(e / (2 * m) + 0.5, bits) - 1 for e in v]
    through_max = math.copysign(1, v[j]) * sum(a * b for a, b in zip(g, v, strict=True)) / m
    dw = [(1 - v[i] ** 2) / m * (g[i] - (through_max if i == j else 0.0)) for i in range(len(w))]
    return double(value, weight), double(dw, weight)


def activations(shape=(2, 4, 6, 5)):
    x = 0.5 + 0.6 * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(2))
    x.view(-1)[:5] = torch.tensor([0.0, 1.0, -1.0, -0.0, 0.5])
    return x


def f_a(x, bits):
    clipped = [min(max(e, 0.0), 1.0) for e in x.flatten().tolist()]
    return double(clipped if bits == 32 else [quantize_k(e, bits) for e in clipped], x)


def inside(x):
    return double([float(0 <= e <= 1) for e in x.flatten().tolist()], x)


def f_g(grad, bits, uniform):
    """Each sample's gradient with the noise made of ``uniform`` in [0, 1)."""
    n, result = 2**bits - 1, torch.empty_like(grad)
    for b in range(len(grad)):
        dr, u = grad[b].flatten().tolist(), uniform[b].flatten().tolist()
        peak = max(map(abs, dr))
        sample = [
            2 * peak * (quantize_k(d / (2 * peak) + 0.5 + (s - 0.5) / n, bits) - 0.5) if peak else 0.0
            for d, s in zip(dr, u, strict=True)
        ]
        result[b] = double(sample, grad[b])
    return result


def backward_of(quantizer, grad):
    x = torch.zeros_like(grad).requires_grad_()
    quantizer(x).backward(grad)
    return x.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_weights_and_their_gradient_are_the_papers(shape, bits):
    weight, grad = weights(shape)
    latent = weight.clone().requires_grad_()
    value, scale = DorefaWeight(weight, weight_bits=bits).quantize(latent)
    value.backward(grad)
    expected, dweight = f_w(weight, grad, bits)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(latent.grad, dweight, rtol=1e-9, atol=1e-12)
    assert scale.shape == ()
    assert not scale.requires_grad


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_of_k_bits_have_two_to_the_k_levels_from_minus_one_to_one(bits):
    weight = torch.linspace(-1, 1, 5001)
    value, scale = DorefaWeight(weight, weight_bits=bits).quantize(weight)
    torch.testing.assert_close(value.unique(), torch.linspace(-1, 1, 2**bits))
    assert value.unique().numel() == 2**bits
    assert scale == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_weights_are_plus_and_minus_one_scale_of_the_layer(dtype):
    weight = weights((3, 2, 3, 3))[0].to(dtype)
    value, scale = DorefaWeight(weight).quantize(weight)
    assert scale == weight.abs().mean()
    assert torch.equal(value, torch.where(weight >= 0, scale, -scale))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_layer_of_zeros_stays_finite(bits):
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    value, _ = DorefaWeight(weight.detach(), weight_bits=bits).quantize(weight)
    value.sum().backward()
    assert value.isfinite().all()
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (3, 7)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_activations_and_their_gradient_are_the_papers(shape, bits):
    x = activations(shape)
    leaf, grad = x.clone().requires_grad_(), torch.randn(shape, dtype=torch.float64)
    value, scale = DorefaActivation(activation_bits=bits).quantize(leaf)
    value.backward(grad)
    torch.testing.assert_close(value.detach(), f_a(x, bits), rtol=1e-12, atol=0)
    assert torch.equal(leaf.grad, grad * inside(x))
    assert scale.shape == ()
    assert scale == 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_activations_of_k_bits_have_two_to_the_k_levels_from_zero_to_one(bits):
    value, _ = DorefaActivation(activation_bits=bits).quantize(torch.linspace(-1, 2, 5001))
    torch.testing.assert_close(value.unique(), torch.linspace(0, 1, 2**bits))
    assert value.unique().numel() == 2**bits


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (4, 6)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 6, 8])
def test_the_gradient_is_the_papers_with_the_noise_of_the_same_seed(shape, bits):
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(3))
    grad *= torch.arange(len(grad), dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))  # the first sample's is 0
    torch.manual_seed(4)
    result = backward_of(GradientQuantizer(gradient_bits=bits), grad)
    torch.manual_seed(4)
    expected = f_g(grad, bits, torch.rand(shape, dtype=torch.float64))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-15)
    assert not result[0].any()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_quantized_gradient_has_the_gradient_as_its_mean(bits):
    draws, n, peak = 40_000, 2**bits - 1, 3.0
    dr = torch.tensor([peak, -2.9, -1.0, -0.4, 0.0, 0.1, 1.5, 2.5], dtype=torch.float64)
    torch.manual_seed(0)
    result = backward_of(GradientQuantizer(gradient_bits=bits), dr.repeat(draws, 1))
    spacing = 2 * peak / n
    for mean, value in zip(result.mean(0).tolist(), dr.tolist(), strict=True):
        # One of the two levels around it, the upper with the probability p: five standard deviations of the mean.
        p = (value + peak) / spacing % 1
        assert abs(mean - value) <= 5 * spacing * math.sqrt(p * (1 - p) / draws) + 1e-12, value


def test_the_noise_of_two_elements_is_independent():
    # In the middle of two levels, beside the peak that sets them: +1/3 or -1/3, each with probability one half.
    grad = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(20_000, 1)
    torch.manual_seed(0)
    signs = backward_of(GradientQuantizer(gradient_bits=2), grad)[:, 1:] * 3
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    assert abs(signs.prod(1).mean()) <= 5 / math.sqrt(20_000)
    assert abs((signs[1:] * signs[:-1]).mean()) <= 5 / math.sqrt(2 * 19_999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_samples_gradient_has_at_most_two_to_the_k_values_in_every_dtype(dtype, bits):
    grad = torch.randn(2, 10_000).to(dtype)
    result = backward_of(GradientQuantizer(gradient_bits=bits), grad)
    assert result.dtype == dtype
    for sample, original in zip(result, grad, strict=True):
        assert sample.unique().numel() <= 2**bits
        assert sample.abs().max() == original.abs().max()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24], ids=["least", "most"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_extremes_of_the_noise_leave_the_largest_gradient(monkeypatch, draw, bits):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, draw))
    grad = torch.tensor([[3.0, -3.0], [-0.1, 0.1]])
    result = backward_of(GradientQuantizer(gradient_bits=bits), grad)
    assert (result.abs() <= grad.abs()).all()


def test_the_gradient_quantizer_is_the_identity_forward_and_with_32_bits_backward():
    x, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    state = torch.get_rng_state()
    for bits in (4, 32):
        assert torch.equal(GradientQuantizer(3, gradient_bits=bits)(x), x)
    assert torch.equal(backward_of(GradientQuantizer(3), grad), grad)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("weight_bits", "activation_bits", "gradient_bits"), [(1, 4, 32), (1, 2, 4), (3, 3, 6)])
def test_a_layer_is_the_convolution_of_the_quantized(weight_bits, activation_bits, gradient_bits):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 3, 3, stride=2, padding=1).double()
    conv.weight.data.copy_(weights((3, 4, 3, 3))[0])
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits, "gradient_bits": gradient_bits}
    layer = BinaryConv2d.from_float(conv, DOREFA.configure(options), normalize=False)
    x, weight = activations(), layer.weight.detach().clone()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(5)
    y.backward(grad)

    inputs, kernels = f_a(x, activation_bits).requires_grad_(), f_w(weight, weight, weight_bits)[0].requires_grad_()
    expected = torch.conv2d(inputs, kernels, None, 2, 1)
    bias = layer.bias.detach().view(1, 3, 1, 1)
    torch.testing.assert_close(y.detach(), (expected + bias).detach(), rtol=1e-9, atol=1e-12)
    torch.manual_seed(5)
    uniform = torch.rand(y.shape, dtype=torch.float64)
    expected.backward(grad if gradient_bits == 32 else f_g(grad, gradient_bits, uniform))
    dweight = f_w(weight, kernels.grad, weight_bits)[1]
    torch.testing.assert_close(layer.weight.grad, dweight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaf.grad, inputs.grad * inside(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "bits", "constants", "scaled_sign"),
    [
        ({}, "1/4", 1, True),
        ({"weight_bits": 3, "activation_bits": 8}, "3/8", 0, False),
        ({"weight_bits": 32, "activation_bits": 32}, "32/32", 0, False),
        ({"activation_bits": 1, "gradient_bits": 6}, "1/1", 1, True),
    ],
)
def test_bits_and_stored_numbers_follow_the_options(options, bits, constants, scaled_sign):
    scheme = DOREFA.configure(options)
    weight = scheme.weight(torch.ones(2, 2, 1, 1))
    assert scheme.bits == bits
    assert weight.constants(torch.ones(2, 2, 1, 1)) == constants
    assert weight.scaled_sign == scaled_sign
    assert scheme.output(2).gradient_bits == options.get("gradient_bits", 32)


@pytest.mark.parametrize("option", ["weight_bits", "activation_bits", "gradient_bits"])
@pytest.mark.parametrize("value", [0, 9, 2.5, "4"])
def test_a_wrong_number_of_bits_is_told_with_what_is_allowed(option, value):
    message = rf"option {option} of the scheme 'dorefa' must be 1 to 8, or 32 for float; got {value!r}"
    with pytest.raises(BonnQatError, match=message):
        DOREFA.configure({option: value}).output(1)
