"""Functions: the parts of a binary layer, each with the backward pass that keeps the least.

Autograd keeps what a backward pass needs from the forward pass on. Here that is the float input of a layer and, where
there are kernels for it (:func:`bonn_qat.engine.operators.takes`), the signs as bits; norm, sign and product are
computed again from these.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.flop_counter import register_flop_formula

from bonn_qat.engine import operators

_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default


class Estimator(NamedTuple):
    """An estimator that the kernels know: ``g [|u| <= clip]``, or ``g max(0, 2 - 2|u|)`` if it is a ``parabola``.

    u is the input minus ``threshold``, ``()`` or one number for each channel; the sign is that of u.
    """

    clip: float = 1.0
    parabola: bool = False
    threshold: Tensor | None = None


class Geometry(NamedTuple):
    """A convolution over two or three axes, or a ``transposed`` one.

    ``padding`` counts the zeros before and after each axis: top, bottom, left, right. That of a transposed convolution
    is cut off its output, which ends ``output_padding`` pixels later.
    """

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)

    def size(self, x: Tensor, kernel: Tensor) -> list[int]:
        """Height and width of the output for inputs ``(B, C, H, W)`` and kernels ``(O, C, kh, kw)``."""
        top, bottom, left, right = self.padding
        return [
            (size + padding - dilation * (taps - 1) - 1) // stride + 1
            for size, padding, dilation, taps, stride in zip(
                x.shape[2:], (top + bottom, left + right), self.dilation, kernel.shape[2:], self.stride, strict=True
            )
        ]

    def is_matrix_product(self, kernel: Tensor) -> bool:
        """Whether each pixel is a row of a matrix product with the kernels."""
        return kernel.shape[2:] == (1, 1) and self == Geometry()

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        """x and the padding of torch's convolution, which is the same on opposite sides."""
        before, after = self.padding[::2], self.padding[1::2]
        if before == after:
            return x, list(before)
        sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        return torch.nn.functional.pad(x, sides), [0] * len(before)

    def convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The convolution."""
        if self.is_matrix_product(kernels):
            y = torch.nn.functional.linear(x.permute(0, 2, 3, 1), kernels.flatten(1))
            return y.permute(0, 3, 1, 2)
        return self.convolve_as_written(x, kernels)

    def convolve_as_written(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The convolution by torch's operator for it, as exported graphs have it."""
        x, padding = self._padded(x)
        if self.transposed:
            transposed = torch.conv_transpose2d if kernels.ndim == 4 else torch.conv_transpose3d
            return transposed(x, kernels, None, self.stride, padding, self.output_padding, self.groups, self.dilation)
        convolution = torch.conv2d if kernels.ndim == 4 else torch.conv3d
        return convolution(x, kernels, None, self.stride, padding, self.dilation, self.groups)

    def mean(self, x: Tensor, kernel: Sequence[int]) -> Tensor:
        """The mean of x ``(B, 1, ...)`` over the window of each output.

        That of a convolution includes the padding. A transposed one has none: its window is the inputs that the output
        is a sum of.
        """
        alone = self._replace(groups=1)
        if not self.transposed:
            return alone.convolve_as_written(x, x.new_full((1, 1, *kernel), 1 / math.prod(kernel)))
        window = x.new_ones(1, 1, *kernel)
        return alone.convolve_as_written(x, window) / alone.convolve_as_written(torch.ones_like(x), window).clamp(min=1)

    def gradients(
        self, grad: Tensor, x: Tensor, kernels: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of :meth:`convolve` to x and to the kernels, None where they are not needed."""
        if self.is_matrix_product(kernels):
            grad, x, flat = grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), kernels.flatten(1)
            dx = (grad @ flat).permute(0, 3, 1, 2) if needs[0] else None
            return dx, (grad.flatten(0, 2).mT @ x.flatten(0, 2))[:, :, None, None] if needs[1] else None
        inner, padding = self._padded(x)
        dx, dkernels, _ = _CONVOLUTION_BACKWARD(
            grad, inner, kernels, None, list(self.stride), padding, list(self.dilation), self.transposed,
            list(self.output_padding), self.groups, [*needs, False],
        )  # fmt: skip
        if dx is not None and inner is not x:
            for axis, (before, size) in enumerate(zip(self.padding[::2], x.shape[2:], strict=True), start=2):
                dx = dx.narrow(axis, before, size)
        return dx, dkernels


class _SignProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, threshold: Tensor, value: Tensor, bias: Tensor | None,
        addend: Tensor | None, scale: Tensor, mean: Tensor, invstd: Tensor, estimator: tuple[float, bool],
        statistics: bool, geometry: Geometry, dtype: torch.dtype, layout: torch.memory_format,
    ) -> Tensor:  # fmt: skip
        outputs, channels = value.shape[:2]
        norm = _rows(gamma, beta, threshold, mean, invstd)
        magnitude = scale.abs().float().flatten().expand(outputs).contiguous()
        words, weight = operators.signs(x, norm), operators.kernel_words(value)
        ctx.save_for_backward(x, norm, words, weight, magnitude)
        dtypes = value.dtype, gamma.dtype, beta.dtype, threshold.dtype, None if bias is None else bias.dtype
        ctx.call = estimator, statistics, geometry, dtypes, threshold.shape
        top, _, left, _ = geometry.padding
        summand = None if bias is None else bias.detach().to(torch.float32, copy=True)  # an optimizer may change bias
        product = (
            words, weight, magnitude, summand, addend, channels,
            geometry.stride, (top, left), geometry.dilation, geometry.size(x, value), dtype,
        )  # fmt: skip
        if addend is None and not torch.compiler.is_compiling():
            ctx.again, ctx.made = functools.partial(_product, product, layout), None
        return _product(product, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.made = None
        x, norm, words, weight, magnitude = ctx.saved_tensors
        (clip, parabola), statistics, geometry, dtypes, threshold_shape = ctx.call
        value_dtype, gamma_dtype, beta_dtype, threshold_dtype, bias_dtype = dtypes
        grad = grad.contiguous(memory_format=torch.channels_last)
        needs = any(ctx.needs_input_grad[:4]), ctx.needs_input_grad[4]
        top, _, left, _ = geometry.padding
        places, channels, kernel = (geometry.stride, (top, left), geometry.dilation), x.shape[1], weight.shape[1:3]
        dx = dvalue = dgamma = dbeta = dthreshold = dbias = None
        by_tables, found = operators.has_tables(grad.dtype, kernel, geometry.dilation), None
        if not by_tables:
            value = operators.kernel_signs(weight, len(magnitude), channels, grad.dtype)
            value = value * magnitude.to(grad.dtype).reshape(-1, 1, 1, 1)
            dsign, dvalue = geometry.gradients(grad, operators.spread(words, channels, grad.dtype), value, needs)
            if dsign is not None:
                dsign = dsign.to(x.dtype).contiguous(memory_format=torch.channels_last)
                found = operators.gradient(dsign, x, norm, clip, parabola, statistics)
        if by_tables and needs[0]:
            found = operators.input_gradient(grad, weight, magnitude, x, norm, *places, clip, parabola, statistics)
        if by_tables and needs[1]:
            dvalue = operators.weight_gradient(grad, words, channels, kernel, *places)
        if found is not None:
            dx, (total, product) = found[0], found[1].unbind()
            dgamma, dbeta = (product * norm[4]).to(gamma_dtype), total.to(beta_dtype)
            dthreshold = -total.to(threshold_dtype).sum_to_size(threshold_shape)
        if ctx.needs_input_grad[5]:
            dbias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias_dtype)
        dvalue = None if dvalue is None else dvalue.to(value_dtype)
        daddend = grad if ctx.needs_input_grad[6] else None
        return (dx, dgamma, dbeta, dthreshold, dvalue, dbias, daddend, *[None] * 8)


def _product(arguments: tuple[Any, ...], layout: torch.memory_format, _: object = None) -> Tensor:
    return cast(Tensor, operators.convolve(*arguments)).contiguous(memory_format=layout)


@register_flop_formula(torch.ops.bonn_qat_engine.convolve)
def _flops(
    words: Sequence[int], weight: Sequence[int], scale: Sequence[int], bias: object, addend: object, channels: int,
    stride: object, padding: object, dilation: object, size: Sequence[int], *_: object, **__: object,
) -> int:  # fmt: skip
    """Those of the same convolution of floats, for ``FlopCounterMode``; of tensors it gets the shapes."""
    return 2 * words[0] * math.prod(size) * scale[0] * channels * weight[1] * weight[2]


@register_flop_formula(torch.ops.bonn_qat_engine.input_gradient)
def _input_flops(
    grad: Sequence[int], weight: Sequence[int], scale: object, x: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(grad) * x[1] * weight[1] * weight[2]


@register_flop_formula(torch.ops.bonn_qat_engine.weight_gradient)
def _weight_flops(grad: Sequence[int], words: object, channels: int, kernel: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * channels * math.prod(kernel)


def affine(gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and summand of a norm, rounded as in torch's batch norm."""
    alpha = gamma.to(invstd.dtype) * invstd
    return alpha, torch.addcmul(beta.to(invstd.dtype), mean, alpha, value=-1)


def _rows(gamma: Tensor, beta: Tensor, threshold: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """A norm and the threshold behind it as the kernels take them, ``(5, C)``."""
    low = threshold.to(torch.float32).expand(mean.shape)
    return torch.stack((*affine(gamma, beta, mean, invstd), low, mean, invstd))


def affine_map(x: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """The norm's output for x ``(B, C, ...)``, the same in every call, and on a CPU as from torch's batch norm."""
    shape = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(shape), x.to(alpha.dtype), alpha.reshape(shape))


class Norm(NamedTuple):
    """A batch norm: ``gamma (x - mean) invstd + beta``, all ``(C,)``.

    ``statistics`` says whether mean and invstd are those of x, through which gradients go too.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    invstd: Tensor
    statistics: bool

    @classmethod
    def of(cls, module: nn.BatchNorm2d | None, x: Tensor) -> "Norm":
        """What ``module`` does to x ``(B, C, H, W)``, None for nothing; updates its running statistics as it would."""
        dtype = torch.promote_types(x.dtype, torch.float32)

        def filled(value: float) -> Tensor:  # a new one each time, because a compiler takes no tensor twice
            return x.new_full((x.shape[1],), value, dtype=dtype)

        if module is None:
            return cls(filled(1), filled(0), filled(0), filled(1), False)
        statistics = module.training or module.running_mean is None
        with torch.no_grad():
            if not statistics:
                assert module.running_mean is not None
                assert module.running_var is not None
                mean, variance = module.running_mean.to(dtype), module.running_var.to(dtype)
            else:
                mean, variance = _moments(x, dtype)
                if module.training and module.running_mean is not None:
                    assert module.running_var is not None
                    assert module.num_batches_tracked is not None
                    assert module.momentum is not None
                    count = x.numel() // x.shape[1]
                    module.running_mean.lerp_(mean.to(module.running_mean.dtype), module.momentum)
                    unbiased = variance * (count / (count - 1))
                    module.running_var.lerp_(unbiased.to(module.running_var.dtype), module.momentum)
                    module.num_batches_tracked.add_(1)
            # As torch's batch norm rounds them; not every device has doubles.
            wide = torch.float64 if statistics and x.device.type == "cpu" else dtype
            invstd = (variance.to(wide) + module.eps).rsqrt().to(dtype)
        gamma = filled(1) if module.weight is None else module.weight
        return cls(gamma, filled(0) if module.bias is None else module.bias, mean, invstd, statistics)


def _moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if operators.takes(x) and x.is_contiguous(memory_format=torch.channels_last):
        return cast(tuple[Tensor, Tensor], operators.moments(x).unbind())
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # in the order of torch's batch norm
        return torch.batch_norm_update_stats(x.to(dtype), None, None, 0.0)
    variance, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
    return mean, variance


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, addend: Tensor | None, mean: Tensor, invstd: Tensor,
        statistics: bool,
    ) -> Tensor:  # fmt: skip
        norm = _rows(gamma, beta, mean.new_zeros(()), mean, invstd)
        ctx.save_for_backward(x, norm)
        ctx.call = statistics, gamma.dtype, beta.dtype
        if addend is None and not torch.compiler.is_compiling():
            ctx.again = _normalized_again
        return cast(Tensor, operators.affine(x, norm, addend))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm = ctx.saved_tensors
        statistics, gamma_dtype, beta_dtype = ctx.call
        grad = grad.contiguous(memory_format=torch.channels_last)
        # As behind an estimator that passes everything.
        dx, totals = operators.gradient(grad, x, norm, math.inf, False, statistics)
        total, product = totals.unbind()
        daddend = grad if ctx.needs_input_grad[3] else None
        return dx, (product * norm[4]).to(gamma_dtype), total.to(beta_dtype), daddend, None, None, None


def _normalized_again(ctx: Any) -> Tensor:
    return cast(Tensor, operators.affine(*ctx.saved_tensors, None))


def normalized_map(x: Tensor, norm: Norm, addend: Tensor | None) -> Tensor:
    """``norm(x) + addend`` in one pass, rounded once to the dtype of x.

    x ``(B, C, H, W)`` is one that :func:`~bonn_qat.engine.operators.takes` accepts, in ``channels_last``; the addend is
    None or a map like it.
    """
    statistics = norm.mean, norm.invstd, norm.statistics
    return cast(Tensor, _Normalized.apply(x, norm.gamma, norm.beta, addend, *statistics))


def sign_product(
    x: Tensor, norm: Norm, estimator: Estimator, value: Tensor, scale: Tensor, bias: Tensor | None,
    addend: Tensor | None, geometry: Geometry, dtype: torch.dtype, layout: torch.memory_format,
) -> Tensor:  # fmt: skip
    """``conv2d(sign(norm(x) - threshold), value) + bias + addend`` by bits.

    The value ``(O, C, kh, kw)`` is ``scale * {-1, +1}``. The sums are exact; the rest is computed in float32 and
    rounded to ``dtype`` at the end. x ``(B, C, H, W)`` is one that :func:`~bonn_qat.engine.operators.takes` accepts, in
    ``channels_last``; the addend is None or a map in the shape of the output, in ``dtype`` and ``channels_last``. The
    output is in ``dtype`` and ``layout``. The gradients are those of the product to value and to the signs, of the
    estimator and of the norm; scale has none.
    """
    threshold = x.new_zeros((), dtype=torch.float32) if estimator.threshold is None else estimator.threshold
    kind = _above(estimator.clip), estimator.parabola
    return cast(
        Tensor,
        _SignProduct.apply(
            x, norm.gamma, norm.beta, threshold, value, bias, addend, scale.detach(), norm.mean, norm.invstd, kind,
            norm.statistics, geometry, dtype, layout,
        ),
    )  # fmt: skip


def _above(bound: float) -> float:
    """The next number in float32: ``|u| < it`` is ``|u| <= bound``."""
    return bound + torch.finfo(torch.float32).eps * 2.0 ** (math.frexp(bound)[1] - 1)


def wide(x: Tensor) -> Tensor:
    """``x``, in float32 if it has fewer bits: sums of signs are exact there, and rounded where products are bfloat16.

    >>> wide(torch.ones(2, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.float() if x.element_size() < 4 else x


def per_filter(row: Tensor, y: Tensor) -> Tensor:
    """A number, or one for each filter, in a shape that broadcasts over y ``(B, O, ...)``.

    >>> per_filter(torch.ones(3, 1, 1, 1), torch.ones(2, 3, 5, 5)).shape
    torch.Size([3, 1, 1])
    """
    return row.reshape(-1, *[1] * (y.ndim - 2))


class Replay(NamedTuple):
    """A layer's way from the norm's output to the product, for :func:`replayed_product`: ``pad(quantize(output))``.

    ``quantize`` is a method of ``module``, and is called with the values that the module's parameters and buffers had
    in the forward pass; without a module it is a pure function.
    """

    module: nn.Module | None
    quantize: Callable[[Tensor], Tensor]
    pad: Callable[[Tensor], Tensor]
    geometry: Geometry
    dtype: torch.dtype

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the module, by name."""
        return (
            {} if self.module is None else {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        )

    def value(self, normed: Tensor, state: Sequence[Tensor], training: bool) -> Tensor:
        """What is multiplied with the kernels."""
        if self.module is None:
            return self.pad(self.quantize(normed))
        before = self.module.training
        if before != training:
            self.module.train(training)
        try:
            with _reparametrize_module(self.module, dict(zip(self.state(), state, strict=True))):
                return self.pad(self.quantize(normed))
        finally:
            if before != training:
                self.module.train(before)


class _ReplayedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Replay, statistics: bool, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor,
        kernels: Tensor, scale: Tensor | None, *state: Tensor,
    ) -> Tensor:  # fmt: skip
        alpha, shift = affine(gamma, beta, mean, invstd)
        ctx.save_for_backward(x, gamma, alpha, shift, mean, invstd, kernels, *state)
        ctx.call, ctx.statistics, ctx.beta_dtype = call, statistics, beta.dtype
        ctx.training = call.module is not None and call.module.training
        with torch.autocast(x.device.type, enabled=False):
            value = call.value(affine_map(x, alpha, shift), state, ctx.training).to(call.dtype)
            if scale is None:
                return call.geometry.convolve(value, kernels.to(call.dtype))
            value = value if call.module is None else wide(value)  # the sums of float inputs are not exact anyway
            sums = call.geometry.convolve(value, torch.where(kernels >= 0, 1.0, -1.0).to(value.dtype))
            return (sums * per_filter(scale.abs().to(value.dtype), sums)).to(call.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, alpha, shift, mean, invstd, kernels, *state = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            normed = affine_map(x, alpha, shift).detach().requires_grad_()
            leaves = [
                t.detach().requires_grad_(needed) for t, needed in zip(state, ctx.needs_input_grad[9:], strict=True)
            ]
            value = ctx.call.value(normed, leaves, ctx.training)
        needs = any(ctx.needs_input_grad[2:5]) or any(ctx.needs_input_grad[9:]), ctx.needs_input_grad[7]
        dtype = ctx.call.dtype
        dvalue, dkernels = ctx.call.geometry.gradients(grad, value.detach().to(dtype), kernels.to(dtype), needs)
        dx = dgamma = dbeta = None
        dstate: list[Tensor | None] = [None] * len(leaves)
        if dvalue is not None:
            sources = [normed, *(leaf for leaf in leaves if leaf.requires_grad)]
            found = iter(torch.autograd.grad(value, sources, dvalue.to(value.dtype), allow_unused=True))
            dnormed = next(found)
            dstate = [next(found) if leaf.requires_grad else None for leaf in leaves]
            dnormed = torch.zeros_like(normed) if dnormed is None else dnormed
            if ctx.statistics:
                dtype = dnormed.dtype
                dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                    dnormed, x.to(dtype), gamma.to(dtype), None, None, mean, invstd, True, 0.0, [True] * 3
                )
            else:
                sums, distance = (0, 2, 3), x.to(mean.dtype) - mean.reshape(-1, 1, 1)
                dgamma, dbeta = (dnormed * distance).sum(sums) * invstd, dnormed.sum(sums)
                dx = dnormed * alpha.reshape(-1, 1, 1)
            dx, dgamma, dbeta = dx.to(x.dtype), dgamma.to(gamma.dtype), dbeta.to(ctx.beta_dtype)
        return None, None, dx, dgamma, dbeta, None, None, dkernels, None, *dstate


def replayed_product(x: Tensor, norm: Norm, call: Replay, kernels: Tensor, scale: Tensor | None) -> Tensor:
    """The convolution of ``pad(quantize(norm(x)))`` that keeps x, and quantizes it again in the backward pass.

    x ``(B, C, H, W)``; kernels as torch's operator for ``call.geometry`` takes them. With ``scale`` the kernels are
    ``scale * {-1, +1}``, and the product is that with their signs, times ``|scale|``.
    """
    return cast(
        Tensor,
        _ReplayedProduct.apply(
            call, norm.statistics, x, norm.gamma, norm.beta, norm.mean, norm.invstd, kernels,
            None if scale is None else scale.detach(), *call.state().values(),
        ),
    )  # fmt: skip
