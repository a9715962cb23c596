"""Allowed: the operators of torch that a packed network may call, and the range of each of their arguments.

A file may come from anybody, and torch's operators are written for programs, not for files: some crash, or read memory
that is not theirs, for arguments that no program gives them. So an operator is here only if networks need it, each of
its arguments has a range, and :func:`check` refuses everything else before torch sees it. None of them has a state,
draws random numbers, returns uninitialized memory, reinterprets memory as another type, or returns a shape that depends
on values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bonn_qat.errors import InvalidData
from bonn_qat.files.plain import shown

AXES = 16  # of a tensor, at most
PIECES = 2**16  # tensors in a list, and length of an axis that is cut into pieces, at most

# By what they need in memory and which types they take; see `scratch.py` and `_TYPES`.
GROUPS: Mapping[str, str] = {
    "sizes": "sym_size.int sym_numel.default",
    "views": """
        alias.default chunk.default detach.default expand.default expand_as.default flatten.using_ints movedim.int
        movedim.intlist narrow.default permute.default reshape.default select.int slice.Tensor split.Tensor split.sizes
        split_with_sizes.default squeeze.default squeeze.dim squeeze.dims swapaxes.default swapdims.default t.default
        transpose.int unbind.int unflatten.int unfold.default unsqueeze.default view.default view_as.default
        _unsafe_view.default""",
    "made": """
        arange.default arange.start arange.start_step full.default full_like.default new_full.default new_ones.default
        new_zeros.default ones.default ones_like.default scalar_tensor.default zeros.default zeros_like.default""",
    "elementwise": """
        abs.default add.Scalar add.Tensor addcdiv.default addcmul.default atan.default atan2.default bitwise_and.Scalar
        bitwise_and.Tensor bitwise_not.default bitwise_or.Scalar bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor
        ceil.default celu.default clamp.Tensor clamp.default clamp_max.Tensor clamp_max.default clamp_min.Tensor
        clamp_min.default clip.default cos.default div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode elu.default
        eq.Scalar eq.Tensor erf.default exp.default exp2.default expm1.default fill.Scalar floor.default ge.Scalar
        ge.Tensor gelu.default gt.Scalar gt.Tensor hardshrink.default hardsigmoid.default hardswish.default
        hardtanh.default isnan.default le.Scalar le.Tensor leaky_relu.default lerp.Scalar
        lerp.Tensor log.default log10.default log1p.default log2.default logical_and.default logical_not.default
        logical_or.default logical_xor.default lt.Scalar lt.Tensor masked_fill.Scalar maximum.default minimum.default
        mish.default mul.Scalar mul.Tensor nan_to_num.default ne.Scalar ne.Tensor neg.default positive.default
        pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu.default reciprocal.default relu.default relu6.default
        remainder.Scalar remainder.Tensor round.default rsqrt.default rsub.Scalar rsub.Tensor selu.default
        sigmoid.default sign.default silu.default sin.default softplus.default softshrink.default sqrt.default
        square.default sub.Scalar sub.Tensor tan.default tanh.default threshold.default true_divide.Scalar
        true_divide.Tensor trunc.default where.Scalar where.ScalarOther where.ScalarSelf where.self""",
    "copies": """
        cat.default clone.default concat.default constant_pad_nd.default contiguous.default copy.default
        embedding.default flip.default gather.default hstack.default index.Tensor index_select.default
        lift_fresh_copy.default pad.default pixel_shuffle.default pixel_unshuffle.default
        reflection_pad1d.default reflection_pad2d.default repeat.default repeat_interleave.self_int
        replication_pad2d.default roll.default select_scatter.default slice_scatter.default stack.default
        tile.default type_as.default vstack.default _to_copy.default""",
    "reductions": """
        amax.default amin.default any.default any.dim argmax.default argmin.default cumsum.default
        linalg_vector_norm.default log_sigmoid.default log_softmax.int max.default max.dim max.other
        mean.default mean.dim min.default min.dim min.other prod.default prod.dim_int softmax.int sort.default
        sort.stable std.correction std.dim std_mean.correction sum.default sum.dim_IntList topk.default
        var.correction var.dim var_mean.correction _log_softmax.default _softmax.default""",
    "norms": """
        batch_norm.default group_norm.default instance_norm.default layer_norm.default rms_norm.default""",
    "windows": """
        adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_max_pool2d.default avg_pool1d.default
        avg_pool2d.default col2im.default im2col.default max_pool2d.default max_pool2d_with_indices.default
        upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec
        upsample_nearest2d.default upsample_nearest2d.vec _adaptive_avg_pool2d.default""",
    "products": "addmm.default bmm.default einsum.default linear.default matmul.default mm.default",
    "attention": "scaled_dot_product_attention.default",
    "convolutions": """
        conv1d.default conv1d.padding conv2d.default conv2d.padding conv_transpose2d.input convolution.default""",
}  # fmt: skip
GROUP_OF: Mapping[str, str] = {f"aten.{name}": group for group, names in GROUPS.items() for name in names.split()}


class Range(NamedTuple):
    """The allowed values of an argument: in words, and as a test."""

    allowed: str
    fits: Callable[[Any], bool]


def _whole(low: int, high: int) -> Range:
    return Range(f"{low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def _several(one: Range, most: int) -> Range:
    """One value, or a list of at most ``most``."""

    def fits(value: Any) -> bool:
        return all(map(one.fits, value)) and len(value) <= most if isinstance(value, list | tuple) else one.fits(value)

    return Range(f"{one.allowed}, or a list of at most {most:,} of them", fits)


def _one_of(*values: Any) -> Range:
    return Range(
        " or ".join(map(repr, values)), lambda value: any(type(value) is type(v) and value == v for v in values)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


_ANY = Range("a number", _is_number)  # it becomes the value of elements
_FINITE = Range("a finite number", lambda value: _is_number(value) and math.isfinite(value))
_TRUTH = Range("true or false", lambda value: isinstance(value, bool))
_TYPE = Range(
    "a type", lambda value: isinstance(value, torch.dtype | torch.layout | torch.memory_format | torch.device)
)
_AXIS = _several(_whole(-AXES, AXES - 1), AXES)
_SIZES = _several(_whole(-1, 2**48), AXES)
_POSITION = Range(
    "a finite number of less than 64 bits", lambda value: _FINITE.fits(value) and -(2**63) <= value < 2**63
)
_STEP = Range("a number other than 0, of at most 32 bits", lambda value: _FINITE.fits(value) and 0 < abs(value) < 2**32)
_WINDOW = _several(_whole(1, 2**12), 3)
# By the name of the argument, which torch uses alike in all operators. Tensors have no range: they are compared with
# one another, in `_TYPES` and `_RULES`.
RANGES: Mapping[str, Range] = {
    name: range_
    for names, range_ in (
        # axes and sizes
        ("axis0 axis1 destination dim dim0 dim1 dimension dims end_dim source start_dim", _AXIS),
        ("normalized_shape shape size sizes", _SIZES),
        ("repeats", _several(_whole(0, 2**48), AXES)),
        ("index start end length", _POSITION),
        ("step", _STEP),
        ("shifts", _several(_whole(-(2**31), 2**31), AXES)),
        ("split_size split_sizes", _several(_whole(0, 2**48), PIECES)),
        ("chunks", _whole(1, PIECES)),
        ("k", _whole(0, 2**31)),
        ("pad", _several(_whole(-(2**20), 2**20), 2 * AXES)),
        # windows
        ("kernel_size stride dilation", _WINDOW),
        ("padding", _several(Range("0 to 4,096, 'same' or 'valid'", lambda value: (
            value in ("same", "valid") if isinstance(value, str) else type(value) is int and 0 <= value <= 2**12)), 4)),
        ("output_padding", _several(_whole(0, 2**12), 3)),
        ("output_size", _several(_whole(1, 2**16), 3)),
        ("scale_factors scales_h scales_w", _several(Range("0.0001 to 10,000", lambda value: (
            _is_number(value) and 1e-4 <= value <= 1e4)), 2)),
        ("groups num_groups", _whole(1, 2**16)),
        ("upscale_factor downscale_factor", _whole(1, 2**10)),
        # numbers
        ("alpha beta fill_value input_scale lambd max max_val min min_val nan negative_slope neginf other posinf s"
         " scale self threshold value weight", _ANY),
        ("correction eps exponent momentum ord", _FINITE),
        # choices
        ("align_corners ceil_mode count_include_pad cudnn_enable cudnn_enabled descending half_to_float implicit"
         " is_causal keepdim largest non_blocking scale_grad_by_freq sorted stable transposed unbiased"
         " use_input_stats", _TRUTH),
        ("device dtype layout memory_format", _TYPE),
        ("approximate", _one_of("none", "tanh")),
        ("mode", _one_of("constant", "reflect", "replicate", "circular")),
        ("rounding_mode", _one_of("floor", "trunc")),
        ("equation", Range("a text of at most 100 characters", lambda value: (
            isinstance(value, str) and len(value) <= 100))),
        ("padding_idx", _whole(-1, 2**48)),
        # what would draw random numbers, train, or run code that no packed network needs
        ("dropout_p", Range("0", lambda value: _is_number(value) and value == 0)),
        ("enable_gqa pin_memory sparse sparse_grad training", _one_of(False)),
        ("divisor_override path", _one_of(None)),
    )
    for name in names.split()
}  # fmt: skip

# Torch believes the caller who says how long the result will be.
_OWN: Mapping[tuple[str, str], Range] = {("repeat_interleave", "output_size"): _one_of(None)}

_FLOATS = (torch.float32, torch.float64)
_TYPES: Mapping[str, tuple[torch.dtype, ...]] = {  # of all tensors that an operator of the group takes, and the same
    "norms": _FLOATS, "windows": _FLOATS, "products": _FLOATS, "convolutions": (torch.float32,),
}  # fmt: skip


def check(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise InvalidData for a call with an argument outside its range. Tensors need no memory (``meta``).

    >>> x = torch.empty(2, 3, device="meta")
    >>> check(torch.ops.aten.roll.default, [x, [1] * 20_000, [0] * 20_000], {})
    Traceback (most recent call last):
    bonn_qat.errors.InvalidData: aten.roll.default does not take [1, 1, ...; allowed: -2,147,483,648 to ...
    """
    group, given = GROUP_OF.get(str(function)), bound(function, args, kwargs)
    if group is None:
        return  # our own operators check all that they take
    for place, argument in enumerate(function._schema.arguments):
        if place < len(args) or argument.name in kwargs:
            _check_argument(function, argument, given[argument.name])
    held = tensors(list(given.values()))
    if any(tensor.is_complex() for tensor in held):
        raise InvalidData(f"{function} does not take complex numbers")
    if known := _TYPES.get(group):
        types = {tensor.dtype for tensor in held}
        if len(types) > 1:
            raise InvalidData(f"{function} of tensors of several types")
        if not types <= set(known):
            raise InvalidData(f"{function} does not take {types.pop()}; allowed: {', '.join(map(str, known))}")
    rule = _RULES.get(function._opname)
    if rule is not None and (wrong := rule(**given)):
        raise InvalidData(f"{function} {wrong}")


