"""ABC-Net's sums of binary bases against formulas written out element by element, in double precision."""

import itertools
import math

import numpy as np
import pytest
import torch
from bonn_qat_baselines import abcnet
from bonn_qat_baselines.abcnet import ABCNET, ABCNET_5_5, AbcActivation, AbcWeight
from torch import nn

from bonn_qat import BonnQatError, binarize, parameter_groups, plugins, summary
from bonn_qat.layers import BinaryConv2d

DOUBLE = torch.float64
SHAPES = [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)]
# Mean exactly 0, variance exactly 1: with u in -1, 0, 1 some weights stand on the thresholds, and -0.0 on one of them.
ON_THE_THRESHOLDS = torch.tensor([2.0, -2, 1, -1, 1, -1, 0, -0.0, 0, 0, 0, 0], dtype=DOUBLE).reshape(2, 6)


@pytest.fixture
def pm():
    manager = plugins.create_manager(entry_points=False)
    manager.register(abcnet)
    return manager


def numbers(shape, seed):
    return torch.randn(shape, dtype=DOUBLE, generator=torch.manual_seed(seed))


def weight_bases(weight, count, spread, centre):
    """B_1 to B_M in Python, then alpha by numpy's least squares."""
    w = weight.flatten().tolist()
    mean = math.fsum(w) / len(w)
    std = math.sqrt(math.fsum((e - mean) ** 2 for e in w) / len(w))
    bases = []
    for m in range(1, count + 1):
        u = spread * (-1 + (m - 1) * 2 / (count - 1)) if count > 1 else 0.0
        bases.append([1.0 if e - (mean if centre else 0.0) + u * std >= 0 else -1.0 for e in w])
    alpha = np.linalg.lstsq(np.array(bases).T, np.array(w), rcond=None)[0]
    return [torch.tensor(b, dtype=DOUBLE).view_as(weight) for b in bases], torch.from_numpy(alpha)


def activation_bases(x, v, side):
    """Values A_n and their masks, element by element; ``side`` -1 is the printed mask."""
    bases, masks = [], []
    for shift in v.tolist():
        elements = x.flatten().tolist()
        bases.append([1.0 if min(max(e + shift, 0.0), 1.0) >= 0.5 else -1.0 for e in elements])
        masks.append([1.0 if 0 <= e + side * shift <= 1 else 0.0 for e in elements])
    return ([torch.tensor(row, dtype=DOUBLE).view_as(x) for row in rows] for rows in (bases, masks))


# ------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "weight", [*(numbers(shape, 0) + 0.3 for shape in SHAPES), ON_THE_THRESHOLDS], ids=lambda w: str(tuple(w.shape))
)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [1.0, 2.0])
@pytest.mark.parametrize("centre", [True, False])
def test_weights_are_the_least_squares_sum_of_their_bases(weight, count, spread, centre):
    grad = numbers(weight.shape, 1)
    latent = weight.clone().requires_grad_()
    quantizer = AbcWeight(weight, weight_bases=count, weight_spread=spread, centre=centre)
    value, scale = quantizer.quantize(latent)
    value.backward(grad)
    bases, alpha = weight_bases(weight, count, spread, centre)
    assert torch.equal(quantizer.decompose(weight)[0], torch.stack(bases))
    expected = sum(a * b for a, b in zip(alpha, bases, strict=True))
    torch.testing.assert_close(value.detach(), expected, rtol=1e-9, atol=1e-12)
    # Where bases coincide or are opposite, many alpha are as good: numpy's and ours are the shortest one.
    unique = np.linalg.matrix_rank(torch.stack(bases).flatten(1).numpy()) == count
    found = quantizer.decompose(weight)[1]
    assert (found - alpha).norm() <= (1e-12 if unique else 1e-6) * alpha.norm()
    torch.testing.assert_close(latent.grad, found.sum() * grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scale, found.abs().sum(), rtol=1e-9, atol=1e-12)
    assert not scale.requires_grad


def test_the_test_above_knows_weights_on_each_threshold():
    assert ON_THE_THRESHOLDS.mean() == 0
    assert ON_THE_THRESHOLDS.var(correction=0) == 1
    bases, _ = AbcWeight(ON_THE_THRESHOLDS, weight_bases=3).decompose(ON_THE_THRESHOLDS)
    assert [b.flatten()[i].item() for b, i in zip(bases, (2, 7, 3), strict=True)] == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_other_alpha_is_nearer_to_the_weights(count):
    weight = numbers((6, 5, 3, 3), 0)
    bases, alpha = AbcWeight(weight, weight_bases=count).decompose(weight)
    error = weight - torch.einsum("m,moikl->oikl", alpha, bases)
    assert torch.einsum("moikl,oikl->m", bases, error).abs().max() < 1e-9 * weight.numel()
    if count > 1:
        fewer = AbcWeight(weight, weight_bases=1).quantize(weight)[0]
        assert error.square().sum() < (weight - fewer).square().sum()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("centre", [True, False])
