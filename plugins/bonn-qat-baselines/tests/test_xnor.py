"""XNOR-Net's weights and input scale against formulas written out element by element, in double precision."""

import pytest
import torch
from bonn_qat_baselines.xnor import XNOR, XnorSign, XnorWeight
from torch import nn

from bonn_qat import BonnQatError
from bonn_qat.functional import approx_sign, swish_sign
from bonn_qat.layers import BinaryConv2d

SHAPES = [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)]
GRADIENTS = ["exact", "printed", "plain", "straight"]
STRIDE, PADDING = (2, 1), (1, 2)


def latents(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0))
    x.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    return x.requires_grad_()


def inputs(shape=(2, 4, 5, 6)):
    x = 1.2 * torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(2))
    x.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, -0.0])
    return x.requires_grad_()


def reference(weight, grad, gradient):
    """alpha sign(W) and the gradient, element by element."""
    values, dweights = [], []
    for w, g in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        n = len(w)
        signs = [1.0 if e >= 0 else -1.0 for e in w]
        alpha = sum(abs(e) for e in w) / n
        through_scale = sum(g[j] * signs[j] for j in range(n))
        values.append([alpha * s for s in signs])
        row = []
        for i in range(n):
            clipped = alpha * g[i] if -1 <= w[i] <= 1 else 0.0
            row.append(
                {
                    "exact": signs[i] / n * through_scale + clipped,
                    "printed": g[i] / n + clipped,
                    "plain": clipped,
                    "straight": g[i],
                }[gradient]
            )
        dweights.append(row)
    return (torch.tensor(rows, dtype=torch.float64).view_as(weight) for rows in (values, dweights))


def sign_of(x):
    return torch.tensor([1.0 if e >= 0 else -1.0 for e in x.flatten().tolist()], dtype=torch.float64).view_as(x)


def inside(x, clip=1.0):
    return torch.tensor([float(-clip <= e <= clip) for e in x.flatten().tolist()], dtype=torch.float64).view_as(x)


def layer(**options):
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 3, (3, 2), stride=STRIDE, padding=PADDING).double()
    with torch.no_grad():
        conv.weight.view(-1)[:4] = torch.tensor([0.0, 1.0, -1.0, 1.5])
    return BinaryConv2d.from_float(conv, XNOR.configure(options), normalize=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_value_and_gradient_are_the_papers(shape, gradient):
    weight = latents(shape)
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(1))
    value, scale = XnorWeight(weight.detach(), gradient=gradient).quantize(weight)
    value.backward(grad)
    expected, dweight = reference(weight.detach(), grad, gradient)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight.grad, dweight, rtol=1e-9, atol=1e-12)
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert not scale.requires_grad


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_filter_has_two_values_and_zero_counts_as_plus_one(gradient, dtype):
    weight = latents((3, 2, 3, 3)).to(dtype)
    value, scale = XnorWeight(weight, gradient=gradient).quantize(weight)
    assert torch.equal(value, scale * torch.where(weight >= 0, 1, -1))
    assert value.view(-1)[0] > 0
    assert value.view(-1)[3] > 0


def test_a_filter_of_zeros_stays_finite():
    weight = torch.zeros(2, 3, 3, 3, requires_grad=True)
    value, _ = XnorWeight(weight.detach()).quantize(weight)
    value.sum().backward()
    assert not value.any()
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))  # sign(0)/n sum_j sign(0)


def test_centring_subtracts_the_mean_over_the_input_channels_then_clamps():
    weight = 1.5 * torch.randn(3, 2, 3, 3, dtype=torch.float64, generator=torch.manual_seed(4))
    expected = torch.empty_like(weight)
    for o in range(3):
        for y in range(3):
            for x in range(3):
                mean = (weight[o, 0, y, x] + weight[o, 1, y, x]) / 2
                for i in range(2):
                    expected[o, i, y, x] = min(max(float(weight[o, i, y, x] - mean), -1.0), 1.0)
    assert (expected.abs() == 1).any()
    centred, left = weight.clone(), weight.clone()
    assert XnorWeight(weight, centre=True).constrain(centred) is None
    torch.testing.assert_close(centred, expected, rtol=1e-12, atol=1e-15)
    XnorWeight(weight).constrain(left)
    assert torch.equal(left, weight)


def test_a_single_input_channel_is_clamped_but_not_centred_away():
    weight = torch.tensor([[[[0.5]]], [[[-3.0]]]], dtype=torch.float64)
    XnorWeight(weight, centre=True).constrain(weight)
    assert weight.flatten().tolist() == [0.5, -1.0]


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (3, 7)], ids=str)
@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("input_scale", [False, True])
def test_activations_are_signs_with_the_clipped_gradient(shape, clip, input_scale):
    x = inputs(shape)
    x.data.view(-1)[4:6] = torch.tensor([clip, -clip])
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(1))
    value, _ = XnorSign(clip=clip, input_scale=input_scale).quantize(x)
    value.backward(grad)
    assert torch.equal(value.detach(), sign_of(x.detach()))
    assert torch.equal(x.grad, grad * inside(x.detach(), clip))


