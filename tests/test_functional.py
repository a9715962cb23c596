"""The functions against float64 references, written here from the papers' equations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bonn_qat import functional
from bonn_qat.engine import operators

FLOATS = [torch.float32, torch.float64, torch.bfloat16]
quick = settings(database=None, deadline=None, max_examples=60)
numbers = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30)


def relative_error(value: object, reference: object) -> float:
    """Largest deviation over the largest entry of the reference."""
    expected = np.asarray(reference, dtype=np.float64)
    deviation = np.abs(np.asarray(value, dtype=np.float64) - expected).max()
    return float(deviation / max(np.abs(expected).max(), 1e-300))


def array(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().double().numpy()


def np_sign(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


# ---------------------------------------------------------------------------------------------- magnitudes


@given(st.floats(2.0**-149, float(np.finfo(np.float32).max), width=32))
@quick
def test_a_power_of_two_is_at_most_the_number_and_more_than_its_half(x: float) -> None:
    power = functional.power_of_two(torch.tensor(x)).item()
    assert x / 2 < power <= x
    assert math.frexp(power)[0] == 0.5


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30),
    st.integers(-110, 120),
    st.floats(1e-4, 10),
    st.booleans(),
)
@quick
def test_rescaled_numbers_have_the_deviation_and_the_signs_and_constants_the_magnitude(
    values: list[float], exponent: int, std: float, is_constant: bool
) -> None:
    x = torch.tensor(values[:1] * len(values) if is_constant else values) * 2.0**exponent
    found = functional.rescaled(x, std)
    assert found.isfinite().all()
    spread = np.ptp(array(x)) / max(np.abs(array(x)).max(), 1e-300)
    if spread > 1e-3:
        assert array(found).std(ddof=1) == pytest.approx(std, rel=1e-3)
        assert torch.equal(found[x.abs() > x.abs().max() / 1e6] > 0, x[x.abs() > x.abs().max() / 1e6] > 0)
    if is_constant:
        np.testing.assert_allclose(array(found), std * np.sign(array(x)), rtol=1e-6)


def test_rescaling_is_one_multiplication_where_nothing_is_out_of_range() -> None:
    x = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(functional.rescaled(x, 0.01), x * (0.01 / x.std()))


# ---------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("estimator", [functional.sign, functional.ste_sign, functional.approx_sign])
def test_signs_are_plus_or_minus_one_and_zero_counts_as_plus(estimator, dtype):
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([-torch.inf, -2, -1, -tiny, -0.0, 0.0, tiny, 1, 2, torch.inf], dtype=dtype)
    y = estimator(x)
    assert y.dtype == dtype
    assert y.tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]


@quick
@given(numbers)
def test_sign_leaves_its_argument_alone(values):
    x = torch.tensor(values)
    before = x.clone()
    assert functional.sign(x).tolist() == [1.0 if v >= 0 else -1.0 for v in values]
    assert torch.equal(x, before)


@quick
@given(numbers, st.sampled_from(FLOATS), st.sampled_from([0.25, 0.5, 1.0, 1.1, 3.0]))
def test_ste_sign_passes_gradients_inside_its_clip(values, dtype, clip):
    x = torch.tensor(values).to(dtype)
    x = torch.cat([x, x.new_tensor([clip, -clip, 0.0, -0.0])]).requires_grad_()
    grad = torch.linspace(-2, 3, len(x)).to(dtype)
    functional.ste_sign(x, clip).backward(grad)
    bound = float(torch.tensor(clip, dtype=dtype))  # the clip as the dtype can say it
    expected = [g if abs(v) <= bound else 0.0 for v, g in zip(x.tolist(), grad.tolist(), strict=True)]
    assert x.grad.tolist() == expected


@pytest.mark.parametrize("clip", [0.3, 1.0, 1.25])
@pytest.mark.parametrize("dtype", FLOATS)
def test_ste_sign_includes_its_bounds_and_nothing_beyond(dtype, clip):
    bound = torch.tensor(clip, dtype=dtype)
    beyond = torch.nextafter(bound, torch.full_like(bound, torch.inf))
    x = torch.stack([bound, -bound, beyond, -beyond]).requires_grad_()
    functional.ste_sign(x, clip).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]


@quick
@given(numbers)
def test_approx_sign_passes_the_slope_of_the_parabola(values):
    x = torch.tensor([*values, 1.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    grad = torch.linspace(-2, 3, len(x), dtype=torch.float64)
    functional.approx_sign(x).backward(grad)
    slopes = [2 + 2 * v if -1 <= v < 0 else 2 - 2 * v if 0 <= v < 1 else 0.0 for v in x.tolist()]
    np.testing.assert_allclose(x.grad, np.array(slopes) * grad.numpy(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_approx_sign_at_its_corners(dtype):
    x = torch.tensor([-2, -1, -0.5, -0.0, 0.0, 0.5, 1, 2], dtype=dtype, requires_grad=True)
    functional.approx_sign(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 2, 2, 1, 0, 0]


# ------------------------------------------------------------------------------------------- BONN's weights

SHAPES = {"kernel": (1, 3, 2, 3), "plane": (1, 1, 2, 3), "filter": (4, 1, 1, 1)}


def scale_of(modulation: np.ndarray) -> np.ndarray:
    """The mean of what one kernel is multiplied by, for each kernel or, ``(1, 1, 1, 1)``, for all."""
    return modulation.mean((1, 2, 3), keepdims=True)


def add_to(modulation: np.ndarray, i: int, share: np.ndarray) -> None:
    """Add a kernel's gradient to that of the modulation, summed over what shares an element of it."""
    own = modulation[i if len(modulation) > 1 else 0]
    shared = tuple(axis for axis in range(share.ndim) if own.shape[axis] == 1)
    own += share.sum(shared, keepdims=True)


