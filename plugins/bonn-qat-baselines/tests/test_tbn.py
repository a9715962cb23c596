"""TBN's weights and activations against formulas written out element by element, in double precision."""

import math

import pytest
import torch
from bonn_qat_baselines import tbn
from bonn_qat_baselines.tbn import TBN, TbnActivation, TbnWeight
from torch import nn

from bonn_qat import BonnQatError, binarize, plugins, summary
from bonn_qat.layers import BinaryConv2d

DOUBLE = torch.float64
SHAPES = [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)]
VARIANTS = ["tbn", "tbnv2"]


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(tbn)
    return manager


def numbers(shape, seed, special=()):
    x = torch.randn(shape, dtype=DOUBLE, generator=torch.manual_seed(seed))
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=DOUBLE)
    return x


def binary_weight(weight):
    """alpha sign(W), filter by filter."""
    rows = []
    for w in weight.flatten(1).tolist():
        alpha = sum(abs(e) for e in w) / len(w)
        rows.append([alpha if e >= 0 else -alpha for e in w])
    return torch.tensor(rows, dtype=DOUBLE).view_as(weight)


def ternary(x, threshold, variant):
    """The values and the factors of their gradient, element by element; the slopes of tbnv2 as those of parabolas."""
    values, factors = [], []
    for e in x.flatten().tolist():
        t = 1.0 if e >= threshold else -1.0 if e <= -threshold else 0.0
        if variant == "tbn":
            values.append(t)
            factors.append(1.0 if -1 <= e <= 1 else 0.0)
        else:
            values.append(2 * threshold * t)
            nearest = 0.0 if abs(e) <= threshold else 2 * threshold  # the middle of the step that e stands on
            inside = abs(e) <= 2 * threshold
            factors.append(2 * abs(abs(e) - nearest) / threshold if inside else 0.0)
    return (torch.tensor(row, dtype=DOUBLE).view_as(x) for row in (values, factors))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_scaled_signs_and_their_gradient_passes_as_it_is(shape):
    weight, grad = numbers(shape, 0, [0.0, 1.0, -1.0, -0.0]), numbers(shape, 1)
    latent = (3 * weight).requires_grad_()  # many beyond 1, where others clip
    value, scale = TbnWeight(weight).quantize(latent)
    value.backward(grad)
    torch.testing.assert_close(value.detach(), binary_weight(3 * weight), rtol=1e-12, atol=0)
    assert torch.equal(latent.grad, grad)
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_each_filter_has_exactly_two_values(dtype):
    weight = numbers((4, 3, 3, 3), 0, [0.0, -0.0]).to(dtype).requires_grad_()
    value, scale = TbnWeight(weight).quantize(weight)
    assert torch.equal(value.abs(), scale.expand_as(value))
    assert (value.view(-1)[:2] > 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 1, 2, 3), (3, 6)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("delta", [0.4, 0.5])
def test_values_and_gradients_in_training_are_those_of_the_batchs_threshold(shape, variant, delta):
    x, grad = numbers(shape, 0, [0.0, -0.0, 1.0, -1.0, 3.0]), numbers(shape, 1)
    inputs = x.clone().requires_grad_()
    value, scale = TbnActivation(delta=delta, variant=variant).quantize(inputs)
    value.backward(grad)
    threshold = delta * sum(map(abs, x.flatten().tolist())) / x.numel()
    expected, factor = ternary(x, threshold, variant)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs.grad, grad * factor, rtol=1e-9, atol=1e-12)
    assert not scale.requires_grad
    torch.testing.assert_close(scale, torch.tensor(1.0 if variant == "tbn" else 2 * threshold, dtype=DOUBLE))


