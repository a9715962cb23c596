"""Pure tensor functions: no modules, no state, no library but torch and our own kernels.

Notation of BONN (Gu et al., ICCV 2019, arXiv:1908.06314; equation numbers are the paper's): X latent kernels
``(O, I, kh, kw)``; w modulation, broadcastable to X, shared by all kernels of a layer as in the paper, or one number
per kernel ``(O, 1, 1, 1)``, which is our extension; X^ binarized kernels; mu, sigma ``(O,)`` modes of ``|X|`` and the
spread around them, one per kernel; f features ``(B, D)``; c, sigma_m class means and spreads ``(M, D)``.
``sign(0) = +1`` and ``sign(NaN) = -1`` everywhere. :mod:`bonn_qat.quantizers` explains latent weight, modulation, scale
and estimator.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bonn_qat.engine import operators
from bonn_qat.engine.functions import Geometry, per_filter, wide


def sign(x: Tensor) -> Tensor:
    """``+1`` where ``x >= 0``, else ``-1``; same shape and dtype, zero gradient.

    So ``sign(-0.0) = sign(inf) = +1`` and ``sign(-inf) = sign(NaN) = -1``. Packed networks and exported files keep this
    rule: what they compare is the value that the model computes, and a comparison with NaN is false.

    >>> sign(torch.tensor([-0.5, 0.0, 0.5, math.nan]))
    tensor([-1.,  1.,  1., -1.])
    """
    # Passes in place are several times faster on a CPU than torch.where, which also has no gradient here.
    return x.clone().ge_(0).sub_(0.5).sign_()


def _next_above(bound: float, dtype: torch.dtype) -> float:
    # torch.compile can trace this, but not torch.nextafter followed by item().
    return bound + torch.finfo(dtype).eps * 2.0 ** (math.frexp(bound)[1] - 1)


def _inside(grad: Tensor, x: Tensor, clip: float) -> Tensor:
    # The backward of hardtanh is one fused pass, but it excludes the bounds; the papers include them.
    bound = _next_above(clip, x.dtype)
    return cast(Tensor, torch.ops.aten.hardtanh_backward(grad, x, -bound, bound))


def _order(x: Tensor) -> list[int]:
    """The axes of ``x`` in the order of memory."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda axis: -strides[axis])


def _restored(x: Tensor, order: list[int]) -> Tensor:
    """``x`` with its axes as they were before ``permute(order)``."""
    return x.permute([order.index(axis) for axis in range(x.ndim)])