def test_a_single_base_is_exactly_one_scale_for_the_layer(dtype, centre):
    weight = numbers((4, 3, 3, 3), 0).to(dtype).requires_grad_()
    value, scale = AbcWeight(weight.detach(), centre=centre).quantize(weight)
    assert torch.equal(value.abs(), scale.expand_as(value))
    if not centre:
        torch.testing.assert_close(scale, weight.detach().abs().mean())  # BWN's, over the layer
        assert torch.equal(value >= 0, weight >= 0)


def test_five_bases_have_six_values_at_most():
    weight = numbers((8, 8, 3, 3), 0).float().requires_grad_()
    value, _ = AbcWeight(weight.detach(), weight_bases=5).quantize(weight)
    assert len(value.unique()) == 6  # the bases are nested: there is a value for each interval of W


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize(
    "weight", [torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, 3), torch.ones(1, 1, 1, 1)], ids=["halves", "zeros", "one"]
)
def test_bases_that_coincide_still_sum_up_to_the_weights(dtype, weight):
    latent = weight.to(dtype, copy=True).requires_grad_()
    value, _ = AbcWeight(weight, weight_bases=5, weight_spread=2.0).quantize(latent)
    value.sum().backward()
    torch.testing.assert_close(value, latent)
    torch.testing.assert_close(latent.grad, latent.detach())  # sum_m alpha_m is the weight


def test_opposite_bases_leave_the_weights_as_they_are():
    weight = torch.tensor([[0.9, 1.1, 0.9, 1.1]], dtype=DOUBLE)  # u std = +-0.2: all +1, all -1, and the sign between
    quantizer = AbcWeight(weight, weight_bases=3, weight_spread=2.0)
    bases, alpha = quantizer.decompose(weight)
    assert torch.equal(bases[0], -bases[2])
    torch.testing.assert_close(quantizer.quantize(weight)[0], weight, rtol=1e-9, atol=0)
    torch.testing.assert_close(alpha[1], torch.tensor(0.1, dtype=DOUBLE), rtol=1e-9, atol=0)


# -------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (5, 1, 3, 2), (7, 5)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("mask", ["threshold", "printed"])
def test_activations_and_all_their_gradients_are_the_papers(shape, count, mask):
    quantizer = AbcActivation(activation_bases=count, mask=mask).double()
    with torch.no_grad():
        quantizer.beta.copy_(torch.tensor([0.7, -0.3, 1.2, 0.5, 0.9])[:count])
    x, grad = 2 * numbers(shape, 0), numbers(shape, 1)
    # The thresholds and the ends of the masks for v of -1.5, 0 and 1.5, which are exact, and both zeros.
    edges = [0.0, -0.0, 0.5, 1.0, 1.5, 2.0, 2.5, -1.5, -1.0, -0.5]
    x.view(-1)[: len(edges)] = torch.tensor(edges, dtype=DOUBLE)
    inputs = x.clone().requires_grad_()
    value, scale = quantizer.quantize(inputs)
    value.backward(grad)

    v, beta = quantizer.v.detach(), quantizer.beta.detach()
    bases, masks = activation_bases(x, v, 1 if mask == "threshold" else -1)
    torch.testing.assert_close(
        value.detach(), sum(b * a for b, a in zip(beta, bases, strict=True)), rtol=1e-12, atol=1e-15
    )
    terms = [b * grad * m for b, m in zip(beta, masks, strict=True)]
    torch.testing.assert_close(inputs.grad, sum(terms), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quantizer.v.grad, torch.stack([t.sum() for t in terms]), rtol=1e-9, atol=1e-12)
    dbeta = torch.stack([(grad * a).sum() for a in bases])
    torch.testing.assert_close(quantizer.beta.grad, dbeta, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scale, beta.abs().sum())
    assert not scale.requires_grad


def test_the_threshold_and_both_ends_of_the_mask_belong_to_the_inside():
    quantizer = AbcActivation().double()  # v = 0
    x = torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    x = torch.cat([x, torch.nextafter(x, x - 9), torch.nextafter(x, x + 9)]).requires_grad_()
    value = quantizer(x).value
    value.sum().backward()
    assert value.tolist() == [-1, 1, 1, -1, -1, 1, -1, 1, 1]
    assert x.grad.tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 0]


def test_activations_have_one_value_more_than_bases():
    value = AbcActivation(activation_bases=5)(torch.linspace(-5, 5, 99)).value
    assert value.unique().tolist() == [-5, -3, -1, 1, 3, 5]


@pytest.mark.parametrize(
    ("count", "v"),
    [(1, [0]), (2, [-1.5, 1.5]), (3, [-1.5, 0, 1.5]), (4, [-1.5, -0.5, 0.5, 1.5]), (5, [-3.5, -2.5, -1.5, 0, 2.5])],
)
def test_v_starts_as_in_the_papers_table_and_beta_at_one(count, v):
    quantizer = AbcActivation(activation_bases=count)
    assert quantizer.v.tolist() == pytest.approx(v)
    assert quantizer.beta.tolist() == [1] * count


