"""PCNN's projection against the book's equations, written out plane by plane in double precision."""

import pytest
import torch
from bonn_qat_baselines import pcnn
from bonn_qat_baselines.pcnn import PCNN, PcnnWeight
from torch import nn

from bonn_qat import BonnQatError, binarize, plugins, summary
from bonn_qat.layers import BinaryConv2d

LAMBDA, ETA = 0.3, 0.2  # large, so that no term hides behind another


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(pcnn)
    return manager


def case(shape, projection_shape):
    generator = torch.manual_seed(0)
    kernels = torch.randn(shape, dtype=torch.float64, generator=generator)
    kernels.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    projection = 1 + 0.5 * torch.randn(projection_shape, dtype=torch.float64, generator=generator)
    grad = torch.randn(shape, dtype=torch.float64, generator=generator)
    return kernels, projection, grad


def projected_by(kernels, projection, **options):
    quantizer = PcnnWeight(kernels, **options)
    with torch.no_grad():
        quantizer.projection.copy_(projection)
    latent = kernels.clone().requires_grad_()
    value, scale = quantizer.quantize(latent)
    return quantizer, latent, value, scale


def book(kernels, projections, grad):
    """The mean of the C^_j (3.29) and the gradients (3.51), (3.52), (3.55), (3.56).

    Loops over projections j, kernels i and planes h; each C^_j has the gradient of the mean, divided by J.
    """
    a = kernels.abs().sum() / kernels.numel()
    count = len(projections)
    value, dkernels, dw = torch.zeros_like(kernels), torch.zeros_like(kernels), torch.zeros_like(projections)
    for j in range(count):
        w = projections[j, 0]
        mean = w.sum() / w.numel()
        for i in range(kernels.shape[0]):
            for h in range(kernels.shape[1]):
                c, delta = kernels[i, h], grad[i, h] / count
                chat = torch.where(mean * c >= 0, a, -a)
                mask = ((w * c >= -1) & (w * c <= 1)).double()
                error = w * (c + ETA * delta) - chat
                value[i, h] += chat / count
                dkernels[i, h] += delta * mask * w + LAMBDA * error * w
                dw[j, 0] += delta * mask * c + LAMBDA * error * (c + ETA * delta)
    return value, dkernels, dw


@pytest.mark.parametrize(
    ("shape", "projection_shape"),
    [((3, 2, 3, 3), (1, 1, 3, 3)), ((4, 3, 1, 1), (1, 1, 1, 1)), ((2, 5), (1, 1)),
     ((3, 2, 3, 3), (4, 1, 3, 3)), ((4, 1, 1, 1), (2, 1, 1, 1)), ((2, 5), (3, 1))],
    ids=str,
)  # fmt: skip
def test_value_and_gradients_are_the_books(shape, projection_shape):
    kernels, projection, grad = case(shape, projection_shape)
    if len(projection) > 2:
        projection[1].neg_()  # so that the projections of a kernel differ
    options = {"projection_weight": LAMBDA, "look_ahead": ETA, "projections": len(projection)}
    quantizer, latent, value, scale = projected_by(kernels, projection, **options)
    value.backward(grad)
    projected, dkernels, dw = book(kernels, projection, grad)
    torch.testing.assert_close(value.detach(), projected, rtol=1e-12, atol=0)
    torch.testing.assert_close(latent.grad, dkernels, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantizer.projection.grad, dw, rtol=1e-9, atol=1e-12)
    assert scale.shape == ()
    assert not scale.requires_grad


@pytest.mark.parametrize("count", [1, 3])
def test_the_terms_with_lambda_are_the_derivative_of_the_projection_loss(count):
    kernels, projection, grad = case((3, 2, 3, 3), (count, 1, 3, 3))
    grads = {}
    for weight in (0.0, LAMBDA):
        options = {"projection_weight": weight, "look_ahead": ETA, "projections": count}
        quantizer, latent, value, _ = projected_by(kernels, projection, **options)
        value.backward(grad)
        grads[weight] = latent.grad, quantizer.projection.grad

    c, w = kernels.clone().requires_grad_(), projection.clone().requires_grad_()
    loss = 0.0
    for j in range(count):
        _, _, chat, _ = projected_by(kernels, projection[j : j + 1])
        loss += LAMBDA / 2 * (chat.detach() - w[j] * (c + ETA * grad / count)).square().sum()  # (3.42)
    dc, dw = torch.autograd.grad(loss, (c, w))
    torch.testing.assert_close(grads[LAMBDA][0] - grads[0.0][0], dc, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads[LAMBDA][1] - grads[0.0][1], dw, rtol=1e-9, atol=1e-12)


def test_only_the_sign_of_the_mean_projection_reaches_the_kernels():
    kernels, projection, _ = case((3, 2, 3, 3), (1, 1, 3, 3))
    _, _, up, scale = projected_by(kernels, projection)
    _, _, stretched, _ = projected_by(kernels, 7 * projection)
    _, _, down, _ = projected_by(kernels, -projection)
    assert torch.equal(up, stretched)
    assert torch.equal(down[kernels != 0], -up[kernels != 0])
    assert up.view(-1)[0] == down.view(-1)[0] == scale  # sign(0) = +1, whatever the projection


