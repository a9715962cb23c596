"""Functions: the parts of a binary layer's training step, each with the backward pass that keeps the least.

Autograd keeps what a backward pass needs from the forward pass on. Here that is the float input of a layer and, where
there are kernels for it (:func:`bonn_qat.engine.operators.takes`), the signs as bits; norm, sign and product are
computed again from these.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bonn_qat.engine import operators

import os
_PART = int(os.environ.get("PART", 2**18))
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class Estimator(NamedTuple):
    """An estimator that the kernels know: ``g [|u| <= clip]``, or ``g max(0, 2 - 2|u|)`` if it is a ``parabola``.

    u is the input minus ``threshold``, ``()`` or one number for each channel; the sign is that of u.
    """

    clip: float = 1.0
    parabola: bool = False
    threshold: Tensor | None = None


class Geometry(NamedTuple):
    """A convolution of one group: ``padding`` is that of top, bottom, left and right."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def size(self, x: Tensor, kernel: Tensor) -> list[int]:
        """Height and width of the output for inputs ``(B, C, H, W)`` and kernels ``(O, C, kh, kw)``."""
        top, bottom, left, right = self.padding
        return [
            (size + padding - dilation * (taps - 1) - 1) // stride + 1
            for size, padding, dilation, taps, stride in zip(
                x.shape[2:], (top + bottom, left + right), self.dilation, kernel.shape[2:], self.stride, strict=True
            )
        ]