def test_v_and_beta_have_no_weight_decay():
    quantizer = AbcActivation(activation_bases=3)
    (group,) = parameter_groups(quantizer, lr=0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0
    assert {id(p) for p in group["params"]} == {id(quantizer.v), id(quantizer.beta)}


# ---------------------------------------------------------------------------------------------- layers and schemes


@pytest.mark.parametrize("scheme", [ABCNET, ABCNET_5_5, ABCNET.configure({"weight_bases": 3})], ids=lambda s: s.bits)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_sum_of_the_convolutions_of_all_pairs_of_bases(scheme, bias):
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=bias).double()
    layer = BinaryConv2d.from_float(conv, scheme, normalize=False).double()
    with torch.no_grad():
        layer.input_quant.beta.mul_(torch.linspace(0.5, 1.5, layer.input_quant.bits))
    x = (2 * numbers((2, 3, 7, 6), 0)).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    v, beta = layer.input_quant.v.detach(), layer.input_quant.beta.detach()
    weights, alpha = weight_bases(conv.weight.detach(), layer.weight_quant.bits, 1.0, True)
    inputs, masks = activation_bases(x.detach(), v, 1)
    for leaf in itertools.chain(weights, inputs):
        leaf.requires_grad_()
    expected = sum(
        alpha[m] * beta[n] * torch.conv2d(inputs[n], weights[m], None, stride=2, padding=1)
        for m in range(len(weights))
        for n in range(len(inputs))
    )
    expected = expected if conv.bias is None else expected + conv.bias.detach()[:, None, None]
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    expected.backward(grad)
    dbases = [b.grad * mask for b, mask in zip(inputs, masks, strict=True)]  # each contains its beta
    torch.testing.assert_close(x.grad, sum(dbases), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, sum(b.grad for b in weights), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.input_quant.v.grad, torch.stack([d.sum() for d in dbases]), rtol=1e-9, atol=1e-12)
    dbeta = torch.stack([(b.grad * b.detach()).sum() / s for b, s in zip(inputs, beta, strict=True)])
    torch.testing.assert_close(layer.input_quant.beta.grad, dbeta, rtol=1e-9, atol=1e-12)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), rtol=1e-9, atol=1e-12)


def test_a_negative_alpha_convolves_with_the_opposite_signs():
    conv = nn.Conv2d(1, 1, 3, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(
            torch.tensor([1.0] * 8 + [2.0]).view(1, 1, 3, 3)
        )  # one above the mean, the sum of B W below 0
    layer = BinaryConv2d.from_float(conv, ABCNET, normalize=False).double()
    value, _ = layer.weight_quant.quantize(layer.weight)
    assert layer.weight_quant.decompose(layer.weight)[1] < 0
    x = numbers((1, 1, 5, 5), 0)
    inputs = layer.input_quant.quantize(x)[0]
    torch.testing.assert_close(layer(x), torch.conv2d(inputs, value), rtol=1e-9, atol=1e-12)


def test_options_reach_both_quantizers_and_impossible_ones_are_named():
    scheme = ABCNET.configure(
        {"weight_bases": 3, "weight_spread": 2.0, "centre": False, "activation_bases": 4, "mask": "printed"}
    )
    weight, activation = scheme.weight(torch.zeros(1, 1, 1, 1)), scheme.activation(1)
    assert (weight.bits, weight.weight_spread, weight.centre) == (3, 2.0, False)
    assert (activation.bits, activation.mask) == (4, "printed")
    assert ABCNET_5_5.configure({"weight_bases": 2}).bits == "2/5"
    for option in ("weight_bases", "activation_bases"):
        for count in (0, 2.0):
            with pytest.raises(
                BonnQatError, match=rf"option {option} .* must be a whole number, at least 1; got {count}"
            ):
                ABCNET.configure({option: count})
    for spread in (0.0, math.nan, math.inf):
        with pytest.raises(
            BonnQatError, match="option weight_spread of the scheme 'abcnet' must be a number above 0; got"
        ):
            ABCNET.configure({"weight_spread": spread})
    with pytest.raises(BonnQatError, match=r"'threshold' or 'printed'; got 'none'"):
        ABCNET.configure({"mask": "none"})


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(180, 2))


@pytest.mark.parametrize(("scheme", "bits"), [("abcnet", 1), ("abcnet-5-5", 5)])
def test_a_bit_for_each_base_and_one_number_for_each_alpha(pm, scheme, bits):
    assert plugins.schemes(pm)[scheme].bits == f"{bits}/{bits}"
    report = summary(binarize(network(), scheme, pm=pm), (3, 8, 8))
    layer = report.layers[1]
    assert (layer.weight_bits, layer.input_bits, layer.scales) == (bits, bits, bits)
    assert layer.is_binary == (bits == 1)
    (activation,) = (other for other in report.others if other.type == "AbcActivation")
    assert activation.parameters == 2 * bits
