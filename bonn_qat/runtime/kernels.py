"""Kernels: binary convolutions on a CPU, compiled by numba.

A binary product counts where signs differ: ``sum a_i w_i = n - 2 popcount(a xor w)``. Four channels are a nibble, and
how a nibble of activations differs from each of the 16 nibbles of weights is a row of 16 bytes. One byte shuffle looks
that row up for 32 filters at once, 128 products; the counts add up in bytes and leave them for 16 bits before they
overflow. A tile is four pixels by 64 filters, so that weights are read once for four pixels. What follows a convolution
until the next sign, its *epilogue*, is done on a tile while it is in the first cache.

Vectors are types of numba here, with the handful of operations that are needed; all else is plain loops. x86 has the
shuffle since SSSE3, ARM since NEON; elsewhere bytes are looked up one by one.
"""

import contextlib
import os
import platform
from collections.abc import Callable
from typing import Any, Final

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from bonn_qat.runtime.epilogue import ADD, CLAMP, FMA, PRELU, RESIDUAL, SCALE
from bonn_qat.runtime.layout import TILE

_LANES: Final = 32
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_BYTES, _ROW = ir.VectorType(_I8, _LANES), ir.VectorType(_I8, 16)
# By nibble of activations, with the padding's row of zeros, and of weights; as many rows as a byte can name.
_MISMATCHES = np.zeros((129, 16), np.uint8)
_MISMATCHES[:16] = [[(a ^ w).bit_count() for w in range(16)] for a in range(16)]
_NO_CACHE = bool(os.environ.get("BONN_QAT_NO_KERNEL_CACHE"))


def _shuffle() -> str:
    """The byte shuffle of this machine; "" where there is none."""
    if platform.machine() in ("aarch64", "arm64"):
        return "llvm.aarch64.neon.tbl1.v16i8"
    features = binding.get_host_cpu_features()
    if features.get("avx2"):
        return "llvm.x86.avx2.pshuf.b"
    return "llvm.x86.ssse3.pshuf.b.128" if features.get("ssse3") else ""


class _Vector(types.Type):
    """32 numbers that one operation takes; LLVM spreads them over the registers of the machine."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=f"{name}x{_LANES}")
        self.llvm = ir.VectorType(element, _LANES)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


_bytes, _floats = _Vector("uint8", _I8), _Vector("float32", _F32)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(builder: Any, pointer: Any, kind: Any, align: int = 1) -> Any:
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = align
    return value


@intrinsic
def _zeros(typingctx: Any) -> Any:
    """32 zeros."""
    return _bytes(), lambda context, builder, signature, args: ir.Constant(_BYTES, [0] * _LANES)


@intrinsic
def _octets(typingctx: Any, array: Any, start: Any) -> Any:
    """``array[start:start + 32]``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _pointer(context, builder, signature.args[0], *args), _BYTES)

    return _bytes(array, types.intp), generate


@intrinsic
def _low(typingctx: Any, octets: Any) -> Any:
    """The first nibble of each byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(args[0], ir.Constant(_BYTES, [15] * _LANES))

    return _bytes(_bytes), generate


@intrinsic
def _high(typingctx: Any, octets: Any) -> Any:
    """The second nibble of each byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], ir.Constant(_BYTES, [4] * _LANES))

    return _bytes(_bytes), generate