def summed_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.sum_to_size(shape)``, with the axes in the order of memory.

    torch sums to a contiguous tensor; over the filters of a large weight in ``channels_last`` that takes 40 times as
    long as a sum whose result has the order of ``x``.

    >>> summed_to(torch.ones(4, 3, 2), (1, 3, 1))
    tensor([[[8.],
             [8.],
             [8.]]])
    """
    sizes, order = [1] * (x.ndim - len(shape)) + list(shape), _order(x)
    total = x.permute(order).sum_to_size([sizes[axis] for axis in order])
    return _restored(total, order).reshape(shape)


class _SteSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.clip = clip
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _inside(grad, x, ctx.clip), None


def ste_sign(x: Tensor, clip: float = 1.0) -> Tensor:
    """Binarize to {-1, +1}.

    Backward: clipped straight-through estimator, ``dy * [|x| <= clip]`` (BNN, arXiv:1602.02830).

    >>> x = torch.tensor([-2.0, -0.5, 0.5, 2.0], requires_grad=True)
    >>> y = ste_sign(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    """
    return cast(Tensor, _SteSign.apply(x, clip))


class _ApproxSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, x.abs().clamp_(max=1).neg_().add_(1).mul_(2).mul_(grad))


def approx_sign(x: Tensor) -> Tensor:
    """Binarize to {-1, +1}.

    Backward: derivative of a piecewise parabola, ``dy * max(0, 2 - 2|x|)`` (Bi-Real Net, arXiv:1808.00278).

    >>> x = torch.tensor([-2.0, -0.5, 0.25], requires_grad=True)
    >>> approx_sign(x).sum().backward()
    >>> x.grad
    tensor([0.0000, 1.0000, 1.5000])
    """
    return cast(Tensor, _ApproxSign.apply(x))


class _SwishSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.beta = beta
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        # 1 + cosh(y) = 2 cosh(y/2)^2 and sech^2 = 1 - tanh^2 avoid an overflow; sech^2 is 0 long before the clamp acts.
        half = (x * (0.5 * ctx.beta)).clamp_(-30, 30)
        tanh = torch.tanh(half)
        return grad * ((1 - half * tanh) * (1 - tanh.square()) * ctx.beta), None


def swish_sign(x: Tensor, beta: float = 5.0) -> Tensor:
    """Binarize to {-1, +1}.

    Backward: ``dy * beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x))``, the derivative of the SignSwish
    (BNN+, arXiv:1812.11800; Larq's ``swish_sign``).

    >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> swish_sign(x).sum().backward()
    >>> x.grad.round(decimals=2)
    tensor([ 5.0000, -0.1900])
    """
    return cast(Tensor, _SwishSign.apply(x, beta))


class _EdeSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(x, t)
        return sign(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, t = ctx.saved_tensors
        return grad * ((1 - torch.tanh(x * t).square()) * t.clamp(min=1)), None


def ede_sign(x: Tensor, t: Tensor) -> Tensor:
    """Binarize to {-1, +1}; ``t`` is a scalar tensor.

    Backward: error decay estimator, ``dy * k t (1 - tanh(t x)^2)`` with ``k = max(1 / t, 1)``, the derivative of
    ``k tanh(t x)``, which approaches the sign as t grows (IR-Net, arXiv:1909.10788).

    >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> ede_sign(x, torch.tensor(10.0)).sum().backward()
    >>> x.grad.round(decimals=3)
    tensor([10.,  0.])
    """
    return cast(Tensor, _EdeSign.apply(x, t))


def magnitude_aware_sign(x: Tensor, clip: float = 1.0) -> Tensor:
    """``alpha sign(x)`` with ``alpha = mean|x|`` over each slice of the first axis; x ``(O, ...)``.

    Backward: ``alpha dy * [|x| <= clip]``, with alpha held constant (Bi-Real Net, arXiv:1808.00278, (6) and (7)).

    >>> magnitude_aware_sign(torch.tensor([[1.0, -3.0], [0.5, 0.5]]))
    tensor([[ 2.0000, -2.0000],
            [ 0.5000,  0.5000]])
    """
    alpha = x.detach().abs().mean(tuple(range(1, x.ndim)), keepdim=True)
    return alpha * ste_sign(x, clip)


def power_of_two(peak: Tensor) -> Tensor:
    """The largest power of two up to ``peak``, 1/2 for 0; same shape, no gradient.

    Numbers of this magnitude can be divided by it without changing a digit, and then squared without an overflow.

    >>> power_of_two(torch.tensor([0.3, 9.0]))
    tensor([0.2500, 8.0000])
    """
    return torch.ldexp(torch.ones_like(peak), torch.frexp(peak.detach())[1] - 1)


def rescaled(x: Tensor, std: float) -> Tensor:
    """``x`` times the positive number that gives it the standard deviation ``std``.

    A constant x, also one of a single element, has no standard deviation to divide by: it becomes ``std sign(x)``, and
    zeros stay zeros. Constant means that the elements differ by rounding only.

    >>> rescaled(torch.tensor([3.0, -1.0]), 0.01), rescaled(torch.tensor([-2.0, -2.0]), 0.01)
    (tensor([ 0.0106, -0.0035]), tensor([-0.0100, -0.0100]))
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    peak = wide.abs().max()
    unit = wide / power_of_two(peak)
    spread = unit.std(correction=min(1, x.numel() - 1))
    is_constant = unit.amax() - unit.amin() <= 2 * torch.finfo(x.dtype).eps  # their std may be larger than 0
    return (unit * (std / torch.where(is_constant, unit.abs().max().clamp(min=1), spread))).to(x.dtype)


def leaky_clip(x: Tensor, slope: float = 0.1) -> Tensor:
    """``x`` within [-1, 1], a line of ``slope`` outside: Bi-Real Net's intermediate step between ReLU and sign.

    >>> leaky_clip(torch.tensor([-2.0, 0.5, 3.0]))
    tensor([-1.1000,  0.5000,  1.2000])
    """
    return x.clamp(-1, 1) + slope * (x - x.clamp(-1, 1))


def bonn_scale(modulation: Tensor, *, inverse: bool = False) -> Tensor:
    """Mean of w, or of 1/w with ``inverse``, over all axes but the first: ``(O, 1, ...)``, or ``()`` for a shared w.

    >>> bonn_scale(torch.tensor([[1.0, 3.0]])), bonn_scale(torch.tensor([[2.0], [4.0]]), inverse=True).flatten()
    (tensor(2.), tensor([0.5000, 0.2500]))
    """
    values = modulation.reciprocal() if inverse else modulation
    return values.mean() if values.shape[0] == 1 else values.mean(tuple(range(1, values.ndim)), keepdim=True)


class _Filters:
    """Latent weights and tensors like them as rows, one for each filter, with its elements in the order of memory."""

    def __init__(self, latent: Tensor) -> None:
        order = _order(latent)
        self._order = [0, *(axis for axis in order if axis)]
        self._sizes = [latent.shape[axis] for axis in self._order[1:]]

    def __call__(self, x: Tensor) -> Tensor:
        """``(O, ...) -> (O, N)``."""
        return x.permute(self._order).reshape(x.shape[0], -1).contiguous()

    def shared(self, modulation: Tensor) -> Tensor:
        """``(1, ...) -> (N,)``; a plane is repeated."""
        return modulation.permute(self._order).expand(1, *self._sizes).reshape(-1).contiguous()

    def back(self, rows: Tensor) -> Tensor:
        """``(O, N) -> (O, ...)``."""
        return _restored(rows.reshape(rows.shape[0], *self._sizes), self._order)


class _BonnBinarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, modulation: Tensor) -> Tensor:
        ctx.save_for_backward(latent, modulation)
        return sign(latent) * bonn_scale(modulation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        latent, modulation = ctx.saved_tensors
        if operators.takes_filters(latent, modulation) and grad.dtype == latent.dtype:
            filters = _Filters(latent)
            dlatent, dmodulation = operators.latent_gradient(filters(grad), filters(latent), filters.shared(modulation))
            return filters.back(dlatent), filters.back(dmodulation[None]).sum_to_size(modulation.shape)
        inside = _inside(grad, latent * modulation, 1.0)
        return inside * modulation, summed_to(inside * latent, modulation.shape)  # (12), (15)


def bonn_binarize(latent: Tensor, modulation: Tensor) -> Tensor:
    """``X^ = mean(w) * sign(X)`` (BONN, Algorithm 1, steps 3 to 8); shape of ``latent``.

    Backward, with G the gradient of X^ and I = ``[|w X| <= 1]``: ``G I w`` to X (12) and ``sum_i G I X`` to w (15).
    This is the estimator applied to the product ``w X``, not the derivative of the forward pass. With one w per
    kernel, the mean is taken over that kernel's elements and the sum over the elements that share a w.

    >>> bonn_binarize(torch.tensor([[0.5, -0.1], [-0.2, 0.3]]), torch.tensor([[0.2, 0.4]]))
    tensor([[ 0.3000, -0.3000],
            [-0.3000,  0.3000]])
    """
    return cast(Tensor, _BonnBinarize.apply(latent, modulation))


class _BonnBinarizeInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, modulation: Tensor) -> Tensor:
        scale = bonn_scale(modulation, inverse=True)
        ctx.save_for_backward(latent, modulation, scale)
        return sign(latent) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        latent, modulation, scale = ctx.saved_tensors
        inside = _inside(grad, latent * modulation, 1.0) * scale
        through_scale = summed_to(grad * sign(latent), scale.shape) * (scale.numel() / modulation.numel())
        to_modulation = summed_to(inside * latent, modulation.shape) - through_scale / modulation.square()
        return inside * modulation, to_modulation


