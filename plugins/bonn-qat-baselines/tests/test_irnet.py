"""IR-Net's weights and activations against formulas written out element by element, in double precision."""

import itertools
import math

import pytest
import torch
from bonn_qat_baselines.irnet import IRNET, ErrorDecaySign, IrNetActivation, IrNetWeight
from torch import nn

import bonn_qat
from bonn_qat import BonnQatError
from bonn_qat.layers import BinaryConv2d

DOUBLE = {"dtype": torch.float64}
SHARPNESS = {0.0: 0.1, 0.25: 10**-0.5, 0.5: 1.0, 0.75: 10**0.5, 1.0: 10.0}  # t at some progress


def latents(shape):
    """Weights; where there is room, a filter of mean 0 that holds zeros, and one with a tail, hence a small scale."""
    weight = 1.5 * torch.randn(shape, generator=torch.manual_seed(0), **DOUBLE)
    if weight[0].numel() == 18:
        pairs = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 0.125, 0.375], **DOUBLE)
        weight[0] = torch.cat([torch.tensor([0.0, -0.0], **DOUBLE), pairs, -pairs]).view_as(weight[0])
        weight[1].view(-1)[7] = 100.0
    return weight


def decayed(x, t):
    """The error decay estimator's k t (1 - tanh(t x)^2), by the hyperbolic cosine."""
    return max(1 / t, 1.0) * t / math.cosh(t * x) ** 2


def reference_weight(weight, grad, t):
    """The values, the scales and the gradient, with the Jacobian of the standardization written out."""
    values, scales, dweights = [], [], []
    for w, g in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        n = len(w)
        mean = math.fsum(w) / n
        std = math.sqrt(math.fsum((e - mean) ** 2 for e in w) / (n - 1)) if n > 1 else 1.0
        z = [(e - mean) / std for e in w]
        magnitude = math.fsum(map(abs, z)) / n
        scale = 2.0 ** round(math.log2(magnitude)) if n > 1 else 1.0
        h = [scale * d * decayed(e, t) for d, e in zip(g, z, strict=True)]

        def jacobian(j, i, z=z, n=n, std=std):
            return ((i == j) - 1 / n - (z[j] * z[i] / (n - 1) if n > 1 else 0.0)) / std

        values.append([scale if e >= 0 else -scale for e in z])
        scales.append(scale)
        dweights.append([math.fsum(h[j] * jacobian(j, i) for j in range(n)) for i in range(n)])
    return *(torch.tensor(rows, **DOUBLE).view_as(weight) for rows in (values, dweights)), scales


def reference_sign(x, grad, t):
    value = torch.tensor([1.0 if e >= 0 else -1.0 for e in x.flatten().tolist()], **DOUBLE).view_as(x)
    slope = torch.tensor([decayed(e, t) for e in x.flatten().tolist()], **DOUBLE).view_as(x)
    return value, slope * grad


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("progress", SHARPNESS)
def test_value_and_gradient_are_those_of_standardized_weights(shape, progress):
    weight = latents(shape)
    grad = torch.randn(shape, generator=torch.manual_seed(1), **DOUBLE)
    quantizer = IrNetWeight(weight)
    quantizer.advance(progress)
    latent = weight.clone().requires_grad_()
    value, scale = quantizer.quantize(latent)
    value.backward(grad)
    expected, dweight, scales = reference_weight(weight, grad, SHARPNESS[progress])
    assert torch.equal(value, expected)
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert scale.flatten().tolist() == scales
    assert not scale.requires_grad
    close(latent.grad, dweight)


def test_scales_are_powers_of_two_and_zero_counts_as_plus_one():
    value, scale = IrNetWeight(latents((3, 2, 3, 3))).quantize(latents((3, 2, 3, 3)))
    assert scale.flatten().tolist() == [1.0, 0.5, 1.0]
    assert torch.equal(value.abs(), scale.expand_as(value))
    assert value[0].flatten()[:2].tolist() == [1, 1]  # 0.0 and -0.0 of a filter with mean 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("constant", [0.0, 0.1, -0.3, 1e-30])