def bound(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that are not given."""
    arguments = function._schema.arguments
    if len(args) > len(arguments):
        raise InvalidData(f"{function} takes {len(arguments)} arguments; got {len(args)}")
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: value for a, value in zip(arguments, args, strict=False)}
    if missing := [a.name for a in arguments if a.name not in given and a.name not in kwargs]:
        raise InvalidData(f"{function} takes {len(arguments)} arguments; {missing[0]} is missing")
    return given | dict(kwargs)


def range_of(function: Any, argument: str) -> Range:
    """The range of an argument that is no tensor, by its name."""
    return _OWN.get((function._opname, argument)) or RANGES[argument]


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested lists and tables."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _check_argument(function: Any, argument: Any, value: Any) -> None:
    kind = str(argument.type)
    if value is None and kind.startswith("Optional["):
        return
    if "Tensor" in kind:
        items = value if isinstance(value, list | tuple) else [value]
        most = AXES if argument.name == "indices" else PIECES
        fits = len(items) <= most and all(
            item is None or isinstance(item, Tensor) or _is_number(item) for item in items
        )
        allowed = f"a tensor, or a list of at most {most:,}"
    else:
        allowed, test = range_of(function, argument.name)
        fits = test(value)
    if not fits:
        raise InvalidData(f"{function} does not take {shown(value)} for {argument.name}; allowed: {allowed}")


# What arguments say of one another. Each rule returns what is wrong, or "".


def _scales(self: Tensor | None = None, input: Tensor | None = None, **given: Any) -> str:
    """Torch's kernels compute positions from a scale and trust that they lie in the image."""
    image = self if input is None else input
    scales, size = given.get("scale_factors"), given.get("output_size")
    if "scales_h" in given:
        scales = [given["scales_h"], given["scales_w"]]
    if image is None or image.ndim != 4:
        return "takes images of four axes"
    if size is not None and len(size) != 2:
        return f"does not make images of size {shown(size)}"
    if scales is None or None in scales or size is None:
        return ""
    made = [math.floor(n * scale) for n, scale in zip(image.shape[2:], scales, strict=False)]
    return "" if made == list(size) else f"with scales {shown(scales)} does not make images of size {shown(size)}"


def _division(self: Any, other: Any, rounding_mode: str | None = None, **rest: Any) -> str:
    """The smallest whole number divided by -1 ends a process on some processors, as division by 0 does."""
    held = [number for number in (self, other) if isinstance(number, Tensor)]
    if rounding_mode is None or any(tensor.is_floating_point() for tensor in held) or isinstance(other, float):
        return ""
    return "" if type(other) is int and other > 0 else "of whole numbers: allowed is division by a number above 0"


def _remainder(self: Any, other: Any, **rest: Any) -> str:
    return _division(self, other, "floor")


def _sized(sizes: str, channels: int) -> Callable[..., str]:
    """The tensors ``sizes`` have one number for each channel: torch checks it for some operators, and not for all."""

    def rule(input: Tensor, **given: Any) -> str:
        if input.ndim <= channels:
            return f"does not take a tensor of {input.ndim} axes"
        odd = [given[name] for name in sizes.split() if given[name] is not None]
        wrong = [tuple(t.shape) for t in odd if tuple(t.shape) != (input.shape[channels],)]
        return f"expected ({input.shape[channels]},), got {wrong[0]}" if wrong else ""

    return rule


def _inner(normalized_shape: Any, **rest: Any) -> str:
    """Of no elements, mean and spread would still be computed, one for each row."""
    return (
        "" if min(normalized_shape, default=0) >= 1 else f"does not take {shown(normalized_shape)} for normalized_shape"
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, **rest: Any) -> str:
    shapes = [tuple(t.shape) for t in (query, key, value)]
    if len({len(shape) for shape in shapes}) > 1 or not 3 <= query.ndim <= 5:
        return f"does not take queries, keys and values of sizes {shapes}"
    if {t.dtype for t in (query, key, value)} not in ({torch.float32}, {torch.float64}):
        return "takes queries, keys and values of float32 or float64"
    (*batch, length, width), (*_, sources, _), (*_, depth) = shapes
    # Several heads of queries may share keys and values: the multi-query attention of MobileNetV5.
    shared = all(
        shape[-2:] == inner and all(m in (1, n) for m, n in zip(shape[:-2], batch, strict=True))
        for shape, inner in zip(shapes[1:], ((sources, width), (sources, depth)), strict=True)
    )
    if not shared or min(length, width, sources, depth) < 1:
        return f"does not take queries, keys and values of sizes {shapes}"
    if attn_mask is None:
        return ""
    whole, mask = [*batch, length, sources], list(attn_mask.shape)
    fits = len(mask) <= len(whole) and all(m in (1, n) for m, n in zip(mask[::-1], whole[::-1], strict=False))
    if not fits or attn_mask.dtype not in (torch.bool, query.dtype):
        return f"does not take a mask of {attn_mask.dtype} {tuple(mask)} for {whole}"
    return "" if len(mask) > 1 else "does not take a mask of less than two axes"


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool = False, **rest: Any
) -> str:
    if input.ndim != weight.ndim or input.ndim not in (3, 4) or min(*input.shape[1:], *weight.shape) < 1:
        return f"does not take {tuple(input.shape)} with kernels {tuple(weight.shape)}"
    filters = weight.shape[1] * groups if transposed else weight.shape[0]
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    if input.shape[1] != channels or channels % groups or filters % groups:
        return f"does not take {tuple(input.shape)} with kernels {tuple(weight.shape)} in {groups} groups"
    if bias is not None and tuple(bias.shape) != (filters,):
        return f"does not take a bias of {tuple(bias.shape)} for {filters} filters"
    return ""


