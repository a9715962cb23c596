"""ReActNet's sign and nonlinearity against formulas written out element by element, in double precision."""

import itertools

import pytest
import timm
import torch
from bonn_qat_baselines import reactnet
from bonn_qat_baselines.reactnet import REACTNET, RPReLU, RSign
from torch import nn

import bonn_qat
from bonn_qat import BonnQatError, plugins
from bonn_qat.layers import BinaryConv2d

DOUBLE = {"dtype": torch.float64}
SHAPES = [(2, 3, 4, 5), (3, 1, 2, 2), (5, 3)]


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(reactnet)
    return manager


def case(shape, channels):
    """Inputs that hold the corners of every channel's sign, its threshold being a sum of few powers of two."""
    generator = torch.manual_seed(0)
    offsets = torch.tensor([0.5, -0.25, 0.0], **DOUBLE)[:channels]
    x = 1.5 * torch.randn(shape, generator=generator, **DOUBLE)
    corners = torch.tensor([0.0, -0.0, 0.5, -0.25, 1.5, -0.5, 0.75, -1.25, 1.0, -1.0], **DOUBLE)
    x.view(-1)[: len(corners)] = corners[: x.numel()]
    return x, offsets, torch.randn(shape, generator=generator, **DOUBLE)


def reference_sign(x, threshold, grad):
    """The signs of x - a, and the gradients of x and a."""
    value, dx, dthreshold = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(threshold)
    for index in itertools.product(*map(range, x.shape)):
        c = index[1] % len(threshold)
        distance = x[index] - threshold[c]
        value[index] = 1.0 if distance >= 0 else -1.0
        dx[index] = grad[index] * max(0.0, 2 - 2 * abs(float(distance)))
        dthreshold[c] -= dx[index]
    return value, dx, dthreshold


def reference_nonlinearity(x, gamma, slope, zeta, grad):
    """RPReLU, and the gradients of x, gamma, slope and zeta."""
    y, dx = torch.empty_like(x), torch.empty_like(x)
    dgamma, dslope, dzeta = (torch.zeros_like(gamma) for _ in range(3))
    for index in itertools.product(*map(range, x.shape)):
        c, g = index[1] % len(gamma), grad[index]
        above = x[index] - gamma[c]
        y[index] = (above if above > 0 else slope[c] * above) + zeta[c]
        dx[index] = g if above > 0 else slope[c] * g
        dgamma[c] -= dx[index]
        dslope[c] += 0.0 if above > 0 else g * above
        dzeta[c] += g
    return y, dx, dgamma, dslope, dzeta


def reference_weight(weight, grad, gradient):
    """alpha sign(W) and the gradient, filter by filter."""
    values, dweights = [], []
    for w, g in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        alpha = sum(map(abs, w)) / len(w)
        factor = alpha if gradient == "magnitude" else 1.0
        values.append([alpha if e >= 0 else -alpha for e in w])
        dweights.append([factor * d if -1 <= e <= 1 else 0.0 for e, d in zip(w, g, strict=True)])
    return (torch.tensor(rows, **DOUBLE).view_as(weight) for rows in (values, dweights))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("known", [True, False], ids=["per channel", "one for all"])
def test_the_sign_has_a_learned_threshold(shape, known):
    x, threshold, grad = case(shape, shape[1] if known else 1)
    quantizer = RSign(len(threshold)).double()
    with torch.no_grad():
        quantizer.threshold.copy_(threshold)
    x.requires_grad_()
    value, scale = quantizer.quantize(x)
    value.backward(grad)
    expected, dx, dthreshold = reference_sign(x.detach(), threshold, grad)
    assert torch.equal(value, expected)
    close(x.grad, dx)
    close(quantizer.threshold.grad, dthreshold)
    assert scale == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("known", [True, False], ids=["per channel", "one for all"])
def test_the_nonlinearity_is_a_prelu_with_a_learned_corner(shape, known):
    x, gamma, grad = case(shape, shape[1] if known else 1)
    slope, zeta = 0.3 + gamma, 2 * gamma - 0.125
    module = RPReLU(len(gamma)).double()
    module.load_state_dict({"gamma": gamma, "slope": slope, "zeta": zeta})
    x.requires_grad_()
    y = module(x)
    y.backward(grad)
    expected, *gradients = reference_nonlinearity(x.detach(), gamma, slope, zeta, grad)
    close(y, expected)
    close([x.grad, module.gamma.grad, module.slope.grad, module.zeta.grad], gradients)