def convolution_gradients(
    grad: Tensor, x: Tensor, value: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``conv2d(x, value)`` to x and to value."""
    top, bottom, left, right = geometry.padding
    if value.shape[2:] == (1, 1) and geometry == Geometry():  # a matrix product
        rows, columns = (z.permute(0, 2, 3, 1).flatten(0, 2) for z in (grad, x))
        flat = value.flatten(1)
        batch, channels, height, width = x.shape
        dx = (rows @ flat).view(batch, height, width, channels).permute(0, 3, 1, 2) if needs[0] else None
        return dx, (rows.mT @ columns)[:, :, None, None] if needs[1] else None
    padding = [top, left]
    if symmetric := (top, left) == (bottom, right):
        inner = x
    else:
        inner, padding = torch.nn.functional.pad(x, (left, right, top, bottom)), [0, 0]
    dx, dvalue, _ = _CONVOLUTION_BACKWARD(
        grad, inner, value, None, list(geometry.stride), padding, list(geometry.dilation), False, [0, 0], 1,
        [*needs, False],
    )  # fmt: skip
    if needs[0] and not symmetric:
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return dx, dvalue


class _SignProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, threshold: Tensor, value: Tensor, scale: Tensor, mean: Tensor,
        invstd: Tensor, estimator: tuple[float, bool], statistics: bool, geometry: Geometry, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        alpha = gamma.float() * invstd
        shift = torch.addcmul(beta.float(), mean, alpha, value=-1)  # rounded once, as in torch's batch norm
        outputs, channels = value.shape[:2]
        low = threshold.float().expand(channels).contiguous()
        magnitude = scale.abs().float().flatten().expand(outputs).contiguous()
        words, weight = operators.signs(x, alpha, shift, low), operators.kernel_words(value)
        ctx.save_for_backward(x, gamma, threshold, alpha, shift, low, mean, invstd, words, weight, magnitude)
        ctx.call = estimator, statistics, geometry, value.dtype, beta.dtype
        top, _, left, _ = geometry.padding
        size = geometry.size(x, value)
        return operators.convolve(
            words, weight, magnitude, channels, geometry.stride, (top, left), geometry.dilation, size, dtype
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, threshold, alpha, shift, low, mean, invstd, words, weight, magnitude = ctx.saved_tensors
        (clip, parabola), statistics, geometry, value_dtype, beta_dtype = ctx.call
        channels, outputs = x.shape[1], len(magnitude)
        grad = grad.contiguous(memory_format=torch.channels_last)
        value = operators.kernel_signs(weight, outputs, channels, grad.dtype)
        value = value * magnitude.to(grad.dtype).reshape(-1, 1, 1, 1)
        needs = any(ctx.needs_input_grad[:4]), ctx.needs_input_grad[4]
        estimator = alpha, shift, low, mean, clip, parabola
        dvalue: Any = None
        parts, sums = [], x.new_zeros((2, channels), dtype=torch.float64)
        step = max(1, _PART // x[0].numel())
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            signs = operators.spread(words[part], channels, grad.dtype)
            dsign, own = convolution_gradients(grad[part], signs, value, geometry, needs)
            if own is not None:
                dvalue = own if dvalue is None else dvalue + own
            if dsign is not None:
                parts.append(dsign.to(x.dtype).contiguous(memory_format=torch.channels_last))
                sums += operators.gradient_sums(parts[-1], x[part], *estimator)
        dx = dgamma = dbeta = dthreshold = None
        if parts:
            total, product = sums.float().unbind()
            count = x.numel() // channels if statistics else math.inf
            dx = operators.gradient(parts, x, *estimator, total / count, product / count * invstd.square())
            dgamma, dbeta = (product * invstd).to(gamma.dtype), total.to(beta_dtype)
            dthreshold = -total.to(threshold.dtype).sum_to_size(threshold.shape)
        return (
            dx, dgamma, dbeta, dthreshold, None if dvalue is None else dvalue.to(value_dtype), *[None] * 7
        )  # fmt: skip


class Norm(NamedTuple):
    """A batch norm: ``gamma (x - mean) invstd + beta``, all ``(C,)``; whether mean and invstd are ``statistics`` of x."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    invstd: Tensor
    statistics: bool

    @classmethod
    def of(cls, module: nn.BatchNorm2d | None, x: Tensor) -> "Norm":
        """What ``module`` does to x ``(B, C, H, W)``, None for nothing; updates its running statistics as it would."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        one, zero = x.new_ones(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
        if module is None:
            return cls(one, zero, zero, one, False)
        statistics = module.training or module.running_mean is None
        with torch.no_grad():
            if not statistics:
                assert module.running_mean is not None and module.running_var is not None
                mean, variance = module.running_mean.to(dtype), module.running_var.to(dtype)
            else:
                mean, variance = _moments(x, dtype)
                if module.training and module.running_mean is not None:
                    assert module.running_var is not None and module.num_batches_tracked is not None
                    assert module.momentum is not None
                    count = x.numel() // x.shape[1]
                    module.running_mean.lerp_(mean.to(module.running_mean.dtype), module.momentum)
                    unbiased = variance * (count / (count - 1))
                    module.running_var.lerp_(unbiased.to(module.running_var.dtype), module.momentum)
                    module.num_batches_tracked.add_(1)
            invstd = (variance.double() + module.eps).rsqrt().to(dtype)
        gamma = one if module.weight is None else module.weight
        return cls(gamma, zero if module.bias is None else module.bias, mean, invstd, statistics)


def _moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if operators.takes(x):
        return cast(tuple[Tensor, Tensor], operators.moments(x))
    variance, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
    return mean, variance


def sign_product(
    x: Tensor, norm: Norm, estimator: Estimator, value: Tensor, scale: Tensor, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    """``conv2d(sign(norm(x) - threshold), value)`` by bits, for value ``(O, C, kh, kw)`` of ``scale * {-1, +1}``.

    The sums are exact, and times ``|scale|`` they are rounded once, to ``dtype``. x ``(B, C, H, W)`` as
    :func:`~bonn_qat.engine.operators.takes` it. The gradients are those of the old path: of the product to value and to
    the signs, of the estimator and of the norm; scale has none.
    """
    threshold = x.new_zeros((), dtype=torch.float32) if estimator.threshold is None else estimator.threshold
    kind = _above(estimator.clip), estimator.parabola
    return cast(
        Tensor,
        _SignProduct.apply(
            x.contiguous(memory_format=torch.channels_last), norm.gamma, norm.beta, threshold, value, scale.detach(),
            norm.mean, norm.invstd, kind, norm.statistics, geometry, dtype,
        ),  # fmt: skip
    )


def _above(bound: float) -> float:
    """The next number in float32: ``|u| < it`` is ``|u| <= bound``."""
    return bound + torch.finfo(torch.float32).eps * 2.0 ** (math.frexp(bound)[1] - 1)

