"""The other estimators: values, and gradients against the printed formulas, written here again in float64."""

import math

import pytest
import torch
from torch import Tensor

import bonn_qat
from bonn_qat import functional
from bonn_qat.bonn import BONN
from bonn_qat.errors import BonnQatError
from bonn_qat.quantizers import ApproxSign, BonnWeight, SteSign, SwishSign

POINTS = [-1e4, -40.0, -7.3, -2.0, -1.25, -1.0, -0.6, -0.1, -1e-12, -0.0, 0.0, 1e-12, 0.2, 0.75, 1.0, 1.25, 3.1, 1e4]
TIMES = {"0.4": 0.4, "1": 1.0, "3": 3.0}  # t of the error decay estimator, on both sides of max(1 / t, 1) = 1


def t(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


SIGNS = {
    "swish": functional.swish_sign,
    "swish, beta 1": lambda x: functional.swish_sign(x, 1.0),
    **{f"ede, t {name}": lambda x, v=value: functional.ede_sign(x, t(v, x.dtype)) for name, value in TIMES.items()},
}


def derivative(estimator, points: list[float], dtype: torch.dtype = torch.float64) -> list[float]:
    """What the estimator makes of a gradient that differs from point to point, with that gradient divided out."""
    x = torch.tensor(points, dtype=dtype, requires_grad=True)
    grad = torch.tensor([(-2.0) ** (index % 5) for index in range(len(points))], dtype=dtype)  # divides exactly
    estimator(x).backward(grad)
    return (x.grad / grad).tolist()


def swish_formula(x: float, beta: float) -> float:
    """``beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x))``, as printed."""
    if abs(beta * x) > 700:  # where cosh has no double; the quotient has long been below any
        return 0.0
    return beta * (2 - beta * x * math.tanh(beta * x / 2)) / (1 + math.cosh(beta * x))


def sign_swish(x: float, beta: float) -> float:
    """``2 sigma(beta x) (1 + beta x (1 - sigma(beta x))) - 1``."""
    sigma = 1 / (1 + math.exp(-beta * x))
    return 2 * sigma * (1 + beta * x * (1 - sigma)) - 1


def ede_formula(x: float, time: float) -> float:
    """``k t (1 - tanh(t x)^2)`` with ``k = max(1 / t, 1)``."""
    return max(1 / time, 1) * time * (1 - math.tanh(time * x) ** 2)


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", SIGNS.values(), ids=SIGNS)
def test_a_sign_is_plus_or_minus_one_and_plus_at_both_zeros(estimator, dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([-torch.inf, -2, -tiny, -0.0, 0.0, tiny, 2, torch.inf], dtype=dtype)
    before = x.clone()
    y = estimator(x)
    assert y.dtype == dtype
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 5)])
def test_a_magnitude_aware_sign_has_two_values_for_each_slice(shape):
    x = torch.randn(shape, dtype=torch.float64)
    x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    y = functional.magnitude_aware_sign(x)
    for own, signed in zip(x.flatten(1).tolist(), y.flatten(1).tolist(), strict=True):
        alpha = sum(map(abs, own)) / len(own)
        assert signed == pytest.approx([alpha if value >= 0 else -alpha for value in own], rel=1e-14)
        assert len({abs(value) for value in signed}) == 1


