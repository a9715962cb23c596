"""Shapes: types and shapes of what a call returns, for tensors on the meta device.

Torch computes them too, but for nearly every operator it first loads its compiler, which takes seconds. Therefore the
operators of common networks are computed here, for common arguments; torch is asked about all others, and for errors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Shape = Sequence[int]


def result_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a torch operator returns for meta tensors. Raises what torch raises for arguments that do not fit."""
    found = own(function, args, kwargs)
    return function(*args, **kwargs) if found is None else found


def own(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result if this module knows it; None if torch must be asked."""
    known = OWN.get(str(function))
    bound = None if known is None else _bound(function, args, kwargs)
    return None if known is None or bound is None else known(**bound)


def _bound(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """All arguments by name, with defaults; None if they do not fit the operator."""
    arguments = function._schema.arguments
    if len(args) > len(arguments):
        return None
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    if given.keys() & kwargs.keys():
        return None
    given |= kwargs
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                return None
            given[argument.name] = argument.default_value
        elif not _fits(given[argument.name], "number" if _is_number(argument, given) else str(argument.type)):
            return None
    return given if len(given) == len(arguments) else None


def _is_number(argument: Any, given: Mapping[str, Any]) -> bool:
    """Whether a number is given where torch would turn it into a tensor."""
    return argument.name == "other" and not isinstance(given["other"], Tensor)


def _fits(value: Any, kind: str) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        return isinstance(value, list | tuple) and all(_fits(item, kind[len("List[") : -1]) for item in value)
    if kind == "bool" or isinstance(value, bool):
        return kind == "bool" and isinstance(value, bool)
    return isinstance(value, _PYTHON.get(kind, ()))


_PYTHON: Mapping[str, Any] = {
    "Tensor": Tensor, "int": int, "float": (int, float), "number": (int, float), "str": str,
}  # fmt: skip


def _made(shape: Shape, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device="meta")


def _same(self: Tensor, **rest: Any) -> Tensor | None:
    """Element by element, or along an axis."""
    return _made(self.shape, self) if self.is_floating_point() else None


def _along(self: Tensor, dim: int, dtype: Any = None, **rest: Any) -> Tensor | None:
    is_axis = -self.ndim <= dim < self.ndim
    return _same(self) if is_axis and dtype is None and not rest.get("half_to_float") else None


def _broadcast(*shapes: Shape) -> list[int] | None:
    made = [1] * max(map(len, shapes))
    for shape in shapes:
        for place, n in enumerate(reversed(shape), 1):
            if n != 1 and made[-place] not in (1, n):
                return None
            made[-place] = n if made[-place] == 1 else made[-place]
    return made


def _two(self: Tensor, other: Any, *, dtype: torch.dtype | None = None, **rest: Any) -> Tensor | None:
    """Two tensors of one type, or a tensor and a number, element by element."""
    if not self.is_floating_point() or (isinstance(other, Tensor) and other.dtype != self.dtype):
        return None
    shape = _broadcast(self.shape, other.shape) if isinstance(other, Tensor) else self.shape
    return None if shape is None else _made(shape, self, dtype)


def _compared(self: Tensor, other: Any) -> Tensor | None:
    return _two(self, other, dtype=torch.bool)


def _where(condition: Tensor, self: Tensor, other: Tensor) -> Tensor | None:
    shape = _broadcast(condition.shape, self.shape, other.shape)
    if shape is None or condition.dtype != torch.bool or self.dtype != other.dtype:
        return None
    return _made(shape, self)


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    first = tensors[0] if tensors else None
    if first is None or not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    rests = {(t.dtype, *t.shape[:dim], "", *t.shape[dim + 1 :]) for t in tensors}
    if len(rests) > 1:
        return None
    return _made((*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]), first)


def _stack(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    if len({(t.dtype, t.shape) for t in tensors}) != 1 or not -tensors[0].ndim - 1 <= dim <= tensors[0].ndim:
        return None
    shape, place = list(tensors[0].shape), dim % (tensors[0].ndim + 1)
    return _made([*shape[:place], len(tensors), *shape[place:]], tensors[0])


def _pair(numbers: Any, least: int) -> tuple[int, int] | None:
    numbers = tuple(numbers) * (2 if len(numbers) == 1 else 1)
    return numbers if len(numbers) == 2 and min(numbers) >= least else None


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor | None:
    steps, edges, gaps = _pair(stride, 1), _pair(padding, 0), _pair(dilation, 1)
    if steps is None or edges is None or gaps is None or input.ndim != 4 or weight.ndim != 4 or groups < 1:
        return None
    (batch, channels, *size), (filters, inputs, *kernel) = input.shape, weight.shape
    sides = zip(size, kernel, steps, edges, gaps, strict=True)
    made = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    fits = (
        min(batch, *kernel, *made, filters, channels) >= 1 and channels == inputs * groups and filters % groups == 0
        and input.dtype == weight.dtype == torch.float32
        and (bias is None or (tuple(bias.shape) == (filters,) and bias.dtype == torch.float32))
    )  # fmt: skip
    return _made((batch, filters, *made), input) if fits else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    if input.ndim < 1 or weight.ndim != 2 or not input.dtype == weight.dtype == torch.float32:
        return None
    if input.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != torch.float32):
        return None
    return _made((*input.shape[:-1], weight.shape[0]), input)


def _matmul(self: Tensor, other: Tensor) -> Tensor | None:
    if min(self.ndim, other.ndim) < 2 or self.dtype != other.dtype or not self.is_floating_point():
        return None
    batch = _broadcast(self.shape[:-2], other.shape[:-2])
    if batch is None or self.shape[-1] != other.shape[-2]:
        return None
    return _made((*batch, self.shape[-2], other.shape[-1]), self)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, enable_gqa: bool, **rest: Any
) -> Tensor | None:
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if {t.dtype for t in (query, key, value)} != {torch.float32} or {t.ndim for t in (query, key, value)} != {4}:
        return None
    (*batch, length, width), (*_, sources, _), (*_, depth) = shapes
    fits = (
        dropout_p == 0 and not enable_gqa and min(map(min, shapes)) >= 1
        and shapes[1] == (*batch, sources, width) and shapes[2] == (*batch, sources, depth)
    )  # fmt: skip
    if attn_mask is not None:
        whole = [*batch, length, sources]
        fits = fits and attn_mask.dtype == torch.float32 and _broadcast(attn_mask.shape, whole) == whole
    return _made((*batch, length, depth), query) if fits else None


def _windows(
    self: Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any = (1,),
    ceil_mode: bool = False,
    **rest: Any,
) -> Tensor | None:
    kernel, edges = _pair(kernel_size, 1), _pair(padding, 0)
    steps, gaps = _pair(stride or kernel_size, 1), _pair(dilation, 1)
    if kernel is None or edges is None or steps is None or gaps is None or rest.get("divisor_override") is not None:
        return None
    if self.ndim != 4 or self.dtype != torch.float32 or any(2 * p > k for p, k in zip(edges, kernel, strict=True)):
        return None
    made = []
    for n, k, s, p, d in zip(self.shape[2:], kernel, steps, edges, gaps, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        count = room // s + 1
        # A last window that extends beyond the image, if it begins inside.
        made.append(count + (ceil_mode and room % s > 0 and count * s < n + p))
    return _made((*self.shape[:2], *made), self) if min(*self.shape, *made) >= 1 else None


def _adaptive(self: Tensor, output_size: Any) -> Tensor | None:
    size = _pair(output_size, 1)
    fits = size is not None and self.ndim == 4 and self.dtype == torch.float32 and min(self.shape) >= 1
    return _made((*self.shape[:2], *size), self) if fits and size else None


def _reduced(self: Tensor, dim: Any, keepdim: bool, dtype: Any = None, **rest: Any) -> Tensor | None:
    if (
        not dim
        or dtype is not None
        or not self.is_floating_point()
        or not all(-self.ndim <= d < self.ndim for d in dim)
    ):
        return None
    axes = {d % self.ndim for d in dim}
    if len(axes) < len(dim) or min(self.shape) < 1:
        return None
    return _made([1 if i in axes else n for i, n in enumerate(self.shape) if keepdim or i not in axes], self)


def _prelu(self: Tensor, weight: Tensor) -> Tensor | None:
    channels = self.shape[1] if self.ndim > 1 else 1
    fits = weight.ndim == 1 and len(weight) in (1, channels) and weight.dtype == self.dtype
    return _same(self) if fits else None


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None, bias: Tensor | None = None, **rest: Any
) -> Tensor | None:
    inner = tuple(normalized_shape)
    fits = 0 < len(inner) <= input.ndim and tuple(input.shape[input.ndim - len(inner) :]) == inner and min(inner) >= 1
    return _same(input) if fits and _are(input, inner, weight, bias) else None


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, **rest: Any
) -> Tensor | None:
    fits = input.ndim > 1 and num_groups >= 1 and min(input.shape) >= 1 and input.shape[1] % num_groups == 0
    return _same(input) if fits and _are(input, (input.shape[1],), weight, bias) else None


def _batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, **rest: Any,
) -> Tensor | None:  # fmt: skip
    fits = input.ndim > 1 and min(input.shape) >= 1 and not training and running_mean is not None
    fits = fits and running_var is not None
    if fits and _are(input, (input.shape[1],), weight, bias, running_mean, running_var):
        return _same(input)
    return None


def _are(like: Tensor, shape: tuple[int, ...], *tensors: Tensor | None) -> bool:
    return all(tensor is None or (tuple(tensor.shape) == shape and tensor.dtype == like.dtype) for tensor in tensors)


def _rolled(self: Tensor, shifts: Any, dims: Any) -> Tensor | None:
    fits = len(shifts) == len(dims) > 0 and all(-self.ndim <= d < self.ndim for d in dims)
    return _made(self.shape, self) if fits else None


def _scattered(self: Tensor, src: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor | None:
    if self.dtype != src.dtype or not -self.ndim <= dim < self.ndim or step < 1:
        return None
    part = list(self.shape)
    part[dim] = len(range(*slice(start, end, step).indices(part[dim])))
    return _made(self.shape, self) if list(src.shape) == part and min(part) >= 1 else None


ELEMENTWISE = (
    "relu", "relu6", "gelu", "silu", "sigmoid", "hardsigmoid", "hardswish", "hardtanh", "tanh", "elu", "mish",
    "softplus", "leaky_relu", "exp", "log", "sqrt", "rsqrt", "abs", "neg", "square", "reciprocal",
)  # fmt: skip
OWN: Mapping[str, Callable[..., Tensor | None]] = {
    **{f"aten.{name}.default": _same for name in ELEMENTWISE},
    **{f"aten.{name}.{kind}": _two for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    **{f"aten.{name}.{kind}": _compared for name in ("ge", "gt", "le", "lt") for kind in ("Tensor", "Scalar")},
    "aten.where.self": _where, "aten.cat.default": _cat, "aten.stack.default": _stack, "aten.conv2d.default": _conv2d,
    "aten.linear.default": _linear, "aten.matmul.default": _matmul,
    "aten.scaled_dot_product_attention.default": _attention, "aten.softmax.int": _along,
    "aten._softmax.default": _along, "aten.avg_pool2d.default": _windows, "aten.max_pool2d.default": _windows,
    "aten.adaptive_avg_pool2d.default": _adaptive, "aten.mean.dim": _reduced, "aten.sum.dim_IntList": _reduced,
    "aten.amax.default": _reduced, "aten.prelu.default": _prelu, "aten.layer_norm.default": _layer_norm,
    "aten.rms_norm.default": _layer_norm, "aten.group_norm.default": _group_norm,
    "aten.batch_norm.default": _batch_norm, "aten.roll.default": _rolled, "aten.slice_scatter.default": _scattered,
}  # fmt: skip
