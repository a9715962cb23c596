"""MCN's modulated kernels and its losses against formulas written out kernel by kernel, in double precision."""

import copy
import math

import pytest
import torch
from bonn_qat_baselines import mcn
from bonn_qat_baselines.mcn import MCN, McnLoss, McnWeight
from torch import nn

from bonn_qat import BonnQatError, CenterLoss, Objective, binarize, plugins, summary
from bonn_qat.layers import BinaryConv2d

DOUBLE = torch.float64
SHAPES = [(3, 2, 3, 3), (10, 3, 2, 2), (4, 1, 1, 1), (6, 5)]
PLANES, CENTRES, MODULATIONS = [1, 4], ["kmeans", "sign"], ["elementwise", "mean"]


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(mcn)
    return manager


def kernels(shape, seed=0):
    """Latents that are not symmetric, with both zeros, the ends of the clip, and what lies just beyond them."""
    x = torch.randn(shape, dtype=DOUBLE, generator=torch.manual_seed(seed)) + 0.3
    special = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=DOUBLE)
    x.view(-1)[-4:] = special
    if x.numel() > 10:
        x.view(-1)[-8:-4] = torch.nextafter(special, 9 * special)
    return x


def made(weight, **options):
    """A quantizer whose planes differ from each other, and their elements too."""
    quantizer = McnWeight(weight, **options)
    with torch.no_grad():
        noise = torch.randn(quantizer.m_filter.shape, dtype=DOUBLE, generator=torch.manual_seed(7))
        quantizer.m_filter.copy_(1 + 0.5 * noise)
    return quantizer


def binarized(c, centres):
    """C^ element by element: five steps of Lloyd's algorithm, then the nearer centre."""
    values = c.flatten().tolist()
    high = sum(map(abs, values)) / len(values)
    low = -high
    for _ in range(5 if centres == "kmeans" else 0):
        upper = [e for e in values if abs(e - high) <= abs(e - low)]
        lower = [e for e in values if abs(e - high) > abs(e - low)]
        high = sum(upper) / len(upper) if upper else high
        low = sum(lower) / len(lower) if lower else low
    return torch.tensor([high if abs(e - high) <= abs(e - low) else low for e in values], dtype=DOUBLE).view_as(c)


def modulated(binary, m, modulation):
    """Q kernel by kernel."""
    q = torch.empty_like(binary)
    for o in range(len(binary)):
        plane = m[o % len(m)]
        q[o] = binary[o] * (plane if modulation == "elementwise" else plane.sum() / plane.numel())
    return q


def gradients(c, binary, m, g, modulation):
    """dC and dM of a gradient g of Q; loops over kernels and input channels."""
    dc, dm = torch.zeros_like(c), torch.zeros_like(m)
    for o in range(c.shape[0]):
        j = o % len(m)
        plane = m[j, 0]
        factor = plane if modulation == "elementwise" else plane.sum() / plane.numel()
        for i in range(c.shape[1]):
            dc[o, i] = g[o, i] * factor * ((c[o, i] >= -1) & (c[o, i] <= 1))
            product = g[o, i] * binary[o, i]
            dm[j, 0] += product if modulation == "elementwise" else product.sum() / plane.numel()
    return dc, dm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("centres", CENTRES)
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_value_and_gradients_are_the_books(shape, planes, centres, modulation):
    c = kernels(shape)
    quantizer = made(c, planes=planes, centres=centres, modulation=modulation)
    grad = torch.randn(shape, dtype=DOUBLE, generator=torch.manual_seed(1))
    latent = c.clone().requires_grad_()
    value, scale = quantizer.quantize(latent)
    value.backward(grad)
    m, binary = quantizer.m_filter.detach(), binarized(c, centres)
    dc, dm = gradients(c, binary, m, grad, modulation)
    torch.testing.assert_close(value.detach(), modulated(binary, m, modulation), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(latent.grad, dc, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantizer.m_filter.grad, dm, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scale, (binary.max() - binary.min()) / 2, rtol=1e-9, atol=1e-12)
    assert not scale.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("centres", CENTRES)
def test_a_layer_has_two_values_times_those_of_its_planes(dtype, centres):
    c = kernels((8, 5, 3, 3)).to(dtype).requires_grad_()
    quantizer = McnWeight(c.detach(), centres=centres)
    value, _ = quantizer.quantize(c)
    low, high = value.unique().tolist()
    assert low < 0 < high
    assert (low == -high) == (centres == "sign")
    with torch.no_grad():
        quantizer.m_filter.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1, 1, 1).expand(4, 1, 3, 3))
    value, _ = quantizer.quantize(c)
    for o in range(8):
        assert set(value[o].flatten().tolist()) == {2 ** (o % 4) * low, 2 ** (o % 4) * high}


