"""Shapes: lowerings of what moves, repeats or joins numbers, and of what is only another way to count them."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bonn_qat_runtime.builder import LARGEST, Builder, Refused, images, number, pair, shape_of, tensor, whole
from bonn_qat_runtime.elementwise import add, multiply
from bonn_qat_runtime.errors import shown
from bonn_qat_runtime.files import Tensor
from bonn_qat_runtime.operations import Floats, Offsets
from bonn_qat_runtime.views import View


def _same(builder: Builder, x: Any, *rest: Any, **options: Any) -> Any:
    return x


def _cast(builder: Builder, x: Any, dtype: Any = "float32", **options: Any) -> View:
    if dtype not in ("float32", None):
        raise Refused(f"numbers of the type {shown(dtype)}")
    return tensor(x)


def _copy(builder: Builder, x: Any, source: Any, *rest: Any) -> View:
    return tensor(source).expanded(shape_of(x))


def _dropout(builder: Builder, x: Any, share: Any, is_training: Any) -> View:
    if is_training:
        raise Refused("random numbers")
    return tensor(x)


def _filled(value: float, builder: Builder, x: Any, size: Any = None, **options: Any) -> Tensor:
    """Constants in the shape of a tensor, or another one."""
    shape = tensor(x).shape if size is None else [whole(n, 0) for n in size]
    if math.prod(shape) > LARGEST * 64:
        raise Refused(f"constants of the shape {shown(shape)}")
    return Tensor("float32", np.full(shape, value, np.float32))


def _item(builder: Builder, items: Any, index: Any) -> Any:
    if not isinstance(items, tuple | list):
        raise Refused("an item of something that has none")
    return items[index]


def _size(builder: Builder, x: Any, axis: Any) -> int:
    return int(tensor(x).shape[axis])


# ---- other axes ----


def view(builder: Builder, x: Any, shape: Any) -> View:
    """With -1 for at most one length."""
    old, sizes = math.prod(tensor(x).shape), [whole(n, -1) for n in shape]
    rest = math.prod(n for n in sizes if n != -1)
    if sizes.count(-1) > 1 or rest < 1 or old % rest:
        raise Refused(f"a tensor {tensor(x).shape} as {sizes}")
    made = [old // rest if n == -1 else n for n in sizes]
    if math.prod(made) != old:
        raise Refused(f"a tensor {tensor(x).shape} as {sizes}")
    return builder.reshaped(tensor(x), made)


def _flatten(builder: Builder, x: Any, start_dim: Any = 0, end_dim: Any = -1) -> View:
    first, last = tensor(x).axis(start_dim), x.axis(end_dim)
    shape = x.shape
    return builder.reshaped(x, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


def _unflatten(builder: Builder, x: Any, dim: Any, sizes: Any) -> Any:
    axis = tensor(x).axis(dim)
    if sizes.count(-1) == 1:
        sizes = [-x.shape[axis] // math.prod(sizes) if n == -1 else n for n in sizes]
    return view(builder, x, [*x.shape[:axis], *sizes, *x.shape[axis + 1 :]])


def _permute(builder: Builder, x: Any, dims: Any) -> View:
    return tensor(x).permuted(dims)


def _transpose(builder: Builder, x: Any, dim0: Any, dim1: Any) -> View:
    order = list(range(len(tensor(x).shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(builder, x, order)


def _t(builder: Builder, x: Any) -> View:
    return _permute(builder, x, list(range(len(tensor(x).shape)))[::-1])


def _movedim(builder: Builder, x: Any, source: Any, destination: Any) -> View:
    sources, targets = ([a] if isinstance(a, int) else a for a in (source, destination))
    moved = {tensor(x).axis(target): x.axis(own) for own, target in zip(sources, targets, strict=True)}
    rest = iter(axis for axis in range(len(x.axes)) if axis not in moved.values())
    return tensor(x).permuted([moved[k] if k in moved else next(rest) for k in range(len(x.axes))])


def _unsqueeze(builder: Builder, x: Any, dim: Any) -> View:
    shape = list(tensor(x).shape)
    shape.insert(range(len(shape) + 1)[dim], 1)
    return view(builder, x, shape)


def _squeeze(builder: Builder, x: Any, dim: Any) -> View:
    shape = tensor(x).shape
    gone = {range(len(shape))[axis] for axis in ([dim] if isinstance(dim, int) else dim)}
    return view(builder, x, [n for axis, n in enumerate(shape) if axis not in gone or n != 1])


def _expand(builder: Builder, x: Any, size: Any, implicit: Any = False) -> Any:
    return tensor(x).expanded(size)


def _expand_as(builder: Builder, x: Any, other: Any) -> Any:
    return _expand(builder, x, list(shape_of(other)))


# ---- parts ----


def _slice(builder: Builder, x: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    return _taken(tensor(x), dim, slice(start, end, step))


def _taken(x: View, dim: int, places: slice | Offsets) -> View:
    found = x.taken(dim, places)
    if 0 in found.shape:
        raise Refused("a tensor without elements")
    return found


def _narrow(builder: Builder, x: Any, dim: Any, start: Any, length: Any) -> Any:
    return _slice(builder, x, dim, start, start + length)


def _select(builder: Builder, x: Any, dim: Any, index: Any) -> Any:
    axis = range(len(tensor(x).shape))[dim]
    index = range(tensor(x).shape[axis])[index]
    found = _slice(builder, x, axis, index, index + 1)
    return view(builder, found, [n for k, n in enumerate(shape_of(found)) if k != axis])


def _unbind(builder: Builder, x: Any, dim: Any = 0) -> tuple[Any, ...]:
    return tuple(_select(builder, x, dim, index) for index in range(tensor(x).shape[dim]))


def _split(builder: Builder, x: Any, sizes: Any, dim: Any = 0) -> tuple[View, ...]:
    length = tensor(x).shape[dim]
    if isinstance(sizes, int):
        sizes = [min(whole(sizes, 1), length - begin) for begin in range(0, length, sizes)]
    begins = np.cumsum([0, *(whole(n, 1) for n in sizes)]).tolist()
    if begins[-1] != length:
        raise Refused(f"parts {shown(sizes)} of an axis of {length}")
    return tuple(_taken(x, dim, slice(a, b)) for a, b in pairwise(begins))


def _chunk(builder: Builder, x: Any, chunks: Any, dim: Any = 0) -> tuple[View, ...]:
    return _split(builder, x, -(-tensor(x).shape[dim] // whole(chunks, 1)), dim)


def _index_select(builder: Builder, x: Any, dim: Any, index: Any) -> View:
    return _taken(tensor(x), dim, _indices(index, tensor(x).shape[dim]))


def _indices(index: Any, length: int) -> Offsets:
    if not isinstance(index, Tensor) or index.type not in ("int64", "int32") or index.array.ndim != 1:
        raise Refused("indices that are no constants of one axis")
    values = index.array.astype(np.int64)
    values = np.where(values < 0, values + length, values)
    if not values.size or values.min() < 0 or values.max() >= length:
        raise Refused("indices outside the tensor")
    return values


def _index(builder: Builder, x: Any, indices: Any) -> View:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise Refused("indices along several axes")
    return _index_select(builder, x, *given[0])


def _roll(builder: Builder, x: Any, shifts: Any, dims: Any = ()) -> View:
    found = tensor(x)
    for shift, axis in zip([shifts] if isinstance(shifts, int) else shifts, dims, strict=True):
        found = found.taken(axis, np.roll(np.arange(found.shape[axis]), shift))
    return found


def _flip(builder: Builder, x: Any, dims: Any) -> View:
    found = tensor(x)
    for axis in dims:
        found = found.taken(axis, np.arange(found.shape[axis])[::-1])
    return found


def _repeat(builder: Builder, x: Any, repeats: Any) -> View:
    missing = len(repeats) - len(tensor(x).axes)
    found = builder.reshaped(x, (*([1] * missing), *x.shape))
    for axis, times in enumerate(repeats):
        if whole(times, 1) > 1:
            found = found.taken(axis, np.tile(np.arange(found.shape[axis]), times))
    return found


def _repeat_interleave(builder: Builder, x: Any, repeats: Any, dim: Any = None, output_size: Any = None) -> View:
    found = tensor(x)
    return found.taken(dim, np.repeat(np.arange(found.shape[dim]), whole(repeats, 1)))


def _unfold(builder: Builder, x: Any, dimension: Any, size: Any, step: Any) -> View:
    axis = tensor(x).axis(dimension)
    places = np.arange(0, x.shape[axis] - whole(size, 1) + 1, whole(step, 1))[:, None] + np.arange(size)
    found = _taken(x, axis, places.reshape(-1))
    shape = (*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])
    found = builder.reshaped(found, shape)
    return found.permuted([k for k in range(len(shape)) if k != axis + 1] + [axis + 1])


def _im2col(builder: Builder, x: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> View:
    """Windows as columns: ``(1, C, H, W)`` -> ``(1, C kh kw, windows)``."""
    ph, pw = pair(padding, 0)
    found = _constant_pad(builder, images(x), [pw, pw, ph, ph]) if ph or pw else images(x)
    shape = [1, found.shape[1]]
    for axis, (k, d, s) in enumerate(zip(pair(kernel, 1), pair(dilation, 1), pair(stride, 1), strict=True)):
        places = np.arange(k)[:, None] * d + np.arange(0, found.shape[2 + axis] - d * (k - 1), s)
        found, shape = _taken(found, 2 + axis, places.reshape(-1)), [*shape, *places.shape]
    found = builder.reshaped(found, shape).permuted([0, 1, 2, 4, 3, 5])
    return builder.reshaped(found, (1, math.prod(shape[1:3]) * shape[4], shape[3] * shape[5]))


# ---- several tensors in one ----


def _cat(builder: Builder, tensors: Any, dim: Any = 0) -> View:
    return builder.joined(tensors, dim)


def _stack(builder: Builder, tensors: Any, dim: Any = 0) -> View:
    both = [builder.constant(x, shape_of(x)) if isinstance(x, Tensor) else x for x in tensors]
    return _cat(builder, [_unsqueeze(builder, x, dim) for x in both], dim)


def _slice_scatter(
    builder: Builder, x: Any, source: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> View:
    axis = tensor(x).axis(dim)
    places = range(x.shape[axis])[slice(start, end, step)]
    if len(places) == x.shape[axis]:
        return tensor(source)
    ones, begins, steps = (1,) * len(x.axes), [0] * len(x.axes), [1] * len(x.axes)
    begins[axis], steps[axis] = places.start, places.step
    return builder.placed([(x, [0] * len(ones), ones), (source, begins, steps)], x.shape)


def _constant_pad(builder: Builder, x: Any, pad: Any, value: Any = 0.0) -> View:
    kept = tensor(x)
    before, after = _sides(kept, pad)
    for axis, (a, b) in enumerate(zip(before, after, strict=True)):
        kept = _taken(kept, axis, slice(max(-a, 0), kept.shape[axis] - max(-b, 0)))
    before, after = [max(n, 0) for n in before], [max(n, 0) for n in after]
    if not any(before + after):
        return kept
    shape = [a + n + b for a, n, b in zip(before, kept.shape, after, strict=True)]
    return builder.placed([(kept, tuple(before), (1,) * len(shape))], shape, number(value))


def _sides(x: View, pad: Sequence[int]) -> tuple[list[int], list[int]]:
    """What torch adds to the last axes, as lists for all of them, before and after."""
    count = len(pad) // 2
    if len(pad) % 2 or count > len(x.axes):
        raise Refused(f"a padding {shown(pad)}")
    rest = [0] * (len(x.axes) - count)
    return [*rest, *pad[::2][::-1]], [*rest, *pad[1::2][::-1]]


def _pad(builder: Builder, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> View:
    if mode == "constant":
        return _constant_pad(builder, x, pad, 0.0 if value is None else value)
    found = tensor(x)
    for axis, (a, b) in enumerate(zip(*_sides(found, pad), strict=True)):
        n = found.shape[axis]
        if a or b:
            found = found.taken(axis, _beyond(n, mode)(np.arange(-a, n + b)))
    return found


def _beyond(n: int, mode: Any) -> Callable[[Offsets], Offsets]:
    """Where the numbers that are outside an axis come from."""
    known: Mapping[Any, Callable[[Offsets], Offsets]] = {
        "reflect": lambda i: n - 1 - np.abs(n - 1 - np.abs(i)),
        "replicate": lambda i: np.clip(i, 0, n - 1),
        "circular": lambda i: i % n,
    }
    return known[mode]


def _reflect(builder: Builder, x: Any, padding: Any) -> View:
    return _pad(builder, x, padding, "reflect")


def _replicate(builder: Builder, x: Any, padding: Any) -> View:
    return _pad(builder, x, padding, "replicate")


def _pixel_shuffle(builder: Builder, x: Any, upscale_factor: Any) -> View:
    r, (n, c, h, w) = whole(upscale_factor, 1), images(x).shape
    if c % (r * r):
        raise Refused(f"{c} channels as {r * r} pixels each")
    found = builder.reshaped(x, (n, c // (r * r), r, r, h, w)).permuted([0, 1, 4, 2, 5, 3])
    return builder.reshaped(found, (n, c // (r * r), h * r, w * r))


def _pixel_unshuffle(builder: Builder, x: Any, downscale_factor: Any) -> View:
    r, (n, c, h, w) = whole(downscale_factor, 1), images(x).shape
    if h % r or w % r:
        raise Refused(f"a map of {h} by {w} pixels in squares of {r}")
    found = builder.reshaped(x, (n, c, h // r, r, w // r, r)).permuted([0, 1, 3, 5, 2, 4])
    return builder.reshaped(found, (n, c * r * r, h // r, w // r))


# ---- other sizes ----


def _scaled(x: View, size: Any, factors: Any) -> list[tuple[int, int, float]]:
    """For height and width: the length, the new one, and how far pixels are apart."""
    if isinstance(factors, float | int):
        factors = [factors, factors]
    found = []
    for axis in (0, 1):
        n = x.shape[2 + axis]
        new = whole(size[axis], 1) if size is not None else math.floor(n * factors[axis])
        found.append((n, new, 1 / factors[axis] if factors is not None and factors[axis] is not None else n / new))
    return found


def _nearest(builder: Builder, x: Any, size: Any, scales: Any = None, *more: Any) -> View:
    found = images(x)
    for axis, (n, new, step) in enumerate(_scaled(found, size, [scales, *more] if more else scales)):
        places = np.floor(np.arange(new, dtype=np.float32) * np.float32(step)).astype(np.int64)
        found = found.taken(2 + axis, np.minimum(places, n - 1))
    return found


def _bilinear(builder: Builder, x: Any, size: Any, align_corners: Any, scales: Any = None, *more: Any) -> View:
    return _resampled(builder, x, _scaled(images(x), size, [scales, *more] if more else scales), align_corners, 1)


def _bicubic(builder: Builder, x: Any, size: Any, align_corners: Any, scales: Any = None, *more: Any) -> View:
    return _resampled(builder, x, _scaled(images(x), size, [scales, *more] if more else scales), align_corners, 3)


def _resampled(
    builder: Builder, x: View, sides: list[tuple[int, int, float]], is_aligned: bool, degree: int
) -> View:  # fmt: skip
    """Sums of 2 or 4 pixels along each axis, by their distances."""
    for axis, (n, new, step) in enumerate(sides):
        if n == new and step == 1:
            continue
        i = np.arange(new, dtype=np.float32)
        if is_aligned:
            place = i * np.float32((n - 1) / (new - 1) if new > 1 else 0)
        else:
            place = np.float32(step) * (i + np.float32(0.5)) - np.float32(0.5)
        place = np.maximum(place, 0) if degree == 1 else place
        low = np.floor(place).astype(np.int64)
        parts = []
        for tap in range(-(degree // 2), degree // 2 + 2):
            share = _share(np.abs(place - low - tap), degree).astype(np.float32).reshape((-1,) + (1,) * (1 - axis))
            pixels = x.taken(2 + axis, np.clip(low + tap, 0, n - 1))
            parts.append(tensor(multiply(builder, pixels, Tensor("float32", share))))
        x = parts[0]
        for part in parts[1:]:
            x = tensor(add(builder, x, part))
    return x


def _share(distance: Floats, degree: int) -> Floats:
    """The weight of a pixel at this distance; for a cubic curve with the slope -0.75, as torch has it."""
    d, a = distance, np.float32(-0.75)
    if degree == 1:
        return np.maximum(1 - d, 0)
    return np.where(d <= 1, ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)


LOWERINGS: Mapping[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": _same for name in ("clone", "alias", "detach", "contiguous", "lift_fresh_copy")},
    "aten._to_copy.default": _cast,
    "aten.type_as.default": _same,
    "aten.copy.default": _copy,
    "aten.dropout.default": _dropout,
    **{
        f"aten.{name}.default": functools.partial(_filled, value)
        for name, value in (("new_zeros", 0.0), ("new_ones", 1.0), ("zeros_like", 0.0), ("ones_like", 1.0))
    },
    "python.getitem": _item,
    "aten.sym_size.int": _size,
    "aten.view.default": view,
    "aten.reshape.default": view,
    "aten._unsafe_view.default": view,
    "aten.flatten.using_ints": _flatten,
    "aten.unflatten.int": _unflatten,
    "aten.permute.default": _permute,
    "aten.transpose.int": _transpose,
    "aten.swapaxes.default": _transpose,
    "aten.swapdims.default": _transpose,
    "aten.t.default": _t,
    "aten.movedim.int": _movedim,
    "aten.movedim.intlist": _movedim,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.expand.default": _expand,
    "aten.expand_as.default": _expand_as,
    "aten.slice.Tensor": _slice,
    "aten.narrow.default": _narrow,
    "aten.select.int": _select,
    "aten.unbind.int": _unbind,
    "aten.split.Tensor": _split,
    "aten.split.sizes": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _chunk,
    "aten.index_select.default": _index_select,
    "aten.index.Tensor": _index,
    "aten.roll.default": _roll,
    "aten.flip.default": _flip,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.unfold.default": _unfold,
    "aten.im2col.default": _im2col,
    "aten.cat.default": _cat,
    "aten.concat.default": _cat,
    "aten.stack.default": _stack,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _constant_pad,
    "aten.reflection_pad2d.default": _reflect,
    "aten.reflection_pad1d.default": _reflect,
    "aten.replication_pad2d.default": _replicate,
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_unshuffle,
    "aten.upsample_nearest2d.vec": _nearest,
    "aten.upsample_nearest2d.default": _nearest,
    "aten.upsample_bilinear2d.vec": _bilinear,
    "aten.upsample_bilinear2d.default": _bilinear,
    "aten.upsample_bicubic2d.vec": _bicubic,
    "aten.upsample_bicubic2d.default": _bicubic,
}
