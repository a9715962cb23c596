"""XNOR-Net's weights against formulas written out kernel by kernel, in double precision."""

import pytest
import torch
from bonn_qat_baselines.xnor import XNOR, XnorWeight

from bonn_qat import BonnQatError

SHAPES = [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)]


def latents(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0))
    x.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    return x.requires_grad_()


def reference(weight, grad, exact):
    """alpha sign(W) and the gradient, element by element."""
    values, dweights = [], []
    for w, g in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        n = len(w)
        signs = [1.0 if e >= 0 else -1.0 for e in w]
        alpha = sum(abs(e) for e in w) / n
        through_scale = sum(g[j] * signs[j] for j in range(n)) if exact else 0.0
        values.append([alpha * s for s in signs])
        dweights.append([signs[i] / n * through_scale + (alpha * g[i] if abs(w[i]) <= 1 else 0.0) for i in range(n)])
    return (torch.tensor(rows, dtype=torch.float64).view_as(weight) for rows in (values, dweights))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", ["exact", "plain"])
def test_value_and_gradient_are_the_papers(shape, gradient):
    weight = latents(shape)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(1))
    value, scale = XnorWeight(weight.detach(), gradient=gradient).quantize(weight)
    value.backward(grad)
    expected, dweight = reference(weight.detach(), grad, gradient == "exact")
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, dweight, rtol=1e-9, atol=1e-12)
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert not scale.requires_grad


def test_each_filter_has_two_values_and_zero_counts_as_plus_one():
    weight = latents((3, 2, 3, 3)).float()
    value, scale = XnorWeight(weight).quantize(weight)
    assert torch.equal(value.abs(), scale.abs().expand_as(value))
    assert value.view(-1)[0] > 0
    assert value.view(-1)[3] > 0


def test_a_filter_of_zeros_stays_finite():
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    value, _ = XnorWeight(weight.detach()).quantize(weight)
    value.sum().backward()
    assert not value.any()
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))  # sign(0)/n sum_j sign(0)


def test_the_gradient_is_an_option_of_the_scheme():
    quantizer = XNOR.configure({"gradient": "plain"}).weight(torch.zeros(1, 1, 1, 1))
    assert quantizer.gradient == "plain"
    with pytest.raises(BonnQatError, match=r"'exact' or 'plain'; got 'rough'"):
        XNOR.configure({"gradient": "rough"}).weight(torch.zeros(1, 1, 1, 1))