@intrinsic
def _row(typingctx: Any, table: Any, codes: Any, index: Any) -> Any:
    """The row of ``table`` that ``codes[index]`` names, twice; rows have 16 bytes, codes count halves of them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = builder.load(_pointer(context, builder, signature.args[1], *args[1:]))
        offset = builder.shl(builder.zext(code, _I64), ir.Constant(_I64, 3))
        row = _load(builder, _pointer(context, builder, signature.args[0], args[0], offset), _ROW)
        return builder.shuffle_vector(row, row, ir.Constant(ir.VectorType(_I32, _LANES), [*range(16), *range(16)]))

    return _bytes(table, codes, types.intp), generate


def _halves(builder: Any, vector: Any) -> list[Any]:
    masks = (ir.Constant(ir.VectorType(_I32, 16), [*range(start, start + 16)]) for start in (0, 16))
    return [builder.shuffle_vector(vector, vector, mask) for mask in masks]


def look_up(builder: Any, shuffle: str, row: Any, nibbles: Any) -> Any:
    """Emit ``row[nibbles]``, byte by byte, for the machine that has ``shuffle``."""
    if shuffle.startswith("llvm.x86.avx2"):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_BYTES, [_BYTES] * 2), shuffle)
        return builder.call(function, [row, nibbles])
    if shuffle:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_ROW, [_ROW] * 2), shuffle)
        pairs = zip(_halves(builder, row), _halves(builder, nibbles), strict=True)
        low, high = (builder.call(function, pair) for pair in pairs)
        return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, _LANES), [*range(_LANES)]))
    result = ir.Constant(_BYTES, [0] * _LANES)
    for lane in range(_LANES):
        at = builder.zext(builder.extract_element(nibbles, ir.Constant(_I32, lane)), _I32)
        result = builder.insert_element(result, builder.extract_element(row, at), ir.Constant(_I32, lane))
    return result


_SHUFFLE = _shuffle()


@intrinsic
def _add_row(typingctx: Any, counts: Any, row: Any, nibbles: Any) -> Any:
    """``counts + row[nibbles]``, byte by byte."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(args[0], look_up(builder, _SHUFFLE, *args[1:]))

    return _bytes(_bytes, _bytes, _bytes), generate


