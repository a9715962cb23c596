"""ReCU's weights and activations against formulas written out element by element, in double precision."""

import math

import pytest
import torch
from bonn_qat_baselines import recu
from bonn_qat_baselines.recu import RECU, RecuActivation, RecuWeight
from torch import nn

import bonn_qat
from bonn_qat import BonnQatError, plugins
from bonn_qat.layers import BinaryConv2d

DOUBLE = {"dtype": torch.float64}
A = (0.99 - 0.85) / (math.e - 1)
TAU = {progress: A * math.e**progress + 0.85 - A for progress in (0.0, 0.5, 1.0)}


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(recu)
    return manager


def latents(shape):
    """Weights with a long tail, so that some are clamped at every tau, and 0.0 and -0.0 in a filter of mean 0."""
    weight = torch.randn(shape, generator=torch.manual_seed(0), **DOUBLE) ** 3
    if weight[0].numel() == 18:
        pairs = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5, 8.0, 0.125, 0.375], **DOUBLE)
        weight[0] = torch.cat([torch.tensor([0.0, -0.0], **DOUBLE), pairs, -pairs]).view_as(weight[0])
    return weight


def sample(x):
    """Mean and sqrt(var + 1e-5) of a list, and the derivatives of (x_j - c) / that for a constant c, as a function."""
    n = len(x)
    mean = math.fsum(x) / n
    root = math.sqrt((math.fsum((e - mean) ** 2 for e in x) / (n - 1) if n > 1 else 0.0) + 1e-5)

    def jacobian(j, i, c):
        through_var = (x[j] - c) * (x[i] - mean) / ((n - 1) * root**3) if n > 1 else 0.0
        return (i == j) / root - through_var

    return mean, root, jacobian


def reference_weight(weight, alpha, grad, clamp):
    """The values, the gradients of W and alpha, and how many weights are clamped; ``clamp`` is Q / mean|W_1|."""
    filters, c = weight.flatten(1).tolist(), 2 * math.sqrt(2)
    moments = [sample(w) for w in filters]
    w1 = [[c * (e - mean) / root for e in w] for w, (mean, root, _) in zip(filters, moments, strict=True)]
    flat = [abs(e) for row in w1 for e in row]
    q = clamp * math.fsum(flat) / len(flat)
    values, dweights, dalpha = [], [], []
    for z, g, a, (mean, root, jacobian) in zip(w1, grad.flatten(1).tolist(), alpha.tolist(), moments, strict=True):
        n = len(z)
        signs = [1.0 if e >= 0 else -1.0 for e in z]
        h = [a * d if abs(e) <= q else 0.0 for d, e in zip(g, z, strict=True)]
        values.append([a * s for s in signs])
        dalpha.append(math.fsum(d * s for d, s in zip(g, signs, strict=True)))
        dweights.append(
            [c * math.fsum(h[j] * (jacobian(j, i, mean) - 1 / (n * root)) for j in range(n)) for i in range(n)]
        )
    value, dweight = (torch.tensor(rows, **DOUBLE).view_as(weight) for rows in (values, dweights))
    return value, dweight, torch.tensor(dalpha, **DOUBLE), sum(e > q for e in flat)