def _transposed(**given: Any) -> str:
    return _convolution(transposed=True, **given)


def _indices(indices: Any, **rest: Any) -> str:
    """Truth values as indices would give a shape that depends on values."""
    odd = [t.dtype for t in tensors(indices) if t.dtype not in (torch.int64, torch.int32)]
    return f"does not take indices of {odd[0]}" if odd else ""


def _index(index: Any, **rest: Any) -> str:
    return _indices(index)


def _two(tensors: Sequence[Any], **rest: Any) -> str:
    """Of more operands the products of some, which can be larger than all the rest, lie in memory in between."""
    return "" if len(tensors) <= 2 else f"of {len(tensors)} tensors; allowed: 1 or 2"


def _pieces(self: Tensor, **given: Any) -> str:
    longest = max(self.shape, default=0)
    return "" if longest <= PIECES else f"would make too many pieces of {tuple(self.shape)}"


_RULES: Mapping[str, Callable[..., str]] = {
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), _scales),
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _convolution), "conv_transpose2d": _transposed,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unbind"), _pieces),
    **dict.fromkeys(("index", "embedding"), _indices), **dict.fromkeys(("gather", "index_select"), _index),
    **dict.fromkeys(("layer_norm", "rms_norm"), _inner),
    "div": _division, "remainder": _remainder, "einsum": _two, "scaled_dot_product_attention": _attention,
    "batch_norm": _sized("weight bias running_mean running_var", 1), "group_norm": _sized("weight bias", 1),
    "instance_norm": _sized("weight bias running_mean running_var", 1),
}  # fmt: skip