@pytest.mark.parametrize("variant", VARIANTS)
def test_thresholds_and_the_ends_of_the_gradient_belong_to_the_inside(variant):
    quantizer = TbnActivation(variant=variant).double().eval()
    quantizer.running_threshold.fill_(0.5)
    # Both ends of both masks, 1 and 2 Delta, are 1 here; what follows each is the next number beyond it.
    edges = [0.5, 1.0, 2.0]
    x = torch.tensor([0.0, -0.0, *edges, *(-e for e in edges)], dtype=DOUBLE)
    x = torch.cat([x, torch.nextafter(x, 9 * x), torch.nextafter(x, 0 * x)]).requires_grad_()
    value, _ = quantizer.quantize(x)
    value.sum().backward()
    expected, factor = ternary(x.detach(), 0.5, variant)
    assert torch.equal(value.detach(), expected)
    torch.testing.assert_close(x.grad, factor, rtol=1e-9, atol=1e-12)
    assert x.grad[3] == (1 if variant == "tbn" else 0)
    assert x.grad[2] == (1 if variant == "tbn" else 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_have_three_values_and_an_input_of_zeros_none_but_zero(variant):
    quantizer = TbnActivation(variant=variant)
    value, scale = quantizer.quantize(torch.randn(4, 3, 5, 5))
    assert value.unique().tolist() == [-scale.item(), 0, scale.item()]
    zeros = torch.zeros(2, 3, requires_grad=True)
    value, _ = quantizer.quantize(zeros)
    value.sum().backward()
    assert not value.any()
    assert zeros.grad.isfinite().all()


def test_the_running_threshold_follows_training_with_momentum_and_decides_in_evaluation():
    quantizer = TbnActivation(delta=0.5).double()
    assert quantizer.running_threshold.item() == pytest.approx(0.5 * math.sqrt(2 / math.pi), rel=1e-6)
    expected = quantizer.running_threshold.item()
    for seed in range(3):
        x = numbers((2, 3, 4, 4), seed) * (seed + 1)
        quantizer(x)
        expected = 0.99 * expected + 0.01 * 0.5 * x.abs().mean().item()
        assert quantizer.running_threshold.item() == pytest.approx(expected, rel=1e-12)
    quantizer.eval()
    x = torch.tensor([0.99 * expected, 1.01 * expected, -0.99 * expected, -1.01 * expected], dtype=DOUBLE)
    assert quantizer(x).value.tolist() == [0, 1, 0, -1]
    assert quantizer.running_threshold.item() == pytest.approx(expected, rel=1e-12)  # evaluation does not move it


def test_a_fresh_threshold_is_near_that_of_a_normalized_batch():
    quantizer = TbnActivation()
    start = quantizer.running_threshold.item()
    quantizer(torch.randn(16, 8, 16, 16))
    assert quantizer.running_threshold.item() == pytest.approx(start, rel=0.01)


def test_gradients_in_evaluation_survive_a_later_training_step():
    quantizer = TbnActivation(variant="tbnv2").eval()
    x = torch.randn(2, 3, requires_grad=True)
    value = quantizer(x).value
    quantizer.train()(torch.randn(2, 3))
    value.sum().backward()
    assert x.grad.any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_convolution_of_the_quantized_inputs_and_weights(variant, bias):
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias).double()
    layer = BinaryConv2d.from_float(conv, TBN.configure({"variant": variant}), normalize=False).double()
    x = numbers((2, 3, 7, 6), 0, [0.0, 1.0, -1.0]).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    threshold = 0.4 * x.detach().abs().mean().item()
    inputs, factor = ternary(x.detach(), threshold, variant)
    weights = binary_weight(conv.weight.detach())
    expected = torch.conv2d(inputs.requires_grad_(), weights.requires_grad_(), conv.bias, stride=2, padding=1)
    dinputs, dweights = torch.autograd.grad(expected, (inputs, weights), grad)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, dinputs * factor, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, dweights, rtol=1e-9, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


def test_options_reach_the_activations_and_impossible_ones_are_named():
    quantizer = TBN.configure({"delta": 0.5, "variant": "tbnv2"}).activation(3)
    assert (quantizer.delta, quantizer.variant) == (0.5, "tbnv2")
    for delta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BonnQatError, match=r"option delta of the scheme 'tbn' must be a number above 0; got"):
            TBN.configure({"delta": delta})
    with pytest.raises(BonnQatError, match=r"'tbn' or 'tbnv2'; got 'v3'"):
        TBN.configure({"variant": "v3"})


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(180, 2))


def test_one_bit_for_a_weight_two_for_an_activation_and_a_scale_for_each_filter(pm):
    assert TBN.bits == "1/2"
    layer = summary(binarize(network(), "tbn", pm=pm), (3, 8, 8)).layers[1]
    assert (layer.weight_bits, layer.input_bits, layer.scales) == (1, 2, 5)
