"""BWN: binary weights in an otherwise untouched network; the formulas written out in double precision."""

from dataclasses import replace

import pytest
import timm
import torch
from bonn_qat_baselines import bwn
from bonn_qat_baselines.bwn import BWN
from torch import nn

import bonn_qat
from bonn_qat import BonnQatError, plugins
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.layers import BinaryConv2d

GRADIENTS = ["exact", "printed", "plain", "straight"]


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(bwn)
    return manager


def case(shape=(3, 2, 3, 3)):
    generator = torch.manual_seed(0)
    weight = 0.9 * torch.randn(shape, dtype=torch.float64, generator=generator)
    weight.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    return weight, torch.randn(shape, dtype=torch.float64, generator=generator)


def binarized(weight):
    """alpha sign(W), filter by filter."""
    value = torch.empty_like(weight)
    for o, kernel in enumerate(weight):
        alpha = sum(map(abs, kernel.flatten().tolist())) / kernel.numel()
        value[o] = torch.tensor(
            [alpha if w >= 0 else -alpha for w in kernel.flatten().tolist()], dtype=torch.float64
        ).view_as(kernel)
    return value


def derivative(weight, grad, gradient):
    """The Jacobian of one filter at a time, as a matrix, applied to the gradient."""
    result = torch.empty_like(weight)
    for o, kernel in enumerate(weight):
        w, g = kernel.flatten(), grad[o].flatten()
        n, signs = w.numel(), torch.where(w >= 0, 1.0, -1.0).double()
        eye = torch.eye(n, dtype=torch.float64)
        masked = eye * (w.abs().sum() / n) * ((w >= -1) & (w <= 1))
        jacobian = {
            "exact": masked + torch.outer(signs, signs) / n,
            "printed": masked + eye / n,
            "plain": masked,
            "straight": eye,
        }[gradient]
        result[o] = (jacobian.T @ g).view_as(kernel)
    return result


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_value_and_gradient_are_the_papers(shape, gradient):
    weight, grad = case(shape)
    latent = weight.clone().requires_grad_()
    value, scale = BWN.configure({"gradient": gradient}).weight(weight).quantize(latent)
    value.backward(grad)
    torch.testing.assert_close(value.detach(), binarized(weight), rtol=1e-12, atol=0)
    torch.testing.assert_close(latent.grad, derivative(weight, grad, gradient), rtol=1e-9, atol=1e-12)
    assert torch.equal(value.detach().abs(), scale.expand_as(value))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_layer_convolves_its_float_input_with_the_binary_kernels(gradient):
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    conv.weight.data.copy_(case()[0])
    layer = BinaryConv2d.from_float(conv, BWN.configure({"gradient": gradient}), normalize=False)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    inputs, value = x.detach().clone().requires_grad_(), binarized(case()[0]).requires_grad_()
    expected = torch.conv2d(inputs, value, layer.bias.detach(), 2, 1)
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, inputs.grad, rtol=1e-9, atol=1e-12)
    dweight = derivative(case()[0], value.grad, gradient)
    torch.testing.assert_close(layer.weight.grad, dweight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["wrn10_16", "birealnet18", "resnet10t"])
def test_the_network_is_the_float_one_but_for_its_weights(pm, name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).double()
    model = bonn_qat.binarize(net, replace(BWN, latent_std=None), pm=pm)
    assert list(model.state_dict()) == list(net.state_dict())
    kinds = {key: type(m) for key, m in model.named_modules() if not isinstance(m, BinaryConv2d)}
    own = ("weight_quant", "norm")
    binary = set(model.binarization.binary)
    kinds = {key: kind for key, kind in kinds.items() if not (key.rpartition(".")[0] in binary and key.endswith(own))}
    assert kinds == {key: type(m) for key, m in net.named_modules() if key not in binary}

    # With kernels that are +-alpha already there is nothing left to do.
    for _, layer in binary_layers(model):
        layer.weight.data.copy_(binarized(layer.weight.detach()))
    net.load_state_dict(model.state_dict())
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.any()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), net.eval()(x), rtol=1e-9, atol=1e-9)


def test_bits_stored_numbers_and_options():
    assert BWN.bits == "1/32"
    weight = torch.ones(6, 2, 3, 3)
    quantizer = BWN.configure({"gradient": "printed", "centre": True}).weight(weight)
    assert quantizer.constants(weight) == 6
    assert (quantizer.gradient, quantizer.centre) == ("printed", True)
    quantizer.constrain(weight)
    assert not weight.any()
    with pytest.raises(BonnQatError, match=r"gradient of XNOR-Net's weights must be 'exact', .*; got 'rough'"):
        BWN.configure({"gradient": "rough"})
    with pytest.raises(BonnQatError, match="input_scale"):  # there is no binary input to scale
        BWN.configure({"input_scale": True})