def test_the_projection_starts_at_one_and_learns_at_a_tenth_of_the_rate():
    quantizer = PcnnWeight(torch.randn(4, 3, 3, 3))
    assert torch.equal(quantizer.projection, torch.ones(1, 1, 3, 3))
    with torch.no_grad():
        quantizer.projection.fill_(5)
    quantizer.adopt(torch.randn(4, 3, 3, 3))
    assert torch.equal(quantizer.projection, torch.ones(1, 1, 3, 3))
    assert quantizer.parameter_rules["projection"].slow


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_projections_start_apart_around_one_and_stay_apart(count):
    quantizer = PcnnWeight(torch.randn(4, 3, 3, 3), projections=count)
    start = quantizer.projection.detach().clone()
    assert start.mean().item() == pytest.approx(1)
    assert ((start > 0.5) & (start < 1.5)).all()
    with torch.no_grad():
        quantizer.projection.fill_(1)
    value, _ = quantizer.quantize(torch.randn(4, 3, 3, 3))
    value.sum().backward()
    assert all(torch.equal(g, quantizer.projection.grad[0]) for g in quantizer.projection.grad)  # why they start apart
    quantizer.adopt(torch.randn(4, 3, 3, 3))
    assert torch.equal(quantizer.projection, start)
    value, _ = quantizer.quantize(torch.randn(4, 3, 3, 3))
    value.sum().backward()
    assert not any(torch.equal(g, quantizer.projection.grad[0]) for g in quantizer.projection.grad[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("signs", "levels"), [([1], 1), ([1, 1, 1], 1), ([1, -1, 1], 1 / 3), ([1, -1], 0)], ids=str)
def test_a_layer_has_the_values_of_the_mean_of_its_projections(dtype, signs, levels):
    kernels = torch.randn(4, 3, 3, 3, dtype=dtype)
    projection = torch.tensor(signs, dtype=dtype).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)
    quantizer = PcnnWeight(kernels, projections=len(signs))
    with torch.no_grad():
        quantizer.projection.copy_(projection)
    value, scale = quantizer.quantize(kernels)
    torch.testing.assert_close(value.unique(), torch.tensor(sorted({-levels, levels}), dtype=dtype) * scale)
    if levels == 1:
        assert torch.equal(value.abs(), scale.expand_as(value))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 4])
def test_a_layer_is_the_convolution_of_the_signs_with_the_projected_kernels(bias, count):
    scheme = PCNN.configure({"projection_weight": LAMBDA, "look_ahead": ETA, "projections": count})
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias).double()
    layer = BinaryConv2d.from_float(conv, scheme, normalize=False)
    kernels, projection, _ = case((4, 3, 3, 3), (count, 1, 3, 3))
    if count > 1:
        projection[1].neg_()
    with torch.no_grad():
        layer.weight.copy_(kernels)
        layer.weight_quant.projection.copy_(projection)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    x.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    x.requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    inputs = torch.where(x.detach() >= 0, 1.0, -1.0).double().requires_grad_()
    value = book(kernels, projection, torch.zeros_like(kernels))[0].requires_grad_()
    expected = torch.conv2d(inputs, value, conv.bias, stride=2, padding=1)
    dinputs, dvalue = torch.autograd.grad(expected, (inputs, value), grad)
    _, dkernels, dw = book(kernels, projection, dvalue)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, dinputs * (x.detach().abs() <= 1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, dkernels, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight_quant.projection.grad, dw, rtol=1e-9, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


def test_lambda_and_eta_are_options_of_the_scheme():
    quantizer = PCNN.configure({"projection_weight": 0.5, "look_ahead": 0.0}).weight(torch.zeros(1, 1, 1, 1))
    assert (quantizer.projection_weight, quantizer.look_ahead) == (0.5, 0.0)
    with pytest.raises(BonnQatError, match=r"option look_ahead of the scheme 'pcnn' must be at least 0; got -1"):
        PCNN.configure({"look_ahead": -1.0}).weight(torch.zeros(1, 1, 1, 1))


def test_a_random_start_is_about_one_and_differs_from_element_to_element():
    torch.manual_seed(0)
    quantizer = PCNN.configure({"start": "random", "projections": 2}).weight(torch.ones(4, 3, 3, 3))
    start = quantizer.projection.detach().clone()
    assert len(start.unique()) == 2 * 9
    assert 0.5 <= start.min() < 0.8 < 1.2 < start.max() < 1.5
    quantizer.adopt(torch.ones(4, 3, 3, 3))
    assert not torch.equal(quantizer.projection, start)


def test_the_magnitude_can_be_the_mean_norm_of_the_kernels():
    kernels, projection, _ = case((3, 2, 3, 3), (1, 1, 3, 3))
    _, _, value, scale = projected_by(kernels, projection, magnitude="norm")
    assert scale.item() == pytest.approx(sum(kernel.abs().sum().item() for kernel in kernels) / 3)
    _, _, plain, mean = projected_by(kernels, projection)
    torch.testing.assert_close(value / scale, plain / mean)


@pytest.mark.parametrize("option", ["start", "magnitude"])
def test_a_reading_that_there_is_not_is_told(option):
    message = rf"option {option} of the scheme 'pcnn' must be '(one|mean)' or .* got 'zero'"
    with pytest.raises(BonnQatError, match=message):
        PCNN.configure({option: "zero"})


def test_projections_are_an_option_and_a_bit_of_each_weight(pm):
    assert PCNN.bits == "1/1"
    scheme = PCNN.configure({"projections": 3})
    assert scheme.bits == "3/1"
    layer = summary(binarize(network(), scheme, pm=pm), (3, 8, 8)).layers[1]
    assert (layer.weight_bits, layer.scales) == (3, 1)
    for count in (0, 2.0):
        with pytest.raises(
            BonnQatError, match=rf"option projections .* must be a whole number, at least 1; got {count}"
        ):
            PCNN.configure({"projections": count})


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(180, 2))
