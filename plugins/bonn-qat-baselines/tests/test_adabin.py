"""AdaBin's quantizers and its nonlinearity against formulas written out element by element, in double precision."""

import itertools
import math

import pytest
import torch
from bonn_qat_baselines import adabin
from bonn_qat_baselines.adabin import ADABIN, AdaBinActivation, AdaBinWeight, Maxout
from torch import nn

import bonn_qat
from bonn_qat import BonnQatError, plugins
from bonn_qat.layers import BinaryConv2d

DOUBLE = {"dtype": torch.float64}
SHARPNESS = {0.0: 1e-3, 0.25: 1e-2, 0.5: 0.1, 0.75: 1.0, 1.0: 10.0}  # t at some progress


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(adabin)
    return manager


def latents(shape):
    """Weights; where there is room, a filter of mean 1/2 that holds its mean and zeros."""
    weight = 1.5 * torch.randn(shape, generator=torch.manual_seed(0), **DOUBLE)
    if weight[0].numel() == 18:
        pairs = torch.tensor([0.5, -0.5, 0.75, 1.0, 1.5, 2.0, 0.125, 0.375], **DOUBLE)
        weight[0] = 0.5 + torch.cat([torch.tensor([0.0, -0.0], **DOUBLE), pairs, -pairs]).view_as(weight[0])
    return weight


def decayed(x, t):
    """The error decay estimator's k t (1 - tanh(t x)^2), by the hyperbolic cosine."""
    return max(1 / t, 1.0) * t / math.cosh(t * x) ** 2


def reference_weight(weight, grad, t):
    """alpha S(u) + beta and the gradient of W: the product rule with the derivatives of alpha, beta and u by W_i."""
    values, dweights = [], []
    for w, g in zip(weight.flatten(1).tolist(), grad.flatten(1).tolist(), strict=True):
        n = len(w)
        beta = math.fsum(w) / n
        alpha = math.sqrt(math.fsum((e - beta) ** 2 for e in w) / n)
        u = [(e - beta) / alpha for e in w]
        signs = [1.0 if e >= 0 else -1.0 for e in u]

        def derivative(j, i, n=n, alpha=alpha, u=u, signs=signs):
            dbeta, dalpha = 1 / n, u[i] / n
            du = ((i == j) - dbeta) / alpha - u[j] * dalpha / alpha
            return dalpha * signs[j] + alpha * decayed(u[j], t) * du + dbeta

        values.append([alpha * s + beta for s in signs])
        dweights.append([math.fsum(g[j] * derivative(j, i) for j in range(n)) for i in range(n)])
    return (torch.tensor(rows, **DOUBLE).view_as(weight) for rows in (values, dweights))


def reference_activation(x, a, b, grad, centre):
    """The values, and the gradients of x, a and b by the product rule."""
    values, dx, da, db = [], [], [], []
    for e, g in zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True):
        u = (e - b) / a
        s, slope = 1.0 if u >= 0 else -1.0, max(0.0, 2 - 2 * abs(u))
        u_by_x, u_by_a, u_by_b = 1 / a, -(e - b) / a**2, -1 / a
        values.append(a * s + b if centre == "paper" else a * (s + b))
        dx.append(g * a * slope * u_by_x)
        da.append(g * (s + a * slope * u_by_a + (b if centre == "code" else 0.0)))
        db.append(g * (a * slope * u_by_b + (a if centre == "code" else 1.0)))
    value, dx = (torch.tensor(row, **DOUBLE).view_as(x) for row in (values, dx))
    return value, dx, torch.tensor(math.fsum(da), **DOUBLE), torch.tensor(math.fsum(db), **DOUBLE)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 2, 1, 1), (2, 5)], ids=str)
@pytest.mark.parametrize("progress", SHARPNESS)
def test_value_and_gradient_of_weights_are_the_product_rules(shape, progress):
    weight = latents(shape)
    grad = torch.randn(shape, generator=torch.manual_seed(1), **DOUBLE)
    quantizer = AdaBinWeight(weight)
    quantizer.advance(progress)
    latent = weight.clone().requires_grad_()
    value, scale = quantizer.quantize(latent)
    value.backward(grad)
    expected, dweight = reference_weight(weight, grad, SHARPNESS[progress])
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-15)
    close(latent.grad, dweight)
    assert scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert not scale.requires_grad


