"""Bi-Real Net's weights and activations against their formulas, in double precision."""

import pytest
import torch
from bonn_qat_baselines.bireal import BIREAL, BiRealWeight

from bonn_qat import BonnQatError


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("gradient", ["magnitude", "clipped"])
def test_value_and_gradient_are_those_of_the_paper_and_of_the_code(shape, gradient):
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0)) * 1.5
    weight.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(1))
    latent = weight.clone().requires_grad_()
    value, scale = BiRealWeight(weight, gradient=gradient).quantize(latent)
    value.backward(grad)

    for o in range(shape[0]):
        alpha = weight[o].abs().sum() / weight[o].numel()
        inside = (weight[o] >= -1) & (weight[o] <= 1)
        factor = alpha if gradient == "magnitude" else 1.0
        expected = torch.where(weight[o] < 0, -alpha, alpha)
        torch.testing.assert_close(value[o].detach(), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(latent.grad[o], torch.where(inside, factor * grad[o], 0.0), rtol=1e-9, atol=0)
    assert not scale.requires_grad


@pytest.mark.parametrize("gradient", ["magnitude", "clipped"])
def test_each_filter_has_exactly_two_values(gradient):
    weight = torch.randn(4, 3, 3, 3, generator=torch.manual_seed(0))
    value, scale = BiRealWeight(weight, gradient=gradient).quantize(weight)
    assert torch.equal(value.abs(), scale.expand_as(value))


def test_activations_have_the_papers_derivative():
    x = torch.tensor([-1.5, -1.0, -0.25, 0.0, 0.75, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    value, scale = BIREAL.activation(1).quantize(x)
    value.sum().backward()
    assert value.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 0, 1.5, 2, 0.5, 0, 0]
    assert scale == 1


def test_the_gradient_is_an_option_of_the_scheme():
    assert BIREAL.configure({"gradient": "clipped"}).weight(torch.zeros(1, 1, 1, 1)).gradient == "clipped"
    with pytest.raises(BonnQatError, match=r"'magnitude' or 'clipped'; got 'exact'"):
        BIREAL.configure({"gradient": "exact"}).weight(torch.zeros(1, 1, 1, 1))