def test_a_filter_of_equal_weights_stays_finite_and_the_others_do_not_notice(dtype, constant):
    weight = latents((3, 2, 3, 3)).to(dtype)
    expected = IrNetWeight(weight).quantize(weight)[0]
    weight[1] = constant
    latent = weight.clone().requires_grad_()
    value, scale = IrNetWeight(weight).quantize(latent)
    grad = torch.randn(value.shape, generator=torch.manual_seed(1), **DOUBLE).to(dtype)
    value.backward(grad)
    assert scale[1] == 1
    assert value[1].unique().tolist() == [1]
    assert torch.equal(value[[0, 2]], expected[[0, 2]])
    # For std = 1 the derivative is that of the centring; k t = 1 at the start.
    torch.testing.assert_close(latent.grad[1], grad[1] - grad[1].mean())


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (6, 5)], ids=str)
@pytest.mark.parametrize("progress", SHARPNESS)
def test_activations_are_signs_with_the_error_decay_estimator(shape, progress):
    x = 2 * torch.randn(shape, generator=torch.manual_seed(2), **DOUBLE)
    x.view(-1)[:6] = torch.tensor([0.0, -0.0, 1.0, -1.0, 10.0, -10.0], **DOUBLE)
    grad = torch.randn(shape, generator=torch.manual_seed(3), **DOUBLE)
    quantizer = IrNetActivation(shape[1]).double()
    quantizer.advance(progress)
    x.requires_grad_()
    value, scale = quantizer.quantize(x)
    value.backward(grad)
    expected, dx = reference_sign(x.detach(), grad, SHARPNESS[progress])
    assert torch.equal(value, expected)
    assert scale == 1
    close(x.grad, dx)


@pytest.mark.parametrize(("stride", "padding", "bias"), [(1, 1, False), (2, 0, True)])
def test_a_layer_has_the_gradients_of_a_convolution_of_the_binary_tensors(stride, padding, bias):
    x = torch.randn(2, 3, 5, 5, **DOUBLE)
    conv = nn.Conv2d(3, 4, 3, stride, padding, bias=bias, **DOUBLE)
    layer = BinaryConv2d.from_float(conv, IRNET, normalize=False).double()
    bonn_qat.advance(layer, 0.75)
    weight, t = conv.weight.detach().clone(), SHARPNESS[0.75]
    signs = reference_sign(x, x, t)[0].requires_grad_()
    kernels = reference_weight(weight, weight, t)[0].requires_grad_()
    expected = torch.conv2d(signs, kernels, conv.bias, stride, padding)
    grad = torch.randn(expected.shape, generator=torch.manual_seed(1), **DOUBLE)
    expected.backward(grad)

    layer.zero_grad()
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    close(y, expected)
    close(x.grad, reference_sign(x.detach(), signs.grad, t)[1])
    close(layer.weight.grad, reference_weight(weight, kernels.grad, t)[1])
    if bias:
        close(layer.bias.grad, grad.sum((0, 2, 3)))


def test_progress_sharpens_the_backward_and_leaves_the_forward():
    conv = nn.Conv2d(3, 4, 3, **DOUBLE)
    layer = BinaryConv2d.from_float(conv, IRNET, normalize=False).double()
    x = torch.randn(2, 3, 5, 5, requires_grad=True, **DOUBLE)
    outputs, gradients = [], []
    for progress in (0.0, 0.5, 0.9):
        bonn_qat.advance(layer, progress)
        y = layer(x)
        outputs.append(y)
        gradients.append(torch.autograd.grad(y.square().sum(), (x, layer.weight)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    for earlier, later in itertools.pairwise(gradients):
        for a, b in zip(earlier, later, strict=True):
            assert not torch.allclose(a, b)


def test_t_goes_from_t_min_to_t_max_by_equal_factors():
    sign = ErrorDecaySign("irnet", 0.001, 10.0).double()
    found = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        sign.advance(progress)
        found.append(sign.t.item())
    assert found == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 10.0], rel=1e-12)
    assert IrNetWeight(torch.zeros(2, 5, **DOUBLE)).sign.t.item() == 0.1  # not single precision's


def test_inputs_and_weights_have_one_bit_and_a_filter_one_constant():
    weight = torch.randn(6, 3, 3, 3)
    assert IRNET.bits == "1/1"
    assert IRNET.weight(weight).constants(weight) == 6
    assert IRNET.activation(3).quantize(torch.randn(2, 3, 8, 8))[0].unique().tolist() == [-1, 1]


def test_the_schedule_is_an_option_of_weights_and_activations():
    assert IRNET.options == {"t_min": 0.1, "t_max": 10.0}
    scheme = IRNET.configure({"t_min": 0.001, "t_max": 5.0})
    for quantizer in (scheme.weight(torch.zeros(2, 1, 1, 1)), scheme.activation(1)):
        assert quantizer.sign.t == pytest.approx(0.001)
        quantizer.advance(1.0)
        assert quantizer.sign.t == pytest.approx(5.0)
        assert "t_min=0.001, t_max=5.0" in repr(quantizer)


@pytest.mark.parametrize(("t_min", "t_max"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_an_impossible_schedule_is_refused(t_min, t_max):
    with pytest.raises(BonnQatError, match=rf"'irnet' .* 0 < t_min <= t_max; got t_min={t_min} and t_max={t_max}"):
        IRNET.configure({"t_min": t_min, "t_max": t_max})
    with pytest.raises(BonnQatError, match="'irnet'"):
        IrNetActivation(t_min=t_min, t_max=t_max)