def test_each_filter_has_exactly_two_values_around_its_mean():
    weight = latents((3, 2, 3, 3))
    value, scale = AdaBinWeight(weight).quantize(weight)
    for kernel, w, alpha in zip(value, weight, scale.flatten(), strict=True):
        low, high = kernel.unique().tolist()
        assert (low + high) / 2 == pytest.approx(w.mean().item())
        assert (high - low) / 2 == pytest.approx(alpha.item()) == pytest.approx(w.std(correction=0).item())
        assert torch.equal(kernel == high, w >= w.mean())
    assert (weight[0] == weight[0].mean()).sum() == 2  # counted above as +1


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("constant", [0.0, 0.1, -0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_filter_of_equal_weights_stays_finite_and_the_others_do_not_notice(shape, constant, dtype):
    weight = latents(shape).to(dtype)
    expected = AdaBinWeight(weight).quantize(weight)[0]
    weight[1] = constant
    latent = weight.clone().requires_grad_()
    quantizer = AdaBinWeight(weight)
    value, _ = quantizer.quantize(latent)
    grad = torch.randn(value.shape, generator=torch.manual_seed(1), **DOUBLE).to(dtype)
    value.backward(grad)
    torch.testing.assert_close(value[1].detach(), weight[1])
    assert torch.equal(value[[0, 2]], expected[[0, 2]])
    assert latent.grad.isfinite().all()
    if constant == 0:  # u is 0 and k t = 1, so that D = G
        torch.testing.assert_close(latent.grad[1], grad[1])


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (6, 5)], ids=str)
@pytest.mark.parametrize("centre", ["paper", "code"])
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.5, 0.25), (-0.75, -0.5), (1.3, 0.7)])
def test_value_and_gradients_of_activations_are_the_product_rules(shape, centre, a, b):
    x = 1.5 * torch.randn(shape, generator=torch.manual_seed(2), **DOUBLE)
    corners = [0.0, -0.0, b, b + a, b - a, 1.0, -1.0]
    x.view(-1)[: len(corners)] = torch.tensor(corners, **DOUBLE)
    grad = torch.randn(shape, generator=torch.manual_seed(3), **DOUBLE)
    quantizer = AdaBinActivation(shape[1], centre=centre).double()
    with torch.no_grad():
        quantizer.a.fill_(a)
        quantizer.b.fill_(b)
    x.requires_grad_()
    value, scale = quantizer.quantize(x)
    value.backward(grad)
    expected, *gradients = reference_activation(x.detach(), a, b, grad, centre)
    assert torch.equal(value, expected)
    assert len(value.unique()) == 2
    close([x.grad, quantizer.a.grad, quantizer.b.grad], gradients)
    assert scale == a
    assert not scale.requires_grad


@pytest.mark.parametrize(("centre", "values"), [("paper", [-0.25, 0.75]), ("code", [-0.375, 0.625])])
def test_the_centre_is_where_the_paper_or_the_code_has_it(centre, values):
    quantizer = ADABIN.configure({"centre": centre}).activation(3)
    with torch.no_grad():
        quantizer.a.fill_(0.5)
        quantizer.b.fill_(0.25)
    assert quantizer.quantize(torch.randn(2, 3, 8, 8))[0].unique().tolist() == values


@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 4, 5), 3), ((2, 3, 4, 5), 1), ((5, 3), 3), ((5, 3), 1)])
def test_maxout_has_a_learned_slope_on_either_side(shape, channels):
    x = torch.randn(shape, generator=torch.manual_seed(0), **DOUBLE)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0], **DOUBLE)
    grad = torch.randn(shape, generator=torch.manual_seed(1), **DOUBLE)
    p, q = torch.tensor([1.5, -0.5, 0.25], **DOUBLE)[:channels], torch.tensor([0.1, 0.7, -0.3], **DOUBLE)[:channels]
    module = Maxout(channels).double()
    module.load_state_dict({"p": p, "q": q})
    x.requires_grad_()
    y = module(x)
    y.backward(grad)
    expected, dx, dp, dq = (torch.zeros_like(like) for like in (grad, grad, p, q))
    for index in itertools.product(*map(range, shape)):
        c, e = index[1] % channels, x[index].item()
        slope, total = (p[c], dp) if e > 0 else (q[c], dq)
        expected[index] = slope * e
        dx[index] = slope * grad[index] if e else 0.0
        total[c] += grad[index] * e
    close(y, expected)
    close([x.grad, module.p.grad, module.q.grad], [dx, dp, dq])


def test_the_start_is_a_plain_sign_and_a_leaky_relu():
    x = torch.tensor([[-2.0, -0.0, 0.0, 3.0]]).T
    assert AdaBinActivation(1).quantize(x)[0].flatten().tolist() == [-1, 1, 1, 1]
    assert Maxout(1)(x).flatten().tolist() == [-0.5, 0, 0, 3]