def test_a_leaky_clip_is_the_identity_and_two_lines():
    x = torch.tensor([-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    assert functional.leaky_clip(x).tolist() == pytest.approx([-1.2, -1, -0.5, 0, 0, 0.5, 1, 1.2], rel=1e-15)
    assert functional.leaky_clip(x, 0.0).tolist() == [-1, -1, -0.5, 0, 0, 0.5, 1, 1]
    assert functional.leaky_clip(x, 1.0).tolist() == x.tolist()


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0, 10.0])
def test_swish_sign_passes_its_formula(beta):
    expected = [swish_formula(x, beta) for x in POINTS]
    assert derivative(lambda x: functional.swish_sign(x, beta), POINTS) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert derivative(lambda x: functional.swish_sign(x, beta), [0.0, -0.0]) == [beta, beta]


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0, 10.0])
def test_swish_sign_passes_the_derivative_of_the_sign_swish(beta):
    points = [x / (10 * beta) for x in range(-60, 61)]
    step = 1e-5 / beta
    differences = [(sign_swish(x + step, beta) - sign_swish(x - step, beta)) / (2 * step) for x in points]
    largest = max(map(abs, differences))
    assert derivative(lambda x: functional.swish_sign(x, beta), points) == pytest.approx(
        differences, rel=1e-6, abs=1e-8 * largest
    )
    assert min(differences) < 0 < max(differences)  # beyond 2.4 / beta the SignSwish falls


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_ede_sign_passes_its_formula(time):
    expected = [ede_formula(x, time) for x in POINTS]
    assert derivative(lambda x: functional.ede_sign(x, t(time)), POINTS) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert derivative(lambda x: functional.ede_sign(x, t(time)), [0.0, -0.0]) == [max(time, 1.0)] * 2


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_ede_sign_passes_the_derivative_of_its_tanh(time):
    points = [x / 10 for x in range(-30, 31)]
    k, step = max(1 / time, 1), 1e-5
    differences = [k * (math.tanh(time * (x + step)) - math.tanh(time * (x - step))) / (2 * step) for x in points]
    passed = derivative(lambda x: functional.ede_sign(x, t(time)), points)
    assert passed == pytest.approx(differences, rel=1e-6, abs=1e-8)


def test_ede_sign_has_no_gradient_for_its_time():
    x, time = t(0.3).requires_grad_(), t(2.0).requires_grad_()
    functional.ede_sign(x, time).backward()
    assert time.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("clip", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (4, 1, 1, 1), (2, 9)])
def test_magnitude_aware_sign_passes_alpha_up_to_its_clip(shape, clip):
    x = torch.randn(shape, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, clip, -clip], dtype=torch.float64)
    x.view(-1)[: len(special)] = special
    x.requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)
    functional.magnitude_aware_sign(x, clip).backward(grad)
    for own, got, passed in zip(*(a.detach().flatten(1).tolist() for a in (x, grad, x.grad)), strict=True):
        alpha = sum(map(abs, own)) / len(own)
        expected = [alpha * g if abs(value) <= clip else 0.0 for value, g in zip(own, got, strict=True)]
        assert passed == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("slope", [0.1, 0.0, 0.5])
def test_leaky_clip_passes_one_inside_and_its_slope_beyond(slope):
    points = [-1e4, -3.0, -1.0000001, -0.9999999, -0.5, -0.0, 0.0, 0.5, 0.9999999, 1.0000001, 3.0, 1e4]
    expected = [slope if abs(x) > 1 else 1.0 for x in points]
    assert derivative(lambda x: functional.leaky_clip(x, slope), points) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("estimator", SIGNS.values(), ids=SIGNS)
def test_nothing_overflows_far_from_zero(estimator, dtype):
    # cosh(5 * 1e4) has no float, nor has cosh(5 * 20) in float32.
    x = torch.tensor([-1e4, -200.0, -20.0, 20.0, 200.0, 1e4], dtype=dtype, requires_grad=True)
    estimator(x).sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 1e-3
    assert x.grad[[0, 1, -2, -1]].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("beta", [1.0, 5.0])
def test_swish_sign_in_float32_is_near_its_formula(beta):
    points = [x / 8 for x in range(-80, 81)]  # exact in float32
    passed = derivative(lambda x: functional.swish_sign(x, beta), points, torch.float32)
    assert passed == pytest.approx([swish_formula(x, beta) for x in points], abs=2e-6 * beta)


# ------------------------------------------------------------------------------------------------ quantizers