@intrinsic
def _widen(typingctx: Any, sums: Any, start: Any, counts: Any) -> Any:
    """``sums[start:start + 32] += counts``; sums of 16 bits."""
    wide = ir.VectorType(_I16, _LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        total = builder.add(_load(builder, pointer, wide, 2), builder.zext(args[2], wide))
        builder.store(total, builder.bitcast(pointer, wide.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.void(sums, types.intp, _bytes), generate


@intrinsic
def _products(typingctx: Any, inputs: Any, sums: Any, start: Any) -> Any:
    """``inputs - 2 sums[start:start + 32]`` as floats: the convolution's exact values."""
    whole = ir.VectorType(_I32, _LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        differing = _load(
            builder, _pointer(context, builder, signature.args[1], *args[1:]), ir.VectorType(_I16, _LANES), 2
        )
        twice = builder.shl(builder.zext(differing, whole), ir.Constant(whole, [1] * _LANES))
        return builder.sitofp(builder.sub(_splat(builder, args[0], whole), twice), _floats.llvm)

    return _floats(types.int32, sums, types.intp), generate


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, _LANES), [0] * _LANES))


@intrinsic
def _take(typingctx: Any, array: Any, start: Any) -> Any:
    """The floats ``array[start:start + 32]``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _pointer(context, builder, signature.args[0], *args), _floats.llvm, 4)

    return _floats(array, types.intp), generate


@intrinsic
def _take_every_second(typingctx: Any, array: Any, start: Any) -> Any:
    """The floats ``array[start:start + 64:2]``."""
    twice = ir.VectorType(_F32, 2 * _LANES)
    evens = ir.Constant(ir.VectorType(_I32, _LANES), [*range(0, 2 * _LANES, 2)])

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _load(builder, _pointer(context, builder, signature.args[0], *args), twice, 4)
        return builder.shuffle_vector(values, values, evens)

    return _floats(array, types.intp), generate


@intrinsic
def _put(typingctx: Any, array: Any, start: Any, values: Any) -> Any:
    """``array[start:start + 32] = values``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(pointer, _floats.llvm.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, _floats), generate


def _on_floats(emit: Callable[..., Any], count: int) -> Any:
    """An operation on ``count`` vectors of floats, from the function that emits it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit(builder, *args)

    result = _floats(*[_floats] * count)
    typed = {
        2: lambda typingctx, a, b: (result, generate),
        3: lambda typingctx, a, b, c: (result, generate),
    }
    return intrinsic(typed[count])


def _emit_prelu(builder: Any, x: Any, slope: Any) -> Any:
    above = builder.fcmp_ordered(">", x, ir.Constant(_floats.llvm, [0.0] * _LANES))
    return builder.select(above, x, builder.fmul(x, slope))


def _emit_larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger one; NaN if either is NaN."""
    larger = builder.select(builder.fcmp_ordered(">", a, b), a, b)
    return builder.select(builder.fcmp_unordered("uno", a, a), a, larger)


def _emit_clamp(builder: Any, x: Any, low: Any, high: Any) -> Any:
    raised = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    return builder.select(builder.fcmp_ordered(">", raised, high), high, raised)


def _emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    kind = ir.FunctionType(_floats.llvm, [_floats.llvm] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")
    return builder.call(function, (a, b, c))


_times = _on_floats(lambda builder, a, b: builder.fmul(a, b), 2)
_plus = _on_floats(lambda builder, a, b: builder.fadd(a, b), 2)
_larger = _on_floats(_emit_larger, 2)
_prelu = _on_floats(_emit_prelu, 2)
_clamp = _on_floats(_emit_clamp, 3)
# Rounded once, as torch's batch norm does it.
_fma = _on_floats(_emit_fma, 3)


@intrinsic
def _within(typingctx: Any, values: Any, low: Any, high: Any) -> Any:
    """The bits of ``low <= values <= high``, 32 of them; 0 for NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, low, high = args
        bits = builder.and_(builder.fcmp_ordered(">=", values, low), builder.fcmp_ordered("<=", values, high))
        return builder.zext(builder.bitcast(bits, _I32), _I64)

    return types.uint64(_floats, _floats, _floats), generate


@intrinsic
def _put_codes(typingctx: Any, codes: Any, start: Any, octets: Any) -> Any:
    """``codes[start:start + 8]`` are the bytes of an integer, the lowest first."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(pointer, _I64.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(codes, types.intp, types.uint64), generate


def _compiled(**options: Any) -> Any:
    """``numba.njit``, cached on disk where a folder can be written."""

    def compile_(function: Any) -> Any:
        try:
            made = numba.njit(nogil=True, cache=not _NO_CACHE, **options)(function)
        except RuntimeError:  # no folder for the cache
            return numba.njit(nogil=True, **options)(function)
        if not _NO_CACHE:
            _forgive(made._cache)
        return made

    return compile_


def _forgive(cache: Any) -> None:
    """A file of numba's cache that cannot be read, such as one that was cut off, is compiled and written again.

    The files are pickles: reading them runs what they hold, so whoever can write to the folder can run code here.
    """
    load, save = cache.load_overload, cache.save_overload

    def load_overload(*key: Any) -> Any:
        try:
            return load(*key)
        except Exception:  # whatever unpickling raises
            with contextlib.suppress(OSError):
                cache.flush()
            return None

    def save_overload(*key: Any) -> None:
        with contextlib.suppress(Exception):  # a full disk, or an index that can be neither read nor replaced
            save(*key)

    cache.load_overload, cache.save_overload = load_overload, save_overload


@numba.njit(inline="always")
def _spread(bits):
    """32 bits -> the eight codes of their nibbles, in the bytes of an integer."""
    bits = (bits | bits << np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    bits = (bits | bits << np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    return ((bits | bits << np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)) << np.uint64(1)


@numba.njit
def _sign_codes(values, start, thresholds, first, count, codes, at):
    """The codes of ``count`` channels of a pixel, from ``values[start:]`` to ``codes[at:]``."""
    channel, high = 0, first + thresholds.size // 2
    while channel + 32 <= count:
        low = _take(thresholds, first + channel)
        bits = _within(_take(values, start + channel), low, _take(thresholds, high + channel))
        _put_codes(codes, at + channel // 4, _spread(bits))
        channel += 32
    while channel < count:
        for half in range(2):
            code = 0
            for i in range(4):
                c = channel + 4 * half + i
                if c < count and thresholds[first + c] <= values[start + c] <= thresholds[high + c]:
                    code += 2 << i
            codes[at + channel // 4 + half] = code
        channel += 8


@_compiled()
def sign_rows(x, thresholds, shape, codes, begin, end):
    """Rows of images ``(B, H, W, C)`` to codes; shape: (H, W, groups, width, code height, code width, top, left).

    ``thresholds`` are the low ones of all channels, and then the high ones.
    """
    height, columns, groups, width, code_height, code_width, top, left = shape
    all_channels = thresholds.size // 2
    channels = all_channels // groups
    for row in range(begin, end):
        image, y = divmod(row, height)
        at = ((image * code_height + top + y) * code_width + left) * groups * width
        for pixel in range(row * columns, (row + 1) * columns):
            for group in range(groups):
                first = group * channels
                _sign_codes(x, pixel * all_channels + first, thresholds, first, channels, codes, at)
                at += width


@numba.njit
def _count_wide(codes, at, low, high, first, second):
    row = _row(_MISMATCHES, codes, at)
    return _add_row(first, row, low), _add_row(second, row, high)


@numba.njit
def _wide_tile(codes, base, weight, w, starts, lengths, ends, sums):
    """Add the counts of four pixels by 64 filters to ``sums``."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = _zeros()
    for run in range(starts.size):
        a, b, c, d = base[0] + starts[run], base[1] + starts[run], base[2] + starts[run], base[3] + starts[run]
        for k in range(0, lengths[run], 2):
            first, second = _octets(weight, w), _octets(weight, w + 32)
            w += 64
            low, high = _low(first), _low(second)
            a0, a1 = _count_wide(codes, a + k, low, high, a0, a1)
            b0, b1 = _count_wide(codes, b + k, low, high, b0, b1)
            c0, c1 = _count_wide(codes, c + k, low, high, c0, c1)
            d0, d1 = _count_wide(codes, d + k, low, high, d0, d1)
            low, high = _high(first), _high(second)
            a0, a1 = _count_wide(codes, a + k + 1, low, high, a0, a1)
            b0, b1 = _count_wide(codes, b + k + 1, low, high, b0, b1)
            c0, c1 = _count_wide(codes, c + k + 1, low, high, c0, c1)
            d0, d1 = _count_wide(codes, d + k + 1, low, high, d0, d1)
        if ends[run]:
            _widen(sums, 0, a0)
            _widen(sums, 32, a1)
            _widen(sums, 64, b0)
            _widen(sums, 96, b1)
            _widen(sums, 128, c0)
            _widen(sums, 160, c1)
            _widen(sums, 192, d0)
            _widen(sums, 224, d1)
            a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = _zeros()


@numba.njit
def _count(codes, at, nibbles, counts):
    return _add_row(counts, _row(_MISMATCHES, codes, at), nibbles)


@numba.njit
def _narrow_tile(codes, base, weight, w, starts, lengths, ends, sums):
    """Add the counts of four pixels by 32 filters to ``sums``."""
    a = b = c = d = _zeros()
    for run in range(starts.size):
        for k in range(starts[run], starts[run] + lengths[run], 2):
            pair = _octets(weight, w)
            w += 32
            low, high = _low(pair), _high(pair)
            a = _count(codes, base[0] + k + 1, high, _count(codes, base[0] + k, low, a))
            b = _count(codes, base[1] + k + 1, high, _count(codes, base[1] + k, low, b))
            c = _count(codes, base[2] + k + 1, high, _count(codes, base[2] + k, low, c))
            d = _count(codes, base[3] + k + 1, high, _count(codes, base[3] + k, low, d))
        if ends[run]:
            _widen(sums, 0, a)
            _widen(sums, 32, b)
            _widen(sums, 64, c)
            _widen(sums, 96, d)
            a = b = c = d = _zeros()


@numba.njit
def _epilogue(values, program, vectors, first, residual, beside):
    """Do ``program``, rows of (operation, row of ``vectors``), with 32 filters of one pixel."""
    for step in range(program.shape[0]):
        operation, at = program[step, 0], program[step, 1] * vectors.shape[1] + first
        if operation == SCALE:
            values = _times(values, _take(vectors, at))
        elif operation == ADD:
            values = _plus(values, _take(vectors, at))
        elif operation == FMA:
            values = _fma(values, _take(vectors, at), _take(vectors, at + vectors.shape[1]))
        elif operation == RESIDUAL:
            values = _plus(values, _take(residual, beside))
        elif operation == PRELU:
            values = _prelu(values, _take(vectors, at))
        elif operation == CLAMP:
            values = _clamp(values, _take(vectors, at), _take(vectors, at + vectors.shape[1]))
    return values


@_compiled()
def convolve_items(
    codes, weight, offsets, shape, program, vectors, residual, out, thresholds, following, places, begin, end
):
    """Some of the items ``image x group x block of filters x piece of the tiles``.

    shape: (filters of a group, pixels, codes of an image, groups, width, weight bytes of a group, blocks, pieces, codes
    that follow for an image). ``vectors`` and ``thresholds``, the low ones and then the high ones, have a number for
    each filter of each block. ``residual``, ``out`` and ``following`` are empty where there is none.
    """
    bases, valid, starts, lengths, ends = offsets
    filters, pixels, image_codes, groups, width, group_bytes, blocks, pieces, image_following = shape
    filled, tiles = vectors.shape[1] // groups, bases.size // TILE
    bytes_of_filter = group_bytes // filled
    base, sums = np.empty(TILE, np.int64), np.empty(256, np.uint16)
    some, other = np.empty(32, np.float32), np.empty(32, np.float32)
    for item in range(begin, end):
        rest, piece = divmod(item, pieces)
        rest, block = divmod(rest, blocks)
        image, group = divmod(rest, groups)
        is_wide = filled - 64 * block > 32
        pitch = 64 if is_wide else 32
        w = group * group_bytes + 64 * block * bytes_of_filter
        for tile in range(tiles * piece // pieces, tiles * (piece + 1) // pieces):
            sums[:] = 0
            for i in range(TILE):
                base[i] = bases[TILE * tile + i] + image * image_codes + group * width
            if is_wide:
                _wide_tile(codes, base, weight, w, starts, lengths, ends, sums)
            else:
                _narrow_tile(codes, base, weight, w, starts, lengths, ends, sums)
            for i in range(min(TILE, pixels - TILE * tile)):
                pixel = TILE * tile + i
                for half in range(0, pitch, 32):
                    filter_ = 64 * block + half
                    count, first = min(32, filters - filter_), group * filled + filter_
                    if count <= 0:
                        break
                    at = ((image * pixels + pixel) * groups + group) * filters + filter_
                    values = _products(valid[pixel], sums, i * pitch + half)
                    if count == 32 or residual.size == 0:
                        values = _epilogue(values, program, vectors, first, residual, at)
                    else:
                        for f in range(count):
                            some[f] = residual[at + f]
                        values = _epilogue(values, program, vectors, first, some, 0)
                    if out.size:
                        if count == 32:
                            _put(out, at, values)
                        else:
                            _put(other, 0, values)
                            for f in range(count):
                                out[at + f] = other[f]
                    if following.size:
                        bits = _within(values, _take(thresholds, first), _take(thresholds, groups * filled + first))
                        place = image * image_following + places[pixel] + (group * filters + filter_) // 4
                        if count == 32:
                            _put_codes(following, place, _spread(bits))
                        else:
                            codes_of_rest = _spread(bits & np.uint64((1 << count) - 1))
                            for f in range((count + 7) // 8 * 2):
                                following[place + f] = np.uint8(codes_of_rest >> np.uint64(8 * f))


@_compiled()
def elementwise_pixels(x, channels, program, vectors, residual, out, begin, end):
    """An epilogue of its own, for pixels of ``channels``; ``vectors`` have room for whole vectors of 32."""
    some, other = np.empty(32, np.float32), np.empty(32, np.float32)
    for pixel in range(begin, end):
        for first in range(0, channels, 32):
            at, count = pixel * channels + first, min(32, channels - first)
            if count == 32:
                _put(out, at, _epilogue(_take(x, at), program, vectors, first, residual, at))
            else:
                for c in range(count):
                    some[c] = x[at + c]
                    other[c] = residual[at + c] if residual.size else 0
                _put(some, 0, _epilogue(_take(some, 0), program, vectors, first, other, 0))
                for c in range(count):
                    out[at + c] = some[c]


@_compiled(parallel=True)
def convolve_in_threads(
    codes, weight, offsets, shape, program, vectors, residual, out, thresholds, following, places, items, threads
):
    """As :func:`convolve_items`, in parallel."""
    for thread in numba.prange(threads):
        convolve_items(
            codes, weight, offsets, shape, program, vectors, residual, out, thresholds, following, places,
            items * thread // threads, items * (thread + 1) // threads,
        )  # fmt: skip


@_compiled(parallel=True)
def sign_in_threads(x, thresholds, shape, codes, items, threads):
    """As :func:`sign_rows`, in parallel."""
    for thread in numba.prange(threads):
        sign_rows(x, thresholds, shape, codes, items * thread // threads, items * (thread + 1) // threads)


@_compiled(parallel=True)
def elementwise_in_threads(x, channels, program, vectors, residual, out, items, threads):
    """As :func:`elementwise_pixels`, in parallel."""
    for thread in numba.prange(threads):
        elementwise_pixels(
            x, channels, program, vectors, residual, out, items * thread // threads, items * (thread + 1) // threads
        )


@_compiled()
def max_pool_rows(x, shape, out, begin, end):
    """Maxima of planes ``(B, C, H, W)``, for rows of 32 channels: (image, row that comes out, block of channels).

    shape: (C, H, W, rows and columns that come out, kernel, stride, padding at the top and left), ``out`` is
    channels_last.
    """
    channels, height, width, rows, columns, kh, kw, sh, sw, top, left = shape
    blocks = (channels + 31) // 32
    # A row of maxima with nothing around it, and room for whole vectors.
    highest = np.full(max(columns * sw + kw, left + width) + 96, -np.inf, np.float32)
    line, square = np.empty(columns + 32, np.float32), np.empty(columns * 32, np.float32)
    for item in range(begin, end):
        rest, block = divmod(item, blocks)
        image, row = divmod(rest, rows)
        first, last = max(0, row * sh - top), min(height, row * sh - top + kh)
        count = min(32, channels - 32 * block)
        for c in range(count):
            plane = (image * channels + 32 * block + c) * height * width
            _highest_of_rows(x, plane + first * width, last - first, width, highest, left)
            _highest_of_columns(highest, columns, kw, sw, line)
            for column in range(columns):
                square[column * 32 + c] = line[column]
        for column in range(columns):
            at = ((image * rows + row) * columns + column) * channels + 32 * block
            if count == 32:
                _put(out, at, _take(square, column * 32))
            else:
                for c in range(count):
                    out[at + c] = square[column * 32 + c]


@numba.njit
def _highest_of_rows(x, at, count, width, highest, left):
    if width < 32:
        for i in range(width):
            value = x[at + i]
            for row in range(1, count):
                other = x[at + row * width + i]
                value = other if other > value or other != other else value  # NaN stays
            highest[left + i] = value
        return
    for start in range(0, width, 32):
        i = min(start, width - 32)  # the last vector overlaps the one before
        values = _take(x, at + i)
        for row in range(1, count):
            values = _larger(values, _take(x, at + row * width + i))
        _put(highest, left + i, values)


@numba.njit
def _highest_of_columns(highest, columns, kw, stride, line):
    if stride > 2:
        for column in range(columns):
            value = highest[column * stride]
            for k in range(1, kw):
                other = highest[column * stride + k]
                value = other if other > value or other != other else value  # NaN stays
            line[column] = value
        return
    for column in range(0, columns, 32):
        values = _take(highest, column) if stride == 1 else _take_every_second(highest, 2 * column)
        for k in range(1, kw):
            at = stride * column + k
            values = _larger(values, _take(highest, at) if stride == 1 else _take_every_second(highest, at))
        _put(line, column, values)


@_compiled(parallel=True)
def max_pool_in_threads(x, shape, out, items, threads):
    """As :func:`max_pool_rows`, in parallel."""
    for thread in numba.prange(threads):
        max_pool_rows(x, shape, out, items * thread // threads, items * (thread + 1) // threads)