def test_kmeans_finds_the_means_of_two_clusters_that_are_not_symmetric():
    c = torch.cat([torch.linspace(-0.3, -0.1, 20), torch.linspace(0.7, 1.3, 10)]).double().view(5, 6)
    binary, scale = McnWeight(c).binarize(c)
    assert binary.unique().tolist() == pytest.approx([-0.2, 1.0])
    assert scale.item() == pytest.approx(0.6)
    assert torch.equal(binary > 0, c > 0.4)


def test_a_centre_without_weights_keeps_its_place():
    c = torch.tensor([[0.1, 0.2, 0.9, 1.0]], dtype=DOUBLE)  # all nearer to 0.55 than to -0.55
    binary, scale = McnWeight(c).binarize(c)
    assert binary.tolist() == [pytest.approx([0.55] * 4)]
    assert scale.item() == pytest.approx(0.55)


@pytest.mark.parametrize("c", [torch.zeros(2, 3), torch.full((2, 3), 0.5), torch.tensor([[-0.5]])], ids=str)
def test_a_layer_of_one_value_keeps_it(c):
    latent = c.clone().requires_grad_()
    value, _ = McnWeight(c).quantize(latent)
    value.sum().backward()
    assert torch.equal(value.detach(), c)
    assert torch.equal(latent.grad, torch.ones_like(c))


def test_zero_counts_as_positive_whatever_its_sign():
    c = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert McnWeight(c, centres="sign").binarize(c)[0].tolist() == [[0.5, 0.5, 0.5, -0.5]]


def test_m_starts_at_one_for_any_weights_stays_positive_and_learns_slowly():
    weight = torch.randn(6, 3, 3, 3)
    quantizer = McnWeight(weight)
    for _ in range(2):
        assert torch.equal(quantizer.m_filter, torch.ones(4, 1, 3, 3))
        with torch.no_grad():
            quantizer.m_filter.normal_()
        quantizer.adopt(torch.randn(6, 3, 3, 3))
    with torch.no_grad():
        quantizer.m_filter.fill_(-0.5)
    before = weight.clone()
    quantizer.constrain(weight)
    assert torch.equal(quantizer.m_filter, torch.full((4, 1, 3, 3), 0.5))
    assert torch.equal(weight, before)
    assert quantizer.parameter_rules["m_filter"].slow


