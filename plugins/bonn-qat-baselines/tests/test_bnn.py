"""BNN's two signs against their formulas, element by element in double precision; the law of its random one."""

import math

import pytest
import torch
from bonn_qat_baselines.bnn import BNN, BnnSign, BnnWeight
from torch import nn

import bonn_qat
from bonn_qat import BonnQatError
from bonn_qat.layers import BinaryConv2d

SHAPES = [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)]
EDGES = torch.tensor([0.0, 1.0, -1.0, -0.0], dtype=torch.float64)


def case(shape):
    generator = torch.manual_seed(0)
    x = 1.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    x.view(-1)[:4] = EDGES
    return x, torch.randn(shape, dtype=torch.float64, generator=generator)


def each(function, *tensors):
    rows = zip(*(t.flatten().tolist() for t in tensors), strict=True)
    return torch.tensor([function(*row) for row in rows], dtype=torch.float64).view_as(tensors[0])


def sign_of(x):
    return each(lambda e: 1.0 if e >= 0 else -1.0, x)


def clipped(x, grad):
    return each(lambda e, g: g if -1 <= e <= 1 else 0.0, x, grad)


def stochastic(training=True):
    return BnnSign(activations="stochastic").train(training)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", ["straight", "clipped"])
def test_weights_are_signs_with_the_straight_or_the_clipped_gradient(shape, gradient):
    weight, grad = case(shape)
    latent = weight.clone().requires_grad_()
    value, scale = BnnWeight(weight, gradient=gradient).quantize(latent)
    value.backward(grad)
    assert torch.equal(value.detach(), sign_of(weight))
    assert torch.equal(latent.grad, grad if gradient == "straight" else clipped(weight, grad))
    assert scale.shape == ()
    assert scale == 1


def test_the_constraint_clips_the_weights_in_place():
    weight, _ = case((3, 2, 3, 3))
    expected = each(lambda e: min(max(e, -1.0), 1.0), weight)
    assert not torch.equal(weight, expected)
    BnnWeight(weight).constrain(weight)
    assert torch.equal(weight, expected)


def test_bonn_qat_constrain_clips_every_binary_layer():
    model = bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), BNN, include=["1"])
    for layer in model:
        nn.init.constant_(layer.weight, -7.0)
    bonn_qat.constrain_(model)
    assert (model[0].weight == -7).all()  # the first layer is float
    assert (model[1].weight == -1).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("quantizer", [BnnSign(), stochastic(), stochastic(False)], ids=["sign", "random", "eval"])
def test_activations_have_the_clipped_gradient(shape, quantizer):
    x, grad = case(shape)
    leaf = x.clone().requires_grad_()
    value, scale = quantizer.quantize(leaf)
    value.backward(grad)
    assert torch.equal(leaf.grad, clipped(x, grad))
    assert set(value.flatten().tolist()) <= {-1.0, 1.0}
    assert scale.shape == ()
    assert scale == 1


@pytest.mark.parametrize("quantizer", [BnnSign(), stochastic(False)], ids=["deterministic", "stochastic in eval"])
def test_the_certain_sign_is_the_sign_and_draws_nothing(quantizer):
    x, _ = case((2, 3, 4, 4))
    state = torch.get_rng_state()
    assert torch.equal(quantizer.quantize(x)[0], sign_of(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_sign_is_plus_one_with_the_hard_sigmoids_probability():
    points = torch.tensor([-2.0, -1.0, -0.9, -0.5, 0.0, 0.3, 0.99, 1.0, 2.5], dtype=torch.float64)
    probability = [0.0, 0.0, 0.05, 0.25, 0.5, 0.65, 0.995, 1.0, 1.0]
    draws = 40_000
    torch.manual_seed(0)
    value, _ = stochastic().quantize(points.expand(draws, -1))
    assert value.unique().tolist() == [-1, 1]
    for share, p in zip((value == 1).double().mean(0).tolist(), probability, strict=True):
        # Five standard deviations of the share of a binomial variable; none where the sign is certain.
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / draws), p


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-24], ids=["least", "most"])
def test_no_draw_changes_the_sign_beyond_one(monkeypatch, draw):
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, draw))
    value, _ = stochastic().quantize(torch.tensor([-2.0, -1.0, 1.0, 2.0]))
    assert value.tolist() == [-1, -1, 1, 1]


def test_the_random_signs_of_two_elements_are_independent():
    torch.manual_seed(0)
    value, _ = stochastic().quantize(torch.zeros(20_000, 2, dtype=torch.float64))
    # The product of two independent fair signs is a fair sign: mean 0, standard deviation 1.
    assert abs(value.prod(1).mean()) <= 5 / math.sqrt(20_000)
    assert abs((value[1:] * value[:-1]).mean()) <= 5 / math.sqrt(2 * 19_999)


def test_the_random_sign_follows_torchs_seed():
    x = torch.zeros(100)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(stochastic().quantize(x)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("gradient", ["straight", "clipped"])
@pytest.mark.parametrize("activations", ["deterministic", "stochastic"])
def test_a_layer_is_the_convolution_of_the_signs(gradient, activations):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 3, 3, stride=2, padding=1).double()
    conv.weight.data.copy_(case((3, 4, 3, 3))[0])
    scheme = BNN.configure({"gradient": gradient, "activations": activations})
    layer, (x, _) = BinaryConv2d.from_float(conv, scheme, normalize=False), case((2, 4, 6, 5))
    leaf, weight = x.clone().requires_grad_(), layer.weight.detach().clone()
    torch.manual_seed(7)
    y = layer(leaf)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y.backward(grad)

    torch.manual_seed(7)
    u = torch.rand(x.shape, dtype=torch.float64)
    drawn = each(lambda e, r: 1.0 if r < min(max((e + 1) / 2, 0.0), 1.0) else -1.0, x, u)
    signs = (sign_of(x) if activations == "deterministic" else drawn).requires_grad_()
    kernels = sign_of(weight).requires_grad_()
    expected = torch.conv2d(signs, kernels, layer.bias.detach(), 2, 1)
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    expected.backward(grad)
    dweight = kernels.grad if gradient == "straight" else clipped(weight, kernels.grad)
    torch.testing.assert_close(layer.weight.grad, dweight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(leaf.grad, clipped(x, signs.grad), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


def test_bits_stored_numbers_and_options():
    assert BNN.bits == "1/1"
    scheme = BNN.configure({"gradient": "clipped", "activations": "stochastic"})
    weight, activation = scheme.weight(torch.ones(2, 2, 1, 1)), scheme.activation(2)
    assert (weight.gradient, activation.activations) == ("clipped", "stochastic")
    assert weight.constants(torch.ones(2, 2, 1, 1)) == 0
    assert repr(weight) == "BnnWeight(gradient='clipped')"
    assert repr(activation) == "BnnSign(activations='stochastic')"
    with pytest.raises(
        BonnQatError, match=r"gradient of the scheme 'bnn' must be 'straight' or 'clipped'; got 'exact'"
    ):
        BNN.configure({"gradient": "exact"})
    with pytest.raises(
        BonnQatError, match=r"activations of the scheme 'bnn' must be 'determin.*stochastic'; got 'random'"
    ):
        BNN.configure({"activations": "random"})