def reference_sign(x, grad, training=True):
    """Signs, and the gradient of x by way of x / sqrt(var + 1e-5), sample by sample."""
    value = torch.where(x < 0, -1.0, 1.0).double()
    dx = []
    for row, g in zip(x.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        n = len(row)
        _, root, jacobian = sample(row) if training else (0.0, 1.0, lambda j, i, c: float(i == j))
        h = [d * max(0.0, 2 - 2 * abs(e / root)) for d, e in zip(g, row, strict=True)]
        dx.append([math.fsum(h[j] * jacobian(j, i, 0.0) for j in range(n)) for i in range(n)])
    return value, torch.tensor(dx, **DOUBLE).view_as(x)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("progress", TAU)
def test_value_and_gradients_are_those_of_clamped_standardized_weights(shape, progress):
    weight = latents(shape)
    grad = torch.randn(shape, generator=torch.manual_seed(1), **DOUBLE)
    alpha = torch.tensor([0.7, -0.4, 1.3, 0.2], **DOUBLE)[: shape[0]]
    quantizer = RecuWeight(weight)
    with torch.no_grad():
        quantizer.alpha.copy_(alpha)
    quantizer.advance(progress)
    latent = weight.clone().requires_grad_()
    value, scale = quantizer.quantize(latent)
    value.backward(grad)
    expected, dweight, dalpha, clamped = reference_weight(weight, alpha, grad, -math.log(2 - 2 * TAU[progress]))
    assert torch.equal(value, expected)
    assert torch.equal(value, scale * torch.where(value < 0, -1.0, 1.0))
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert not scale.requires_grad
    close(latent.grad, dweight)
    close(quantizer.alpha.grad, dalpha)
    assert clamped or shape[0] != 3  # otherwise the clamp would go untested


def test_fewer_weights_are_clamped_as_the_training_proceeds():
    counts = [
        reference_weight(latents((3, 2, 3, 3)), torch.ones(3), torch.ones(3, 2, 3, 3), -math.log(2 - 2 * tau))[-1]
        for tau in TAU.values()
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0


def test_the_bound_of_the_clamp_lies_inside():
    weight = torch.tensor([0.5, -0.5], **DOUBLE).repeat(16).view(2, 4, 2, 2)  # all |W_1| equal, to the last bit
    grad = torch.randn(weight.shape, generator=torch.manual_seed(1), **DOUBLE)
    quantizer, latent = RecuWeight(weight), weight.clone().requires_grad_()
    for bound, reach in ((1.0, True), (1 - 1e-12, False)):
        latent.grad = None
        quantizer.bound.fill_(bound)
        quantizer.quantize(latent)[0].backward(grad)
        _, dweight, _, clamped = reference_weight(weight, quantizer.alpha.detach(), grad, bound)
        assert clamped == (0 if reach else 32)
        assert bool(latent.grad.any()) == reach
        close(latent.grad, dweight)


def test_each_filter_has_two_values_and_zero_counts_as_plus_one():
    weight = latents((3, 2, 3, 3))
    value, scale = RecuWeight(weight).quantize(weight)
    assert torch.equal(value.abs(), scale.expand_as(value))
    assert value[0].flatten()[:2].tolist() == [scale[0].item()] * 2  # 0.0 and -0.0 of a filter with mean 0


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_layer_of_equal_weights_stays_finite(constant):
    latent = torch.full((2, 3, 3, 3), constant, requires_grad=True)
    value, _ = RecuWeight(latent.detach()).quantize(latent)
    value.sum().backward()
    assert value.isfinite().all()
    assert latent.grad.isfinite().all()


def test_alpha_starts_at_the_mean_magnitude_and_does_not_decay(pm):
    weight = latents((3, 2, 3, 3))
    quantizer = RecuWeight(weight)
    close(quantizer.alpha.detach(), torch.tensor([w.abs().sum() / 18 for w in weight], **DOUBLE))
    parameter = quantizer.alpha
    quantizer.adopt(3 * weight)
    assert quantizer.alpha is parameter
    close(parameter.detach(), torch.tensor([3 * w.abs().sum() / 18 for w in weight], **DOUBLE))
    (group,) = bonn_qat.parameter_groups(quantizer, lr=1.0, weight_decay=0.1)
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (3, 1, 1, 1), (3, 5), (4, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_activations_are_signs_of_standardized_inputs_in_training(shape, training):
    x = 1.5 * torch.randn(shape, generator=torch.manual_seed(2), **DOUBLE)
    corners = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.25], **DOUBLE)
    x.view(-1)[: len(corners)] = corners[: x.numel()]
    grad = torch.randn(shape, generator=torch.manual_seed(3), **DOUBLE)
    quantizer = RecuActivation(shape[1]).train(training)
    x.requires_grad_()
    value, scale = quantizer.quantize(x)
    value.backward(grad)
    expected, dx = reference_sign(x.detach(), grad, training)
    assert torch.equal(value, expected)
    assert scale == 1
    assert dx.any()
    close(x.grad, dx)


@pytest.mark.parametrize(("stride", "padding", "bias"), [(1, 1, False), (2, 0, True)])
def test_a_layer_has_the_gradients_of_a_convolution_of_the_binary_tensors(stride, padding, bias):
    x = torch.randn(2, 3, 5, 5, **DOUBLE)
    conv = nn.Conv2d(3, 4, 3, stride, padding, bias=bias, **DOUBLE)
    layer = BinaryConv2d.from_float(conv, RECU, normalize=False).double()
    bonn_qat.advance(layer, 0.5)
    alpha = torch.tensor([0.7, -0.4, 1.3, 0.2], **DOUBLE)  # one is negative
    with torch.no_grad():
        layer.weight_quant.alpha.copy_(alpha)
    weight, clamp = conv.weight.detach().clone(), -math.log(2 - 2 * TAU[0.5])
    signs = reference_sign(x, x)[0].requires_grad_()
    kernels = reference_weight(weight, alpha, weight, clamp)[0].requires_grad_()
    expected = torch.conv2d(signs, kernels, conv.bias, stride, padding)
    grad = torch.randn(expected.shape, generator=torch.manual_seed(1), **DOUBLE)
    expected.backward(grad)
    _, dweight, dalpha, _ = reference_weight(weight, alpha, kernels.grad, clamp)

    layer.zero_grad()
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    close(y, expected)
    close(x.grad, reference_sign(x.detach(), signs.grad)[1])
    close([layer.weight.grad, layer.weight_quant.alpha.grad], [dweight, dalpha])
    if bias:
        close(layer.bias.grad, grad.sum((0, 2, 3)))


def test_progress_changes_the_backward_and_never_the_forward():
    weight = latents((3, 2, 3, 3)).requires_grad_()
    quantizer = RecuWeight(weight.detach())
    values, gradients = [], []
    for progress in (0.0, 0.5, 1.0):
        quantizer.advance(progress)
        value, _ = quantizer.quantize(weight)
        values.append(value)
        gradients.append(torch.autograd.grad((value * weight.detach()).sum(), weight)[0])
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])


def test_inputs_and_weights_have_one_bit_and_a_filter_one_constant():
    weight = torch.randn(6, 3, 3, 3)
    assert RECU.bits == "1/1"
    assert RECU.weight(weight).constants(weight) == 6
    assert RECU.activation(3).quantize(torch.randn(2, 3, 8, 8))[0].unique().tolist() == [-1, 1]


def test_tau_is_an_option_of_the_scheme():
    assert RECU.options == {"tau_min": 0.85, "tau_max": 0.99}
    quantizer = RECU.configure({"tau_min": 0.6, "tau_max": 0.9}).weight(torch.zeros(1, 1, 1, 1, **DOUBLE))
    assert quantizer.bound.item() == pytest.approx(-math.log(0.8))
    quantizer.advance(1.0)
    assert quantizer.bound.item() == pytest.approx(-math.log(0.2))
    assert "tau_min=0.6, tau_max=0.9" in repr(quantizer)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.9), (0.9, 0.8), (0.9, 1.0), (math.nan, 0.9)])
def test_an_impossible_tau_is_refused(low, high):
    message = rf"'recu' .*0.5 < tau_min <= tau_max < 1; got tau_min={low} and tau_max={high}"
    with pytest.raises(BonnQatError, match=message):
        RECU.configure({"tau_min": low, "tau_max": high})