@pytest.mark.parametrize("centre", ["paper", "code"])
@pytest.mark.parametrize(("stride", "padding", "bias"), [(1, 1, False), (2, 0, True)])
def test_a_layer_has_the_gradients_of_a_convolution_padded_with_zeros(centre, stride, padding, bias):
    x, a, b, t = torch.randn(2, 3, 5, 5, **DOUBLE), 0.6, 0.3, SHARPNESS[0.75]
    conv = nn.Conv2d(3, 4, 3, stride, padding, bias=bias, **DOUBLE)
    layer = BinaryConv2d.from_float(conv, ADABIN.configure({"centre": centre}), normalize=False).double()
    bonn_qat.advance(layer, 0.75)
    with torch.no_grad():
        layer.input_quant.a.fill_(a)
        layer.input_quant.b.fill_(b)
    weight = conv.weight.detach().clone()
    inputs = reference_activation(x, a, b, x, centre)[0].requires_grad_()
    kernels = next(reference_weight(weight, weight, t)).requires_grad_()
    expected = torch.conv2d(inputs, kernels, conv.bias, stride, padding)
    grad = torch.randn(expected.shape, generator=torch.manual_seed(1), **DOUBLE)
    expected.backward(grad)
    _, *gradients = reference_activation(x, a, b, inputs.grad, centre)
    _, dweight = reference_weight(weight, kernels.grad, t)

    layer.zero_grad()
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    close(y, expected)
    close([x.grad, layer.input_quant.a.grad, layer.input_quant.b.grad], gradients)
    close(layer.weight.grad, dweight)
    if bias:
        close(layer.bias.grad, grad.sum((0, 2, 3)))


def test_progress_sharpens_the_backward_of_the_weights_and_leaves_the_forward():
    conv = nn.Conv2d(3, 4, 3, **DOUBLE)
    layer = BinaryConv2d.from_float(conv, ADABIN, normalize=False).double()
    x = torch.randn(2, 3, 5, 5, **DOUBLE)
    outputs, gradients = [], []
    for progress in (0.0, 0.5, 0.9):
        bonn_qat.advance(layer, progress)
        y = layer(x)
        outputs.append(y)
        gradients.append(torch.autograd.grad(y.square().sum(), layer.weight)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(gradients[0], gradients[1])
    assert not torch.allclose(gradients[1], gradients[2])


def test_inputs_and_weights_have_one_bit_and_a_filter_two_constants():
    weight = torch.randn(6, 3, 3, 3)
    assert ADABIN.bits == "1/1"
    assert ADABIN.weight(weight).constants(weight) == 12
    assert not ADABIN.weight(weight).scaled_sign


def test_t_starts_at_t_min_in_the_precision_of_the_weights():
    assert AdaBinWeight(torch.zeros(2, 5, **DOUBLE)).sign.t.item() == 0.001


def test_schedule_and_centre_are_options_of_the_scheme():
    assert ADABIN.options == {"t_min": 0.001, "t_max": 10.0, "centre": "paper"}
    scheme = ADABIN.configure({"t_min": 0.1, "t_max": 0.2, "centre": "code"})
    quantizer = scheme.weight(torch.zeros(2, 1, 1, 1))
    assert quantizer.sign.t == pytest.approx(0.1)
    quantizer.advance(1.0)
    assert quantizer.sign.t == pytest.approx(0.2)
    assert scheme.activation(1).centre == "code"
    assert "centre='code'" in repr(scheme.activation(1))
    with pytest.raises(BonnQatError, match=r"'adabin' .* 0 < t_min <= t_max; got t_min=2.0 and t_max=1.0"):
        ADABIN.configure({"t_min": 2.0, "t_max": 1.0})
    with pytest.raises(BonnQatError, match=r"centre of the scheme 'adabin' must be 'paper' or 'code'; got 'mean'"):
        ADABIN.configure({"centre": "mean"})


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    ).double()


def binary(net, pm):
    return bonn_qat.binarize(net, "adabin", pm=pm)


def test_what_is_learned_does_not_decay(pm):
    model = binary(network(), pm)
    learned = {id(p) for m in model.modules() if isinstance(m, AdaBinActivation | Maxout) for p in m.parameters()}
    assert len(learned) == 4
    for group in bonn_qat.parameter_groups(model, lr=1.0, weight_decay=0.1):
        if group["weight_decay"]:
            assert learned.isdisjoint(map(id, group["params"]))