def test_the_start_is_a_plain_sign_and_torchs_prelu():
    x = torch.tensor([[-2.0, -0.0, 0.0, 3.0]]).T
    assert RSign(1).quantize(x)[0].flatten().tolist() == [-1, 1, 1, 1]
    assert torch.equal(RPReLU(1)(x), nn.PReLU()(x))
    assert [p.shape for p in RPReLU(7).parameters()] == [(7,)] * 3


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("gradient", ["clipped", "magnitude"])
def test_weights_are_those_of_bireal_without_the_scale_in_their_gradient_unless_asked(shape, gradient):
    weight = 1.5 * torch.randn(shape, generator=torch.manual_seed(2), **DOUBLE)
    weight.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0], **DOUBLE)
    grad = torch.randn(shape, generator=torch.manual_seed(3), **DOUBLE)
    scheme = REACTNET if gradient == "clipped" else REACTNET.configure({"gradient": gradient})
    latent = weight.clone().requires_grad_()
    value, scale = scheme.weight(weight).quantize(latent)
    value.backward(grad)
    expected, dweight = reference_weight(weight, grad, gradient)
    close(value, expected)
    close(latent.grad, dweight)
    assert torch.equal(value.abs(), scale.expand_as(value))


@pytest.mark.parametrize(("stride", "padding", "bias"), [(1, 1, False), (2, 0, True)])
def test_a_layer_has_the_gradients_of_a_convolution_of_the_binary_tensors(stride, padding, bias):
    x, threshold, _ = case((2, 3, 5, 5), 3)
    conv = nn.Conv2d(3, 4, 3, stride, padding, bias=bias, **DOUBLE)
    layer = BinaryConv2d.from_float(conv, REACTNET, normalize=False).double()
    with torch.no_grad():
        layer.input_quant.threshold.copy_(threshold)
    weight = conv.weight.detach().clone()
    signs = reference_sign(x, threshold, x)[0].requires_grad_()
    kernels = next(reference_weight(weight, weight, "clipped")).requires_grad_()
    expected = torch.conv2d(signs, kernels, conv.bias, stride, padding)
    grad = torch.randn(expected.shape, generator=torch.manual_seed(1), **DOUBLE)
    expected.backward(grad)
    _, dx, dthreshold = reference_sign(x, threshold, signs.grad)
    _, dweight = reference_weight(weight, kernels.grad, "clipped")

    layer.zero_grad()
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    close(y, expected)
    close([x.grad, layer.input_quant.threshold.grad, layer.weight.grad], [dx, dthreshold, dweight])
    if bias:
        close(layer.bias.grad, grad.sum((0, 2, 3)))


def test_inputs_and_weights_have_one_bit_and_a_filter_one_constant():
    weight = torch.randn(6, 3, 3, 3)
    assert REACTNET.bits == "1/1"
    assert REACTNET.weight(weight).constants(weight) == 6
    assert RSign(3).quantize(torch.randn(2, 3, 8, 8))[0].unique().tolist() == [-1, 1]


def test_the_gradient_of_the_weights_is_an_option():
    assert REACTNET.options == {"gradient": "clipped"}
    assert REACTNET.configure({"gradient": "magnitude"}).weight(torch.zeros(1, 1, 1, 1)).gradient == "magnitude"
    with pytest.raises(BonnQatError, match=r"'magnitude' or 'clipped'; got 'exact'"):
        REACTNET.configure({"gradient": "exact"})


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    ).double()


def binary(net, pm):
    return bonn_qat.binarize(net, "reactnet", pm=pm)


def test_what_is_learned_does_not_decay(pm):
    model = binary(network(), pm)
    assert model[1].input_quant.threshold.shape == (4,)
    learned = {id(p) for m in model.modules() if isinstance(m, RSign | RPReLU) for p in m.parameters()}
    assert len(learned) == 4
    for group in bonn_qat.parameter_groups(model, lr=1.0, weight_decay=0.1):
        if group["weight_decay"]:
            assert learned.isdisjoint(map(id, group["params"]))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "wrn10_16", "mobilenetv2_050"])
def test_every_parameter_of_a_network_is_for_one_channel(name):
    # The gradient of one for all channels is the sum of theirs, with which SGD diverged at the usual rates.
    network = bonn_qat.binarize(timm.create_model(name), REACTNET)
    read = {}

    def note(module, given):
        read[module] = given[0].shape[1]

    for module in network.modules():
        if isinstance(module, RPReLU):
            module.register_forward_pre_hook(note)
    network.eval()(torch.randn(1, 3, 64, 64))
    assert read
    assert [module.slope.numel() for module in read] == list(read.values())
