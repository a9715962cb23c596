"""PCNN's projection against the book's equations, written out plane by plane in double precision."""

import pytest
import torch
from bonn_qat_baselines.pcnn import PCNN, PcnnWeight

from bonn_qat import BonnQatError

LAMBDA, ETA = 0.3, 0.2  # large, so that no term hides behind another


def case(shape, projection_shape):
    generator = torch.manual_seed(0)
    kernels = torch.randn(shape, dtype=torch.float64, generator=generator)
    kernels.view(-1)[:3] = torch.tensor([0.0, 1.0, -1.0])
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


def book(kernels, projection, grad):
    """C^ (3.29) and the gradients (3.51), (3.52), (3.55), (3.56); loops over kernels i and planes h."""
    a = kernels.abs().sum() / kernels.numel()
    mean = projection.sum() / projection.numel()
    projected = torch.where(mean * kernels >= 0, a, -a)
    dkernels, w = torch.empty_like(kernels), projection[0, 0]
    dw = torch.zeros_like(w)
    for i in range(kernels.shape[0]):
        for h in range(kernels.shape[1]):
            c, chat, delta = kernels[i, h], projected[i, h], grad[i, h]
            mask = ((w * c >= -1) & (w * c <= 1)).double()
            error = w * (c + ETA * delta) - chat
            dkernels[i, h] = delta * mask * w + LAMBDA * error * w
            dw = dw + delta * mask * c + LAMBDA * error * (c + ETA * delta)
    return projected, dkernels, dw


@pytest.mark.parametrize(
    ("shape", "projection_shape"),
    [((3, 2, 3, 3), (1, 1, 3, 3)), ((4, 3, 1, 1), (1, 1, 1, 1)), ((2, 5), (1, 1))],
    ids=str,
)
def test_value_and_gradients_are_the_books(shape, projection_shape):
    kernels, projection, grad = case(shape, projection_shape)
    quantizer, latent, value, scale = projected_by(kernels, projection, projection_weight=LAMBDA, look_ahead=ETA)
    value.backward(grad)
    projected, dkernels, dw = book(kernels, projection, grad)
    torch.testing.assert_close(value.detach(), projected, rtol=1e-12, atol=0)
    torch.testing.assert_close(latent.grad, dkernels, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantizer.projection.grad[0, 0], dw, rtol=1e-9, atol=1e-12)
    assert scale.shape == ()


def test_the_terms_with_lambda_are_the_derivative_of_the_projection_loss():
    kernels, projection, grad = case((3, 2, 3, 3), (1, 1, 3, 3))
    grads = {}
    for weight in (0.0, LAMBDA):
        quantizer, latent, value, _ = projected_by(kernels, projection, projection_weight=weight, look_ahead=ETA)
        value.backward(grad)
        grads[weight] = latent.grad, quantizer.projection.grad

    c, w = kernels.clone().requires_grad_(), projection.clone().requires_grad_()
    loss = LAMBDA / 2 * (value.detach() - w * (c + ETA * grad)).square().sum()  # (3.42)
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


def test_lambda_and_eta_are_options_of_the_scheme():
    quantizer = PCNN.configure({"projection_weight": 0.5, "look_ahead": 0.0}).weight(torch.zeros(1, 1, 1, 1))
    assert (quantizer.projection_weight, quantizer.look_ahead) == (0.5, 0.0)
    with pytest.raises(BonnQatError, match=r"option look_ahead of the scheme 'pcnn' is at least 0; got -1"):
        PCNN.configure({"look_ahead": -1.0}).weight(torch.zeros(1, 1, 1, 1))