def bonn_binarize_inverse(latent: Tensor, modulation: Tensor) -> Tensor:
    """``mean(1/w) * sign(X)``: the kernels if ``X^ = sign(X)`` and ``X = w^-1 X^``, as in (1) and (3); shape of X.

    The authors' book has the product ``w^-1 X^`` (its (3.111)); taking the mean instead of the elements follows
    Algorithm 1. Backward, with G the gradient of the value, c = ``mean(1/w)``, n elements in w and
    I = ``[|w X| <= 1]``: X^ passes its gradient c G to w X as in (12) and (15), and c is differentiated as a function
    of w. The gradients are ``c G I w`` to X and ``sum_i c G I X - sum G sign(X) / (n w^2)`` to w.

    >>> bonn_binarize_inverse(torch.tensor([[0.5, -0.1]]), torch.tensor([[2.0, 4.0]]))
    tensor([[ 0.3750, -0.3750]])
    """
    return cast(Tensor, _BonnBinarizeInverse.apply(latent, modulation))


def _scaled_sums(product: Callable[..., Tensor], x: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """``product(x, sign(value)) * |scale|`` in at least float32, rounded to the dtype of ``value``."""
    x, signs = wide(x), wide(sign(value))
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            sums = product(x, signs)
    else:
        sums = product(x, signs)
    return sums.mul_(scale.abs().to(sums.dtype)).to(value.dtype)


class _BinaryConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, value)
        ctx.geometry = geometry
        return _scaled_sums(geometry.convolve_as_written, x, value, per_filter(scale, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, value = ctx.saved_tensors
        return (*ctx.geometry.gradients(grad, x, value, ctx.needs_input_grad[:2]), None, None)


def binary_convolution(x: Tensor, value: Tensor, scale: Tensor, geometry: Geometry) -> Tensor:
    """A convolution with two-valued kernels, computed as that with ``sign(value)``, times ``|scale|``.

    x ``(B, C, ...)`` of {-1, +1}; value of {-scale, +scale}, as torch's operator for ``geometry`` takes it:
    ``(O, C / groups, ...)``, of a transposed convolution ``(C, O / groups, ...)``; scale of one element or O. For
    inputs of +-1 (and zero padding) the sums are exact integers in any order of summation, so a packed network
    reproduces them bit for bit. The gradients of ``x`` and ``value`` are those of the convolution of both; ``scale``
    gets none, because it learns through ``value``. Under autocast result and gradients have the autocast dtype, as
    those of torch's convolutions do; in bfloat16 and float16 the scaled sums are computed in float32 and rounded once,
    because bfloat16 holds no odd number above 256.

    >>> x, value = sign(torch.randn(1, 3, 4, 4)), 0.1 * sign(torch.randn(8, 3, 3, 3))
    >>> torch.allclose(binary_convolution(x, value, torch.tensor(0.1), Geometry()), torch.conv2d(x, value))
    True
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, value = x.to(dtype), value.to(dtype)
    return cast(Tensor, _BinaryConvolution.apply(x, value, scale.detach(), geometry))


def binary_conv2d(
    x: Tensor,
    value: Tensor,
    scale: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``conv2d(x, value)`` for two-valued kernels, by :func:`binary_convolution`.

    x ``(B, C, H, W)``; value ``(O, C / groups, kh, kw)``; scale ``()`` or ``(O, 1, 1, 1)``.

    >>> x, value = sign(torch.randn(1, 3, 4, 4)), 0.1 * sign(torch.randn(8, 3, 3, 3))
    >>> torch.allclose(binary_conv2d(x, value, torch.tensor(0.1)), torch.conv2d(x, value))
    True
    """
    down, across = padding
    return binary_convolution(x, value, scale, Geometry(stride, (down, down, across, across), dilation, groups))


class _BinaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, value)
        return _scaled_sums(torch.nn.functional.linear, x, value, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, value = ctx.saved_tensors
        dx = grad @ value if ctx.needs_input_grad[0] else None
        dvalue = grad.mT @ x if ctx.needs_input_grad[1] else None
        return dx, dvalue, None


def binary_linear(x: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """``linear(x, value)`` for two-valued weights, computed as in :func:`binary_convolution`.

    x ``(M, I)`` of {-1, +1}; value ``(O, I)`` of {-scale, +scale}; scale ``()`` or ``(O,)``. The sums are exact.

    >>> binary_linear(torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, -0.5], [0.5, 0.5]]), torch.tensor(0.5))
    tensor([[1., 0.]])
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, value = x.to(dtype), value.to(dtype)
    return cast(Tensor, _BinaryLinear.apply(x, value, scale.detach()))


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
        ctx.kinds = [None if vector is None else (vector.shape, vector.dtype) for vector in (slope, before, after)]
        given = [slope] if before is None and after is None else [slope, before, after]
        # A copy, because an optimizer may change them before the backward pass.
        vectors = torch.stack([_of_channels(vector, x) for vector in given])
        ctx.save_for_backward(x, vectors)
        if not torch.compiler.is_compiling():
            ctx.again = _prelu_again
        return cast(Tensor, operators.prelu(x, vectors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, vectors = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx, totals = operators.prelu_gradient(grad, x, vectors)
        slopes, passed, given = totals.unbind()
        before = None if ctx.kinds[1] is None else -passed
        return dx, *(
            None if kind is None or found is None else found.sum_to_size(kind[0]).to(kind[1])
            for found, kind in zip((slopes, before, given), ctx.kinds, strict=True)
        )


def _of_channels(vector: Tensor | None, x: Tensor) -> Tensor:
    vector = x.new_zeros(()) if vector is None else vector
    return vector.to(torch.float32).expand(x.shape[1])


def _prelu_again(ctx: Any) -> Tensor:
    return cast(Tensor, operators.prelu(*ctx.saved_tensors))


class _PlainPReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(x, slope)
        if not torch.compiler.is_compiling():
            ctx.again = _plain_prelu_again
        return _plain_prelu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slope = ctx.saved_tensors
        slope_less_one = (slope - 1).to(x.dtype).reshape(-1, *[1] * (x.ndim - 2))
        # One pass that keeps the gradient where x <= 0: the upper bound is the smallest positive number.
        info = torch.finfo(x.dtype)
        below = torch.ops.aten.hardtanh_backward(grad, x, -math.inf, info.smallest_normal * info.eps)
        dx = torch.addcmul(grad, below, slope_less_one)
        sums = below.mul_(x).sum([axis for axis in range(x.ndim) if axis != 1 or slope.numel() == 1], dtype=slope.dtype)
        return dx, sums.reshape(slope.shape)


def _plain_prelu(x: Any, slope: Tensor) -> Tensor:
    # Exports show each step, so none is made without need; torch.fx traces with proxies.
    if isinstance(x, Tensor) and (slope.dtype != x.dtype or torch.is_autocast_enabled(x.device.type)):
        with torch.autocast(x.device.type, enabled=False):
            return torch.prelu(x, slope.to(x.dtype))
    return torch.prelu(x, slope)


def _plain_prelu_again(ctx: Any) -> Tensor:
    return _plain_prelu(*ctx.saved_tensors)


@torch.fx.wrap  # it needs the number of axes, which torch.fx does not know
def _along_channels(shift: Tensor, x: Tensor) -> Tensor:
    return shift.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2))


def prelu(x: Tensor, slope: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
    """``PReLU(x - before) + after``, where PReLU is ``max(x, 0) + slope * min(x, 0)``.

    x ``(B, C, ...)``; slope, before and after ``(C,)`` or ``(1,)``. The result and x have the same dtype. With all of
    them it is ReActNet's RPReLU (arXiv:2003.03488). Raises RuntimeError for another number of channels.

    Equals torch's operations, with a backward that is several times faster on a CPU, where that of torch's PReLU costs
    half as much as a 3x3 convolution of 16 channels.

    >>> prelu(torch.tensor([[-1.0, 2.0]]), torch.tensor([0.25]))
    tensor([[-0.2500,  2.0000]])
    >>> prelu(torch.tensor([[-1.0, 2.0]]), torch.tensor([0.25]), before=torch.tensor([1.0]), after=torch.tensor([3.0]))
    tensor([[2.5000, 4.0000]])
    """
    if operators.takes(x) and x.is_contiguous(memory_format=torch.channels_last):
        return cast(Tensor, _PReLU.apply(x, slope, before, after))
    y = cast(Tensor, _PlainPReLU.apply(x if before is None else x - _along_channels(before, x), slope))
    return y if after is None else y + _along_channels(after, y)


def _elements(latent: Tensor, mu: Tensor) -> list[int]:
    """The axes of ``latent`` that mu has not: those of the elements of one kernel."""
    return list(range(mu.ndim, latent.ndim))


def _mode_gradients(
    spread: Tensor, mahalanobis: Tensor, precision: Tensor, sigma: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """The gradients of mu (17) and sigma (18), of the mean of ``|X| - mu`` and that of its square over sigma^2."""
    return spread.mul(precision).mul_(-rate), (1 - mahalanobis).mul_(rate).div_(sigma)


class _KernelLoss(torch.autograd.Function):
    @staticmethod
    def _parts(latent: Tensor, modulation: Tensor, scale: Tensor, mu: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        # With s = sign(X): X^ - w X = s (scale - w |X|), so everything but (13) depends on |X| alone.
        magnitude = latent.abs()
        error = (magnitude * modulation).sub_(scale)  # in this order it has the layout of the latents
        spread = magnitude - mu.reshape(*mu.shape, *[1] * (latent.ndim - mu.ndim))
        precision = sigma.square().reciprocal_()
        mahalanobis = spread.square().mean(_elements(latent, mu)).mul_(precision)
        return magnitude, error, spread, precision, mahalanobis

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        modulation: Tensor,
        scale: Tensor,
        mu: Tensor,
        sigma: Tensor,
        nu: float,
        per_element: bool,
    ) -> Tensor:
        # The gradient to X is as large as X, so the backward pass computes it. The others may be clamped until then.
        ctx.save_for_backward(latent, *(small.clone() for small in (modulation, scale, mu, sigma)))
        ctx.nu, ctx.per_element = nu, per_element
        _, error, _, _, mahalanobis = _KernelLoss._parts(latent, modulation, scale, mu, sigma)
        prior = latent.numel() // mu.numel() * (mahalanobis + 2 * sigma.log()).sum()
        return 0.5 * (error.square().sum() + nu * prior)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, modulation, scale, mu, sigma = ctx.saved_tensors
        magnitude, error, spread, precision, mahalanobis = _KernelLoss._parts(latent, modulation, scale, mu, sigma)
        rate = ctx.nu if ctx.per_element else ctx.nu * (latent.numel() // mu.numel())
        dmu, dsigma = _mode_gradients(spread.mean(_elements(latent, mu)), mahalanobis, precision, sigma, rate)
        dmodulation = summed_to(magnitude.mul_(error), modulation.shape)  # (16)
        per_kernel = (*mu.shape, *[1] * (latent.ndim - mu.ndim))
        dlatent = error.mul_(modulation).addcmul_(spread, precision.reshape(per_kernel), value=ctx.nu)
        dlatent.mul_(sign(latent))  # (13)
        return grad * dlatent, grad * dmodulation, None, grad * dmu, grad * dsigma, None, None


class _KernelLossOfFilters(torch.autograd.Function):
    """The same of one layer whose filters share a modulation, in one pass over the latents each way."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        modulation: Tensor,
        scale: Tensor,
        mu: Tensor,
        sigma: Tensor,
        nu: float,
        per_element: bool,
    ) -> Tensor:
        filters = _Filters(latent)
        shared, scales = filters.shared(modulation), scale.reshape(-1).expand(len(mu)).contiguous()
        totals = operators.kernel_sums(filters(latent), shared, scales, mu)
        wrong, spread, square = totals.unbind(1)
        count = latent.numel() // len(mu)
        mahalanobis = square / count / sigma.square()
        prior = count * (mahalanobis + 2 * sigma.log()).sum()
        spread = (spread / count).to(mu.dtype)
        ctx.save_for_backward(latent, shared, scales, mu.clone(), sigma.clone(), spread, mahalanobis.to(mu.dtype))
        ctx.shape, ctx.nu, ctx.rate = modulation.shape, nu, nu if per_element else nu * count
        loss: Tensor = 0.5 * (wrong.sum() + nu * prior)
        return loss.to(latent.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        latent, shared, scales, mu, sigma, spread, mahalanobis = ctx.saved_tensors
        filters, precision = _Filters(latent), sigma.square().reciprocal_()
        factor = precision * ctx.nu
        dlatent, dmodulation = operators.kernel_gradient(grad, filters(latent), shared, scales, mu, factor)
        dmu, dsigma = _mode_gradients(spread, mahalanobis, precision, sigma, ctx.rate)
        dmodulation = filters.back(dmodulation[None]).sum_to_size(ctx.shape)
        return filters.back(dlatent), dmodulation, None, grad * dmu, grad * dsigma, None, None


def kernel_loss(
    latent: Tensor,
    modulation: Tensor,
    mu: Tensor,
    sigma: Tensor,
    *,
    nu: float,
    scale: Tensor | None = None,
    per_element: bool = True,
) -> Tensor:
    """The Bayesian kernel loss of a layer: the first sum of (9) without its factor lambda; a scalar.

    ``1/2 sum_i { ||X^_i - w X_i||^2 + nu sum_k (|X_ik| - mu_i)^2 / sigma_i^2 + nu K log sigma_i^2 }``
    with ``X^ = scale * sign(X)`` held constant and ``scale``, ``()`` or ``(O, 1, 1, 1)``, by default ``mean(w)``.
    Layers of equal shape can be stacked along a new first axis of every argument; the result is then their sum.

    The gradients are the paper's: (13) to X and (16) to w are the derivatives of (9); (17) to mu and (18) to sigma are
    its derivatives divided by the number of elements K of a kernel, as printed, unless ``per_element`` is false.

    >>> latent, w = torch.tensor([[0.2, -0.2]]), torch.ones(1, 2)
    >>> kernel_loss(latent, w, mu=torch.tensor([0.2]), sigma=torch.ones(1), nu=1e-4)  # 1/2 * 2 * (1 - 0.2)^2
    tensor(0.6400)
    """
    if scale is None:
        kernels = modulation.detach().flatten(mu.ndim).mean(-1)
        scale = kernels.reshape(*kernels.shape, *[1] * (latent.ndim - kernels.ndim))
    is_one_layer = mu.ndim == 1 and mu.dtype == sigma.dtype == latent.dtype
    function: Any = (
        _KernelLossOfFilters if is_one_layer and operators.takes_filters(latent, modulation) else _KernelLoss
    )
    return cast(Tensor, function.apply(latent, modulation, scale, mu, sigma, nu, per_element))


def feature_loss(
    features: Tensor,
    targets: Tensor,
    centres: Tensor,
    sigma: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The Bayesian feature loss: the second sum of (9) without its factor theta, averaged over the batch; a scalar.

    ``1/(2B) sum_b { ||f_b - c_m||^2 + sum_k [ (f_bk - c_mk)^2 / sigma_mk^2 + log sigma_mk^2 ] }``, where m is the
    class of sample b. Features ``(B, D)``, targets ``(B,)`` of class indices, centres and sigma ``(M, D)``. A sample
    with a negative target belongs to no class: it is left out, also of B. ``reduction="sum"`` leaves out the division
    by B, as (9) is printed.

    >>> features, centres = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> feature_loss(features, torch.tensor([1]), centres, torch.ones(2, 2))  # distance 1, twice, halved
    tensor(1.)
    """
    own = targets.clamp(min=0)
    spread = sigma[own]
    squared = (features - centres[own]).square()
    values = (squared * (1 + spread.reciprocal().square()) + 2 * spread.log()).sum(1)
    return 0.5 * (sum_of_known if reduction == "sum" else mean_of_known)(values, targets)


def sum_of_known(values: Tensor, targets: Tensor) -> Tensor:
    """The sum of ``values`` ``(B,)`` over the samples whose target is not negative; 0 if there is none.

    >>> sum_of_known(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, -100, 2]))
    tensor(4.)
    """
    return torch.where(targets >= 0, values, 0).sum()


def mean_of_known(values: Tensor, targets: Tensor) -> Tensor:
    """The mean of ``values`` ``(B,)`` over the samples whose target is not negative; 0 if there is none.

    >>> mean_of_known(torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, -100, 2]))
    tensor(2.)
    """
    return sum_of_known(values, targets) / (targets >= 0).sum().clamp(min=1)


def centre_update(features: Tensor, targets: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of the center-loss step ``sum_b [y_b = m] (c_m - f_b) / (1 + n_m)`` (Wen et al., ECCV 2016).

    Returns the numerator ``(M, D)`` and the counts n ``(M, 1)``, both sums over the batch, so that processes can reduce
    them before the division. Samples with a negative target are left out.

    >>> centre_update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), torch.zeros(2, 1))
    (tensor([[-4.],
            [ 0.]]), tensor([[2.],
            [0.]]))
    """
    known, own = (targets >= 0).to(features.dtype)[:, None], targets.clamp(min=0)
    counts = torch.zeros_like(centres[:, :1]).index_add_(0, own, known)
    sums = torch.zeros_like(centres).index_add_(0, own, features * known)
    return counts * centres - sums, counts