@pytest.fixture(params=SHAPES)
def latent_and_modulation(request):
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(4, 3, 2, 3, generator=generator, dtype=torch.float64)
    modulation = torch.rand(SHAPES[request.param], generator=generator, dtype=torch.float64) * 3 - 0.5
    modulation[0, 0, 0, 0] = 2.0
    latent[0, :, 0, 0] = torch.tensor([0.5, 0.0, -0.0])  # |w X| = 1 exactly, and zero
    latent[1:, 0, 0, 0] = -0.5
    return latent.requires_grad_(), modulation.requires_grad_()


def test_bonn_forward_is_the_mean_modulation_times_sign(latent_and_modulation):
    latent, modulation = latent_and_modulation
    value = functional.bonn_binarize(latent, modulation)
    assert relative_error(value.detach(), scale_of(array(modulation)) * np_sign(array(latent))) < 1e-6
    assert all(len(kernel.unique()) == 2 for kernel in value.detach())


def equations_12_and_15(latent: np.ndarray, modulation: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The task gradient G of X^ to one layer's X (12) and to its w (15), kernel by kernel as printed."""
    to_latent, to_modulation = np.zeros_like(latent), np.zeros_like(modulation)
    for i, kernel in enumerate(latent):
        w = modulation[i if len(modulation) > 1 else 0]
        inside = ((w * kernel >= -1) & (w * kernel <= 1)).astype(float)
        to_latent[i] = grad[i] * inside * w
        add_to(to_modulation, i, grad[i] * inside * kernel)
    return to_latent, to_modulation


def test_bonn_backward_is_equations_12_and_15(latent_and_modulation):
    latent, modulation = latent_and_modulation
    grad = torch.randn(latent.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    functional.bonn_binarize(latent, modulation).backward(grad)
    outside = (modulation * latent).abs() > 1
    assert 0 < outside.sum() < outside.numel()  # the mask matters here
    to_latent, to_modulation = equations_12_and_15(array(latent), array(modulation), array(grad))
    assert relative_error(latent.grad, to_latent) < 1e-6
    assert relative_error(modulation.grad, to_modulation) < 1e-6
    assert array(latent.grad)[0, 0, 0, 0] != 0  # |w X| = 1 is inside
    assert modulation.shape[0] > 1 or (array(latent.grad)[:, 0, 0, 0] != 0).all()


def test_the_inverse_reading_is_the_mean_inverse_times_sign_with_the_estimator_on_the_product(latent_and_modulation):
    latent, modulation = (x.detach().clone() for x in latent_and_modulation)
    modulation.abs_().add_(0.1)
    modulation[0, 0, 0, 0] = 2.0
    latent.requires_grad_(), modulation.requires_grad_()
    grad = torch.randn(latent.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    value = functional.bonn_binarize_inverse(latent, modulation)
    got = torch.autograd.grad(value, [latent, modulation], grad)

    # A surrogate for autograd: Q is the sign with the derivative of the clamp.
    product = modulation * latent
    clamped = product.clamp(-1 - 1e-9, 1 + 1e-9)  # at its bounds it passes no gradient
    estimated = clamped + (torch.from_numpy(np_sign(array(latent))) - clamped).detach()
    surrogate = (1 / modulation).mean((1, 2, 3), keepdim=True) * estimated
    assert relative_error(value.detach(), array(surrogate)) < 1e-12
    assert all(len(kernel.unique()) == 2 for kernel in value.detach())
    assert 0 < (product.abs() > 1).sum() < product.numel()
    for one, other in zip(got, torch.autograd.grad(surrogate, [latent, modulation], grad), strict=True):
        assert relative_error(one, array(other)) < 1e-12


@pytest.mark.parametrize("inverse", [False, True])
def test_a_scale_is_one_number_where_all_kernels_share_their_modulation(latent_and_modulation, inverse):
    _, modulation = latent_and_modulation
    scale = functional.bonn_scale(modulation, inverse=inverse)
    assert scale.shape == (() if len(modulation) == 1 else (4, 1, 1, 1))
    values = 1 / array(modulation) if inverse else array(modulation)
    assert relative_error(scale.detach(), scale_of(values).reshape(scale.shape)) < 1e-12


# ------------------------------------------------------------------------------------- the binary convolution

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": (2, 2), "padding": (2, 2)},
    "groups": {"groups": 2, "padding": (1, 1), "stride": (2, 2)},
}
SCALES = {
    "scalar": torch.tensor(0.37),
    "negative": torch.tensor(-0.21),
    "per filter": torch.tensor([0.1, 0.7, -0.4, 1.3]).reshape(4, 1, 1, 1),
}


def _binary_problem(geometry: dict[str, object], scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = functional.sign(torch.randn(2, 6, 9, 8, generator=generator)).to(dtype)
    shape = (4, 6 // int(geometry.get("groups", 1)), 3, 3)
    scale = scale.to(dtype)
    value = scale * functional.sign(torch.randn(shape, generator=generator)).to(dtype)
    return x.requires_grad_(), value.requires_grad_(), scale


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_binary_conv2d_is_conv2d_with_its_gradients(geometry, scale):
    x, value, scale = _binary_problem(geometry, scale, torch.float64)
    y = functional.binary_conv2d(x, value, scale, **geometry)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    got = torch.autograd.grad(y, [x, value], grad)

    names = ("stride", "padding", "dilation", "groups")
    expected = F.conv2d(x, value, None, **{name: geometry[name] for name in names if name in geometry})
    reference = torch.autograd.grad(expected, [x, value], grad)
    assert relative_error(y.detach(), expected.detach()) < 1e-12
    for one, other in zip(got, reference, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_binary_conv2d_sums_are_exact_integers(geometry):
    x, value, scale = _binary_problem(geometry, torch.tensor(0.25), torch.float32)
    sums = functional.binary_conv2d(x, value, scale, **geometry) * 4
    exact = F.conv2d(x.double(), functional.sign(value).double(), **geometry)
    assert torch.equal(sums.double(), exact)
    assert torch.equal(sums, sums.round())


def test_binary_conv2d_of_many_channels_is_exact_in_single_precision():
    generator = torch.Generator().manual_seed(7)
    x = functional.sign(torch.randn(1, 512, 4, 4, generator=generator))
    value = functional.sign(torch.randn(8, 512, 3, 3, generator=generator))
    y = functional.binary_conv2d(x, value, torch.tensor(1.0), padding=(1, 1))
    assert torch.equal(y.double(), F.conv2d(x.double(), value.double(), padding=1))


def test_binary_conv2d_with_scale_zero_is_zero():
    x, value, scale = _binary_problem({}, torch.tensor(0.0), torch.float32)
    assert not functional.binary_conv2d(x, value, scale).any()


def test_binary_conv2d_gives_only_the_gradients_that_are_asked_for():
    x, value, scale = _binary_problem({}, torch.tensor(0.5), torch.float32)
    functional.binary_conv2d(x.detach(), value, scale).sum().backward()
    assert x.grad is None
    assert value.grad is not None
    functional.binary_conv2d(x, value.detach(), scale).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_binary_conv2d_under_autocast(scale):
    x, value, scale = _binary_problem({}, scale, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.binary_conv2d(x, value, scale)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.detach().float(), F.conv2d(x, value).detach()) < 2**-7
    y.float().square().mean().backward()
    for tensor in (x, value):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def _mostly_positive(*shape: int) -> Tensor:
    """Signs, of which nine of ten are +1: sums of many products are large."""
    return functional.sign(torch.rand(shape, generator=torch.Generator().manual_seed(9)) - 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_autocast", [True, False], ids=["autocast", "as given"])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_scaled_sums_of_half_precision_are_rounded_once(kind, by_autocast, dtype):
    if kind == "convolution":
        x, signs, scale = _mostly_positive(2, 512, 5, 5), _mostly_positive(8, 512, 3, 3), torch.rand(8, 1, 1, 1)
        sums, function = F.conv2d(x.double(), signs.double()), functional.binary_conv2d
    else:
        x, signs, scale = _mostly_positive(6, 4001), _mostly_positive(8, 4001), torch.rand(8)
        sums, function = F.linear(x.double(), signs.double()), functional.binary_linear
    assert sums.abs().max() > 2048  # from where not even float16 holds every integer
    scale = scale.to(dtype).float()  # so that what is given in half precision has the same scale
    value = signs * scale.reshape(-1, *[1] * (signs.ndim - 1))
    expected = (sums.float() * scale.flatten().reshape(-1, *[1] * (sums.ndim - 2))).to(dtype)
    with torch.autocast("cpu", dtype, enabled=by_autocast):
        found = function(*((x, value, scale) if by_autocast else (x.to(dtype), value.to(dtype), scale)))
    assert found.dtype == dtype
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------- PReLU


@pytest.mark.parametrize("channels", [1, 4], ids=["scalar", "per channel"])
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 6), (2, 4, 3, 5)], ids=["2-D", "3-D", "4-D"])
def test_prelu_is_torchs_in_both_directions(shape, channels):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x.flatten()[:2] = torch.tensor([0.0, -0.0])
    x.requires_grad_()
    slope = torch.randn(channels, generator=generator, dtype=torch.float64).requires_grad_()
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    y, expected = functional.prelu(x, slope), torch.prelu(x, slope)
    assert torch.equal(y, expected)
    for one, other in zip(
        torch.autograd.grad(y, [x, slope], grad), torch.autograd.grad(expected, [x, slope], grad), strict=True
    ):
        assert relative_error(one, other) < 1e-12


def test_prelu_under_autocast_gives_gradients():
    x, slope = torch.randn(2, 3, 4, 4, requires_grad=True), torch.full((3,), 0.25, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.prelu(F.conv2d(x, torch.eye(3)[:, :, None, None]), slope)
    y.float().sum().backward()
    assert slope.grad.dtype == torch.float32
    assert relative_error(slope.grad, x.detach().clamp(max=0).sum((0, 2, 3))) < 2**-6


# ------------------------------------------------------------------------------------------ the kernel loss


def first_sum_of_9(
    latent: np.ndarray, modulation: np.ndarray, mu: np.ndarray, sigma: np.ndarray, nu: float, binarized: np.ndarray
) -> float:
    """Half of one layer's part of (9)'s first sum, lambda = 1, term by term; ``binarized`` is X^."""
    total = 0.0
    for i, kernel in enumerate(latent):
        plus = kernel >= 0
        w = modulation if modulation.size == 1 else modulation[i if len(modulation) > 1 else 0]
        total += ((binarized[i] - w * kernel) ** 2).sum()
        total += nu * ((kernel[plus] - mu[i]) ** 2).sum() / sigma[i] ** 2
        total += nu * ((kernel[~plus] + mu[i]) ** 2).sum() / sigma[i] ** 2
        total += nu * kernel.size * math.log(sigma[i] ** 2)
    return total / 2


def printed_gradients(
    latent: np.ndarray, modulation: np.ndarray, mu: np.ndarray, sigma: np.ndarray, nu: float, binarized: np.ndarray
) -> dict[str, np.ndarray]:
    """(13), (16), (17) and (18) as printed, lambda = 1; (16) summed over what shares an element of w."""
    to_latent, to_modulation = np.zeros_like(latent), np.zeros_like(modulation)
    to_mu, to_sigma = np.zeros_like(mu), np.zeros_like(sigma)
    for i, kernel in enumerate(latent):
        w = modulation[i if len(modulation) > 1 else 0]
        plus = kernel >= 0
        prior = np.where(plus, kernel - mu[i], kernel + mu[i]) / sigma[i] ** 2
        to_latent[i] = w * (w * kernel - binarized[i]) + nu * prior
        add_to(to_modulation, i, (w * kernel - binarized[i]) * kernel)
        per_element = np.where(plus, mu[i] - kernel, mu[i] + kernel) / sigma[i] ** 2
        to_mu[i] = nu / kernel.size * per_element.sum()
        squares = np.where(plus, (kernel - mu[i]) ** 2, (kernel + mu[i]) ** 2)
        to_sigma[i] = nu / kernel.size * (-squares / sigma[i] ** 3 + 1 / sigma[i]).sum()
    return {"X": to_latent, "w": to_modulation, "mu": to_mu, "sigma": to_sigma}


def central_differences(function, at: np.ndarray, step: float) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def kernel_problem(granularity: str = "kernel", dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    latent = torch.randn(4, 3, 2, 3, generator=generator, dtype=torch.float64)
    latent = latent.sign() * (latent.abs() + 0.05)  # no element so near to zero that a difference crosses it
    return {
        "X": latent.to(dtype).requires_grad_(),
        "w": torch.rand(SHAPES[granularity], generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "mu": (torch.rand(4, generator=generator, dtype=torch.float64) + 0.3).to(dtype).requires_grad_(),
        "sigma": (torch.rand(4, generator=generator, dtype=torch.float64) + 0.5).to(dtype).requires_grad_(),
    }


def gradients_of_kernel_loss(
    problem: dict[str, Tensor], nu: float, **options: object
) -> tuple[float, dict[str, np.ndarray]]:
    loss = functional.kernel_loss(problem["X"], problem["w"], problem["mu"], problem["sigma"], nu=nu, **options)
    grads = torch.autograd.grad(loss, list(problem.values()))
    return loss.item(), {name: array(grad) for name, grad in zip(problem, grads, strict=True)}


@pytest.mark.parametrize("nu", [0.0, 1e-4, 0.7])
@pytest.mark.parametrize("granularity", SHAPES)
def test_kernel_loss_is_the_first_sum_of_9_with_the_printed_gradients(granularity, nu):
    problem = kernel_problem(granularity)
    value, gradients = gradients_of_kernel_loss(problem, nu)
    arrays = [array(x) for x in problem.values()]
    binarized = scale_of(arrays[1]) * np_sign(arrays[0])
    assert value == pytest.approx(first_sum_of_9(*arrays, nu, binarized), rel=1e-12)
    for name, expected in printed_gradients(*arrays, nu, binarized).items():
        assert relative_error(gradients[name], expected) < 1e-6, name


@pytest.mark.parametrize("per_element", [True, False], ids=["printed", "derivative"])
@pytest.mark.parametrize("magnitude", ["mean", "one"])
@pytest.mark.parametrize("granularity", SHAPES)
def test_kernel_loss_gradients_are_finite_differences_of_9(granularity, magnitude, per_element):
    nu = 0.3
    problem = kernel_problem(granularity)
    scale = problem["X"].new_ones(()) if magnitude == "one" else None
    _, gradients = gradients_of_kernel_loss(problem, nu, scale=scale, per_element=per_element)
    arrays = {name: array(x) for name, x in problem.items()}
    # Constant: it does not move with X or w.
    binarized = (scale_of(arrays["w"]) if magnitude == "mean" else 1.0) * np_sign(arrays["X"])
    elements = arrays["X"][0].size if per_element else 1
    # Central differences are exact for the quadratics in X, w and mu at any step.
    for name, step, divisor in [("X", 1e-2, 1), ("w", 1e-2, 1), ("mu", 1e-2, elements), ("sigma", 1e-4, elements)]:

        def moved(at: np.ndarray, name: str = name) -> float:
            return first_sum_of_9(*(at if key == name else x for key, x in arrays.items()), nu, binarized)

        expected = central_differences(moved, arrays[name], step) / divisor
        assert relative_error(gradients[name], expected) < 1e-6, name


@pytest.mark.parametrize("per_filter", [True, False], ids=["per filter", "scalar"])
def test_kernel_loss_takes_a_given_scale_in_place_of_a_modulation(per_filter):
    problem = kernel_problem()
    scale = problem["X"].detach().abs().mean((1, 2, 3), keepdim=True) if per_filter else torch.tensor(0.4).double()
    loss = functional.kernel_loss(problem["X"], scale, problem["mu"], problem["sigma"], nu=0.3, scale=scale)
    loss.backward()
    latent, mu, sigma = (array(problem[name]) for name in ("X", "mu", "sigma"))
    binarized = array(scale) * np_sign(latent)
    assert loss.item() == pytest.approx(first_sum_of_9(latent, array(scale), mu, sigma, 0.3, binarized), rel=1e-12)

    def moved(at: np.ndarray) -> float:
        return first_sum_of_9(at, array(scale), mu, sigma, 0.3, binarized)

    assert relative_error(problem["X"].grad, central_differences(moved, latent, 1e-2)) < 1e-6


@pytest.mark.parametrize("granularity", SHAPES)
def test_kernel_loss_of_stacked_layers_is_the_sum_over_them(granularity):
    layers = [kernel_problem(granularity) for _ in range(3)]
    for depth, problem in enumerate(layers):
        for name in problem:
            problem[name] = (problem[name].detach() * (1 + depth)).requires_grad_()
    values, gradients = zip(*(gradients_of_kernel_loss(problem, 0.3) for problem in layers), strict=True)
    stacked = {name: torch.stack([problem[name] for problem in layers]) for name in layers[0]}
    value, together = gradients_of_kernel_loss(stacked, 0.3)
    assert value == pytest.approx(sum(values), rel=1e-12)
    for name, gradient in together.items():
        assert relative_error(gradient, np.stack([one[name] for one in gradients])) < 1e-6, name


def test_kernel_loss_has_no_gradient_for_mu_and_sigma_at_their_fixed_point():
    latent = kernel_problem()["X"].detach()
    magnitudes = latent.abs().flatten(1)
    mu = magnitudes.mean(1).requires_grad_()
    sigma = magnitudes.var(1, correction=0).sqrt().requires_grad_()
    functional.kernel_loss(latent, torch.ones(1, 3, 2, 3).double(), mu, sigma, nu=1.0).backward()
    assert mu.grad.abs().max() < 1e-14
    assert sigma.grad.abs().max() < 1e-14


# ----------------------------------------------------------------------------------------- the feature loss


def feature_problem(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {
        "features": torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "targets": torch.tensor([0, 2, 2, 1, 0, 2, 0]),
        "centres": torch.randn(4, 5, generator=generator, dtype=torch.float64).to(dtype),
        "sigma": (torch.rand(4, 5, generator=generator, dtype=torch.float64) + 0.4).to(dtype).requires_grad_(),
    }


def second_sum_of_9(features: np.ndarray, targets: np.ndarray, centres: np.ndarray, sigma: np.ndarray) -> float:
    """Half of (9)'s second sum, theta = 1, averaged over the samples of a batch."""
    total = 0.0
    for f, m in zip(features, targets, strict=True):
        total += ((f - centres[m]) ** 2).sum()
        for k in range(len(f)):
            total += (f[k] - centres[m, k]) ** 2 / sigma[m, k] ** 2 + math.log(sigma[m, k] ** 2)
    return total / 2 / len(features)


def feature_gradients(
    features: np.ndarray, targets: np.ndarray, centres: np.ndarray, sigma: np.ndarray
) -> dict[str, np.ndarray]:
    to_features, to_sigma = np.zeros_like(features), np.zeros_like(sigma)
    for b, m in enumerate(targets):
        error = features[b] - centres[m]
        to_features[b] = (error + error / sigma[m] ** 2) / len(features)
        to_sigma[m] += (-(error**2) / sigma[m] ** 3 + 1 / sigma[m]) / len(features)
    return {"features": to_features, "sigma": to_sigma}


def test_feature_loss_is_the_second_sum_of_9_averaged_over_the_batch():
    problem = feature_problem()
    loss = functional.feature_loss(**problem)
    features, _, centres, sigma = (array(x) for x in problem.values())
    targets = problem["targets"].numpy()
    assert loss.item() == pytest.approx(second_sum_of_9(features, targets, centres, sigma), rel=1e-12)

    loss.backward()
    printed = feature_gradients(features, targets, centres, sigma)
    differences = {
        "features": central_differences(lambda f: second_sum_of_9(f, targets, centres, sigma), features, 1e-2),
        "sigma": central_differences(lambda s: second_sum_of_9(features, targets, centres, s), sigma, 1e-4),
    }
    for name in ("features", "sigma"):
        assert relative_error(problem[name].grad, printed[name]) < 1e-6, name
        assert relative_error(problem[name].grad, differences[name]) < 1e-6, name
    assert not problem["sigma"].grad[3].any()  # a class without a sample learns nothing


@pytest.mark.parametrize(("ignored", "known"), [([], 7), ([0, 3], 5), (range(7), 0)])
def test_the_summed_feature_loss_is_the_averaged_one_times_the_samples_with_a_class(ignored, known):
    problem, found = feature_problem(), []
    problem["targets"][list(ignored)] = -100
    for reduction in ("sum", "mean"):
        loss = functional.feature_loss(**problem, reduction=reduction)
        found.append([loss, *torch.autograd.grad(loss, [problem["features"], problem["sigma"]])])
    for summed, averaged in zip(*found, strict=True):
        torch.testing.assert_close(summed, known * averaged)


def test_centre_update_is_the_center_loss_rule():
    problem = feature_problem()
    numerator, counts = functional.centre_update(problem["features"].detach(), problem["targets"], problem["centres"])
    expected = centre_steps(array(problem["features"]), problem["targets"].numpy(), array(problem["centres"]))
    assert relative_error(numerator / (1 + counts), expected) < 1e-6
    assert counts.flatten().tolist() == [3, 1, 3, 0]


def centre_steps(features: np.ndarray, targets: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """``sum_b [y_b = m] (c_m - f_b) / (1 + n_m)`` for every class m."""
    steps = np.zeros_like(centres)
    for m in range(len(centres)):
        own = features[targets == m]
        steps[m] = (centres[m] - own).sum(0) / (1 + len(own))
    return steps


# ----------------------------------------------------------------------------------------------- the figures


def largest_errors(dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Largest relative deviation of each quantity's gradient (of the centres: step) from the float64 formulas."""
    errors: dict[str, float] = {}

    def record(name: str, value: object, reference: object) -> None:
        errors[name] = max(errors.get(name, 0.0), relative_error(value, reference))

    for granularity in SHAPES:
        problem = kernel_problem(granularity, dtype)
        _, gradients = gradients_of_kernel_loss(problem, nu=0.3)
        arrays = [array(x) for x in problem.values()]
        binarized = scale_of(arrays[1]) * np_sign(arrays[0])
        for name, expected in printed_gradients(*arrays, 0.3, binarized).items():
            record(name, gradients[name], expected)
        latent, modulation = (3 * problem[name].detach() for name in ("X", "w"))
        grad = problem["X"].detach().flip(0)
        value = functional.bonn_binarize(latent.requires_grad_(), modulation.requires_grad_())
        to_latent, to_modulation = torch.autograd.grad(value, [latent, modulation], grad)
        expected_latent, expected_modulation = equations_12_and_15(array(latent), array(modulation), array(grad))
        record("X", array(to_latent), expected_latent)
        record("w", array(to_modulation), expected_modulation)

    features = feature_problem(dtype)
    functional.feature_loss(**features).backward()
    f, _, c, s = (array(x) for x in features.values())
    targets = features["targets"].numpy()
    expected = feature_gradients(f, targets, c, s)
    record("features", array(features["features"].grad), expected["features"])
    record("class variances", array(features["sigma"].grad), expected["sigma"])
    numerator, counts = functional.centre_update(
        features["features"].detach(), features["targets"], features["centres"]
    )
    record("centres", array(numerator / (1 + counts)), centre_steps(f, targets, c))
    return errors


@pytest.mark.skipif(not operators.AVAILABLE, reason="without kernels")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((70, 33, 3, 3), (1, 33, 3, 3)),
        ((6, 5, 3, 2), (1, 1, 3, 2)),
        ((9, 24), (1, 24)),
        ((300, 16, 3, 3), (1, 16, 3, 3)),
    ],
    ids=str,
)
def test_kernels_of_latents_give_the_gradients_of_torchs_operations(shape, shared, last, threads, monkeypatch):
    latent = 0.01 * torch.randn(shape)
    latent[0].view(-1)[:3] = torch.tensor([0.0, -0.0, 0.25])
    modulation = 0.1 * torch.rand(shared) + 0.01
    modulation.view(-1)[2] = 4.0  # times 0.25 is on the bound of the estimator
    if last and latent.ndim == 4:
        latent = latent.contiguous(memory_format=torch.channels_last)
    spreads = [0.01 * torch.rand(shape[0]), 0.01 * torch.rand(shape[0]) + 0.005]
    grad = torch.randn(shape)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        x, w, mu, sigma = (t.to(dtype).clone().requires_grad_() for t in (latent, modulation, *spreads))
        loss = functional.kernel_loss(x, w, mu, sigma, nu=1e-3)
        found = [loss.detach(), *torch.autograd.grad(3 * loss, [x, w, mu, sigma])]
        assert found[1].stride() == latent.stride()
        return found + list(torch.autograd.grad(functional.bonn_binarize(x, w), [x, w], grad.to(dtype)))

    assert operators.takes_filters(latent, modulation)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = gradients(torch.float32)
    torch.set_num_threads(before)
    monkeypatch.setattr(operators, "takes_filters", lambda *_: False)
    for one, other in zip(found, gradients(torch.float64), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("shape", [(1, 5, 3, 2), (1, 1, 3, 2), (4, 1, 1, 1), (5, 3, 2), ()], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_sum_over_filters_has_the_order_of_its_weights(shape, last):
    x = torch.randn(4, 5, 3, 2, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    total = functional.summed_to(x, shape)
    assert torch.allclose(total, x.sum_to_size(shape), rtol=1e-12)
    if shape == (1, 5, 3, 2):
        assert total.stride()[1:] == x.stride()[1:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_gradient_is_within_a_millionth_of_its_formula(dtype, record_property):
    errors = largest_errors(dtype)
    assert set(errors) == {"X", "w", "mu", "sigma", "features", "centres", "class variances"}
    for name, error in errors.items():
        record_property(f"largest relative error of {name}", error)
        assert error < 1e-6, (name, error)