def test_the_scale_of_the_input_is_the_mean_magnitude_over_the_channels():
    x = inputs()
    _, scale = XnorSign(input_scale=True).quantize(x)
    assert scale.shape == (2, 1, 5, 6)
    assert not scale.requires_grad
    values = x.tolist()
    for b in range(2):
        for i in range(5):
            for j in range(6):
                mean = sum(abs(values[b][c][i][j]) for c in range(4)) / 4
                assert float(scale[b, 0, i, j]) == pytest.approx(mean, rel=1e-14)


def test_without_a_map_the_scale_is_one():
    for quantizer, x in ((XnorSign(), inputs()), (XnorSign(input_scale=True), inputs((3, 7)))):
        scale = quantizer.quantize(x)[1]
        assert scale.shape == ()
        assert scale == 1


def box_filtered(x):
    """K: the mean of A over each window of the 3x2 kernel, zeros outside, in loops."""
    batch, channels, height, width = x.shape
    rows = (height + 2 * PADDING[0] - 3) // STRIDE[0] + 1
    columns = (width + 2 * PADDING[1] - 2) // STRIDE[1] + 1
    k = torch.zeros(batch, 1, rows, columns, dtype=torch.float64)
    for b in range(batch):
        for r in range(rows):
            for s in range(columns):
                for u in range(3):
                    for v in range(2):
                        i, j = r * STRIDE[0] + u - PADDING[0], s * STRIDE[1] + v - PADDING[1]
                        if 0 <= i < height and 0 <= j < width:
                            k[b, 0, r, s] += sum(abs(float(x[b, c, i, j])) for c in range(channels)) / channels / 6
    return k


@pytest.mark.parametrize("input_scale", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_layer_is_the_convolution_of_signs_times_k_and_alpha(input_scale, gradient):
    binary, x = layer(input_scale=input_scale, gradient=gradient), inputs()
    weight = binary.weight.detach().clone()
    y = binary(x)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.manual_seed(5))
    y.backward(grad)

    k = box_filtered(x.detach()) if input_scale else torch.ones(2, 1, 1, 1, dtype=torch.float64)
    signs, value = sign_of(x.detach()).requires_grad_(), next(reference(weight, weight, gradient)).requires_grad_()
    expected = torch.conv2d(signs, value, None, STRIDE, PADDING) * k + binary.bias.detach().view(1, 3, 1, 1)
    torch.testing.assert_close(y.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, signs.grad * inside(x.detach()), rtol=1e-9, atol=1e-12)
    _, dweight = reference(weight, value.grad, gradient)
    torch.testing.assert_close(binary.weight.grad, dweight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(binary.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("estimator", "function"), [("approx_sign", approx_sign), ("swish_sign", swish_sign)])
def test_another_estimator_changes_the_gradient_and_nothing_else(estimator, function):
    x = inputs()
    gradients = []
    for call in (function, lambda x: XNOR.configure({"estimator": estimator}).activation(3).quantize(x)[0]):
        value = call(x)
        assert torch.equal(value, sign_of(x.detach()))
        gradients += torch.autograd.grad(value, x, torch.ones_like(x))
    assert torch.equal(*gradients)
    ste = torch.autograd.grad(XnorSign().quantize(x)[0], x, torch.ones_like(x))[0]
    assert not torch.equal(gradients[0], ste)
    _, plain = XnorSign(input_scale=True).quantize(x)
    assert torch.equal(XnorSign(input_scale=True, estimator=estimator).quantize(x)[1], plain)


def test_the_options_reach_the_quantizers():
    scheme = XNOR.configure({"gradient": "plain", "centre": True, "input_scale": True, "clip": 1.5})
    weight, activation = scheme.weight(torch.zeros(1, 1, 1, 1)), scheme.activation(3)
    assert (weight.gradient, weight.centre) == ("plain", True)
    assert (activation.input_scale, activation.sign.clip) == (True, 1.5)
    assert scheme.bits == "1/1"
    assert weight.constants(torch.ones(5, 2, 3, 3)) == 5
    assert repr(weight) == "XnorWeight(gradient='plain', centre=True)"
    assert {"input_scale=True", "(sign): SteSign(clip=1.5)"} <= set(map(str.strip, repr(activation).splitlines()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "rough"}, r"option gradient of XNOR-Net's weights must be 'exact', .*'straight'; got 'rough'"),
        ({"centre": "yes"}, r"option centre of XNOR-Net must be true or false; got 'yes'"),
        ({"input_scale": "yes"}, r"option input_scale of XNOR-Net must be true or false; got 'yes'"),
        ({"clip": 0.0}, r"clip of the sign's estimator must be a number above 0; got 0\.0"),
        ({"estimator": "sign"}, r"estimator of the sign must be 'ste_sign', 'approx_sign' or 'swish_sign'; got 'sign'"),
    ],
)
def test_a_wrong_option_is_told_with_what_is_allowed(options, message):
    with pytest.raises(BonnQatError, match=message):
        XNOR.configure(options)