# ------------------------------------------------------------------------------------------------- layer and scheme


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_a_layer_is_the_convolution_of_float_inputs_with_the_modulated_kernels(bias, modulation):
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=bias).double()
    layer = BinaryConv2d.from_float(conv, MCN.configure({"modulation": modulation}), normalize=False)
    with torch.no_grad():
        layer.weight.copy_(kernels((6, 3, 3, 3)))
        layer.weight_quant.m_filter.copy_(made(layer.weight).m_filter)
    x = torch.randn(2, 3, 7, 6, dtype=DOUBLE, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    c, m = layer.weight.detach(), layer.weight_quant.m_filter.detach()
    binary = binarized(c, "kmeans")
    q, inputs = modulated(binary, m, modulation).requires_grad_(), x.detach().clone().requires_grad_()
    expected = torch.conv2d(inputs, q, conv.bias, stride=2, padding=1)
    dinputs, dq = torch.autograd.grad(expected, (inputs, q), grad)
    dc, dm = gradients(c, binary, m, dq, modulation)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, dinputs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, dc, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight_quant.m_filter.grad, dm, rtol=1e-9, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
        nn.Conv2d(5, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


def test_activations_norms_and_nonlinearities_stay_those_of_the_float_network(pm):
    net = network()
    model = binarize(net, "mcn", pm=pm)
    assert [type(layer) for layer in model] == [BinaryConv2d if i in (3, 5) else type(net[i]) for i in range(len(net))]
    assert model[3].input_quant is None
    assert isinstance(model[3].norm, nn.Identity)
    assert MCN.bits == "1/32"


@pytest.mark.parametrize(
    ("options", "constants"),
    [({}, 2 + 36), ({"planes": 2}, 2 + 18), ({"modulation": "mean"}, 2 + 4), ({"centres": "sign"}, 1 + 36)],
    ids=str,
)
def test_a_layer_deploys_a_bit_for_each_weight_its_centres_and_m(pm, options, constants):
    layer = summary(binarize(network(), MCN.configure(options), pm=pm), (3, 8, 8)).layers[1]
    assert (layer.weight_bits, layer.input_bits, layer.scales) == (1, 32, constants)


def test_options_reach_the_weights_and_impossible_ones_are_named():
    quantizer = MCN.configure({"planes": 3, "centres": "sign", "modulation": "mean"}).weight(torch.ones(2, 1, 3, 3))
    assert (quantizer.m_filter.shape, quantizer.centres) == ((3, 1, 3, 3), "sign")
    assert "modulation='mean'" in repr(quantizer)
    for planes in (0, 2.0):
        with pytest.raises(BonnQatError, match=rf"option planes .* must be a whole number, at least 1; got {planes}"):
            MCN.configure({"planes": planes})
    with pytest.raises(BonnQatError, match=r"'kmeans' or 'sign'; got 'median'"):
        MCN.configure({"centres": "median"})
    with pytest.raises(BonnQatError, match=r"'elementwise' or 'mean'; got 'sum'"):
        MCN.configure({"modulation": "sum"})


# ------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_filter_loss_and_its_gradients_are_the_books(pm, modulation):
    theta = 0.3
    model = binarize(network().double(), MCN.configure({"modulation": modulation}), pm=pm)
    with torch.no_grad():
        for layer in (model[3], model[5]):
            layer.weight.copy_(kernels(layer.weight.shape))
            layer.weight_quant.m_filter.copy_(made(layer.weight).m_filter)
    loss = McnLoss(model, weight=theta)()
    loss.backward()

    expected = 0.0
    for layer in (model[3], model[5]):
        c, m = layer.weight.detach(), layer.weight_quant.m_filter.detach()
        binary = binarized(c, "kmeans")
        error = c - modulated(binary, m, modulation)
        expected += theta / 2 * sum(e * e for e in error.flatten().tolist())
        _, dm = gradients(c, binary, m, -theta * error, modulation)  # (3.27), which no clip enters
        torch.testing.assert_close(layer.weight.grad, theta * error, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(layer.weight_quant.m_filter.grad, dm, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_filter_loss_owns_nothing_of_the_model_and_needs_mcns_weights(pm):
    model = binarize(network(), "mcn", pm=pm)
    loss = McnLoss(model)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    twin, twin_loss = copy.deepcopy((model, loss))
    with torch.no_grad():
        twin[3].weight.add_(1)
    assert twin_loss() > loss()
    with pytest.raises(BonnQatError, match="no weights of the scheme 'mcn' in Sequential"):
        McnLoss(network())


def test_the_scheme_fine_tunes_with_the_center_loss(pm):
    first, last = MCN.stages
    assert set(first.regularizers) == {"mcn"}
    assert set(last.regularizers) == {"mcn", "center"}
    assert math.isclose(first.share + last.share, 1)
    model = binarize(network(), "mcn", pm=pm)
    losses = Objective(model, pm=pm)(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]))
    assert set(losses.terms) == {"task", "mcn", "center"}
    losses.total.backward()
    assert model[3].weight_quant.m_filter.grad.any()


def test_the_center_losss_gradient_and_step_are_those_of_its_authors():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    center = CenterLoss(model, weight=0.2, alpha=0.5)
    centres = torch.randn(4, 3)
    center.centres.copy_(centres)
    features, targets = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 2, 2, 2, 1])
    model(features)
    loss = center(targets)
    loss.backward()

    f, c = features.detach().tolist(), centres.tolist()
    distances = [[f[b][k] - c[targets[b]][k] for k in range(3)] for b in range(5)]
    assert loss.item() == pytest.approx(0.2 / 2 * sum(d * d for row in distances for d in row) / 5, rel=1e-6)
    torch.testing.assert_close(features.grad, 0.2 * torch.tensor(distances) / 5)
    for m in range(4):
        own = [f[b] for b in range(5) if targets[b] == m]
        step = [sum(c[m][k] - row[k] for row in own) / (1 + len(own)) for k in range(3)]
        torch.testing.assert_close(center.centres[m], torch.tensor([c[m][k] - 0.5 * step[k] for k in range(3)]))