def scheme(activation) -> bonn_qat.Scheme:
    return bonn_qat.Scheme(name="mine", title="Mine", reference="ours", weight=BonnWeight, activation=activation)


@pytest.mark.parametrize(
    ("quantizer", "option", "default", "other", "function"),
    [(SwishSign, "beta", 5.0, 2.0, functional.swish_sign), (SteSign, "clip", 1.0, 0.5, functional.ste_sign)],
)
def test_an_option_reaches_the_quantizer_and_its_function(quantizer, option, default, other, function):
    plain = scheme(quantizer)
    assert plain.options[option] == default
    assert plain.bits == "1/1"
    x = torch.tensor([-1.5, -0.7, -0.0, 0.0, 0.2, 0.9], dtype=torch.float64)
    for made, setting in ((plain, default), (plain.configure({option: other}), other)):
        activation = made.activation(4)
        assert isinstance(activation, quantizer)
        assert f"{option}={setting}" in repr(activation)
        value, scale = activation.quantize(x)
        assert torch.equal(value, function(x))
        assert scale.tolist() == 1
        assert scale.dtype == x.dtype
        assert derivative(lambda x, q=activation: q.quantize(x)[0], x.tolist()) == derivative(
            lambda x, s=setting: function(x, s), x.tolist()
        )
    with pytest.raises(BonnQatError, match=f"unknown option of the scheme 'mine' 'bta'; .*known: .*{option}"):
        plain.configure({"bta": 1.0})


@pytest.mark.parametrize(
    ("options", "quantizer", "function"),
    [
        ({}, SteSign, functional.ste_sign),
        ({"clip": 0.5}, SteSign, lambda x: functional.ste_sign(x, 0.5)),
        ({"estimator": "ste_sign", "clip": 2}, SteSign, lambda x: functional.ste_sign(x, 2.0)),
        ({"estimator": "approx_sign"}, ApproxSign, functional.approx_sign),
        ({"estimator": "swish_sign"}, SwishSign, functional.swish_sign),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bonns_estimator_is_an_option(options, quantizer, function):
    activation = BONN.configure(options).activation(4)
    assert type(activation) is quantizer
    assert derivative(lambda x: activation.quantize(x)[0], POINTS) == derivative(function, POINTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "sign"}, "estimator of the sign must be 'ste_sign', 'approx_sign' or 'swish_sign'; got 'sign'"),
        (
            {"estimator": "approx_sign", "clip": 2.0},
            "only the estimator 'ste_sign' has a clip; got clip=2.0 with 'approx_sign'",
        ),
        ({"clip": 0}, "clip of the sign's estimator must be a number above 0; got 0"),
        ({"clip": "wide"}, "clip of the sign's estimator must be a number above 0; got 'wide'"),
    ],
)
def test_an_unknown_estimator_is_an_error(options, words):
    with pytest.raises(BonnQatError, match=words):
        BONN.configure(options)


@pytest.mark.parametrize("quantizer", [SwishSign, SteSign])
def test_a_quantizer_works_on_vectors_and_images_without_knowing_the_channels(quantizer):
    for shape in ((2, 5), (2, 3, 4, 4)):
        answer = quantizer()(torch.randn(shape))
        assert answer.value.shape == shape
        assert answer.bit_width == 1
        assert not answer.scale.requires_grad


@pytest.mark.parametrize(
    "function",
    [
        functional.swish_sign,
        lambda x: functional.ede_sign(x, t(2.0)),
        functional.magnitude_aware_sign,
        functional.leaky_clip,
        lambda x: SwishSign(beta=3.0)(x).value,
    ],
    ids=["swish", "ede", "magnitude aware", "leaky clip", "SwishSign"],
)
def test_every_estimator_compiles_as_one_graph(function):
    results = []
    for call in (function, torch.compile(function, backend="eager", fullgraph=True)):
        x = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6).requires_grad_()
        y = call(x)
        y.backward(torch.arange(24, dtype=torch.float64).reshape(4, 6))
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].any()
