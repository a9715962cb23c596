"""Operators: ``torch.ops.bonn_qat_engine``, the kernels of ``kernels.c`` for torch, also under ``torch.compile``.

Maps ``(B, C, H, W)`` are on the CPU, in float32 or bfloat16, and in ``torch.channels_last``; what has a number for each
channel is float32 ``(C,)``. Signs are ``(B, H, W, ceil(C / 32))`` words, int32. :func:`takes` says for which maps they
are there. Sizes that do not fit raise RuntimeError.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from bonn_qat.engine import library

_LANES = 16
library.keep_freed_memory()
_ROW = 64  # pixels
_REACH = 1000  # columns, of kernels that there are tables for: offsets have 16 bits
_PARALLEL = 2**15  # elements of a map from which a second thread pays
_KERNELS = library.load()
AVAILABLE = _KERNELS is not None
_BY_TABLES = frozenset() if _KERNELS is None or _KERNELS.tables is None else _KERNELS.tables.faster_for
_IS_AVX512 = _KERNELS is not None and _KERNELS.variant == "v4"
_LIBRARY: Any = torch.library.Library("bonn_qat_engine", "DEF")  # type: ignore[no-untyped-call]


def is_traced() -> bool:
    """Whether the call is recorded as a graph that must consist of torch's own operations: a trace, an export."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def takes(x: Tensor) -> bool:
    """Whether there are kernels for ``x``.

    >>> takes(torch.ones(2, 8, 4, 4, dtype=torch.float64))
    False
    """
    if not (AVAILABLE and isinstance(x, Tensor)) or is_traced():  # torch.fx traces with proxies
        return False
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.ndim == 4


def layout(x: Tensor) -> torch.memory_format:
    """The layout that torch's convolutions give their outputs for x ``(B, C, H, W)``.

    >>> layout(torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last))
    torch.channels_last
    """
    _, channels, height, width = x.shape
    image, channel, row, pixel = x.stride()
    is_last = channel > 0 and channel * channels <= pixel and pixel * width <= row and row * height <= image
    return torch.channels_last if is_last else torch.contiguous_format


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register the decorated function as an operator, and return that."""

    def register(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        # What a compiler hands over has the strides of the tensors that it traced.
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        _LIBRARY.impl(name, function, "CPU")
        torch.library.register_fake(f"bonn_qat_engine::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.bonn_qat_engine, name)

    return register


def _map(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((batch, channels, height, width), dtype=dtype, memory_format=torch.channels_last)


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= _PARALLEL else 1


def _kernels() -> library.Library:
    kernels = library.load()
    assert kernels is not None
    return kernels


def _pointers(name: str, tensor: Tensor, keys: Sequence[str], count: int) -> dict[str, int]:
    """Where each row of a tensor ``(len(keys), count)`` begins."""
    if not (tensor.is_contiguous() and tensor.numel() == len(keys) * count and tensor.dtype == torch.float32):
        wanted = f"{len(keys)} x {count} numbers ({', '.join(keys)})"
        raise RuntimeError(f"{name}: a tensor {tensor.dtype} {tuple(tensor.shape)} for {wanted}")
    start = tensor.data_ptr()
    return {key: start + 4 * count * row for row, key in enumerate(keys)}


def _norm(name: str, norm: Tensor, x: Tensor) -> dict[str, int]:
    return _pointers(name, norm, ("alpha", "beta", "threshold", "mean", "factor"), x.shape[1])


def _run(name: str, like: Tensor, maps: Mapping[str, Tensor | None], **values: Any) -> None:
    """Run a pass over maps of the shape of ``like``; None is a map that the pass does without."""
    batch, channels, height, width = like.shape
    for key, map_ in maps.items():
        if map_ is None:
            continue
        good = map_.shape == like.shape and map_.dtype == like.dtype
        if not (good and map_.is_contiguous(memory_format=torch.channels_last)):
            raise RuntimeError(f"{name}: {key} is {map_.dtype} {tuple(map_.shape)}; the map {tuple(like.shape)}")
        values[key] = map_.data_ptr()
    half = like.dtype == torch.bfloat16
    task = library.Task(pixels=batch * height * width, channels=channels, half=half, **values)
    getattr(_kernels(), name)(task, _threads(like.numel()))


def _totals(name: str, like: Tensor, count: int, maps: Mapping[str, Tensor | None], **values: Any) -> Tensor:
    """Run a pass; returns its first ``count`` sums over all pixels, ``(count, C)``."""
    totals = torch.empty(library.SUMS, like.shape[1])
    sums = torch.empty(_threads(like.numel()), *totals.shape, dtype=torch.float64)
    _run(name, like, maps, totals=totals.data_ptr(), sums=sums.data_ptr(), **values)
    return totals[:count]


def _no_totals(count: int, x: Tensor) -> Tensor:
    return x.new_empty((count, x.shape[1]), dtype=torch.float32)


def _no_words(x: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, -(-channels // 32)), dtype=torch.int32)


@_operator("moments(Tensor x) -> Tensor", functools.partial(_no_totals, 2))
def moments(x: Tensor) -> Tensor:
    """The mean and the biased variance of each channel, ``(2, C)``."""
    return _totals("moments", x, 2, {"a": x})


@_operator("signs(Tensor x, Tensor norm) -> Tensor", _no_words)
def signs(x: Tensor, norm: Tensor) -> Tensor:
    """The words of ``alpha x + beta >= threshold``, where the left side is rounded once.

    ``norm`` ``(5, C)`` is alpha, beta, threshold, mean and 1 / std, here and below.
    """
    words = _no_words(x)
    _run("signs", x, {"a": x}, words=words.data_ptr(), **_norm("signs", norm, x))
    return words


def _no_map(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    batch, height, width, _ = words.shape
    return _map(batch, channels, height, width, dtype)


@_operator("spread(Tensor words, int channels, ScalarType dtype) -> Tensor", _no_map)
def spread(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Words as a map of -1 and +1."""
    if not (words.shape[3] == -(-channels // 32) and words.is_contiguous() and words.dtype == torch.int32):
        raise RuntimeError(f"spread: words are {words.dtype} {tuple(words.shape)}, for {channels} channels")
    out = _no_map(words, channels, dtype)
    _run("spread", out, {"out": out}, words=words.data_ptr())
    return out


class _Part(NamedTuple):
    """Images that a kernel of a convolution takes at a time, from pixel ``first`` on."""

    first: int
    batch: int
    image: Sequence[int]
    size: Sequence[int]  # of the output

    def pointer(self, map_: Tensor | None, pixels: int) -> int | None:
        """Where the part begins in a map of ``pixels``, or in their words."""
        return None if map_ is None else map_.data_ptr() + map_.nbytes // pixels * self.first


def _parts(batch: int, image: Sequence[int], size: Sequence[int], kernel: Sequence[int],
           stride: Sequence[int], padding: Sequence[int]) -> list[_Part]:  # fmt: skip
    """All images at once; for a matrix product rows of ``_ROW`` pixels, which share loads of weights, and the rest."""
    if (*kernel, *stride, *padding, *image) != (1, 1, 1, 1, 0, 0, *size):
        return [_Part(0, batch, image, size)]
    rows, rest = divmod(batch * math.prod(image), _ROW)
    parts = [(0, rows, _ROW), (rows * _ROW, 1, rest)]
    return [_Part(first, count, (1, width), (1, width)) for first, count, width in parts if count * width]


def _no_products(
    words: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, addend: Tensor | None, channels: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], size: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _map(words.shape[0], scale.shape[0], size[0], size[1], dtype)


@_operator(
    "convolve(Tensor words, Tensor weight, Tensor scale, Tensor? bias, Tensor? addend, int channels, int[] stride, "
    "int[] padding, int[] dilation, int[] size, ScalarType dtype) -> Tensor",
    _no_products,
)
def convolve(
    words: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, addend: Tensor | None, channels: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], size: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The convolution of signs, times ``scale`` ``(O,)``, plus ``bias`` ``(O,)``, plus ``addend``, a map like it.

    ``weight`` is that of :func:`kernel_words`, ``padding`` that above and on the left, ``size`` that of the output.
    """
    batch, height, width, count = words.shape
    blocks, rows, columns, weight_words, _ = weight.shape
    outputs = scale.shape[0]
    out = _no_products(words, weight, scale, bias, addend, channels, stride, padding, dilation, size, dtype)
    fits = count == weight_words == -(-channels // 32) and blocks == -(-outputs // _LANES)
    fits = fits and scale.is_contiguous() and scale.dtype == torch.float32
    fits = fits and words.is_contiguous() and weight.is_contiguous() and words.dtype == weight.dtype == torch.int32
    fits = fits and (
        bias is None or (bias.shape == scale.shape and bias.dtype == torch.float32 and bias.is_contiguous())
    )
    if addend is not None:
        fits = fits and addend.shape == out.shape and addend.dtype == dtype
        fits = fits and addend.is_contiguous(memory_format=torch.channels_last)
    if not fits:
        raise RuntimeError(f"convolve: words {tuple(words.shape)}, weight {tuple(weight.shape)}, {channels} channels")
    pixels = out.numel() // outputs
    for part in _parts(batch, (height, width), size, (rows, columns), stride, padding):
        task = library.Convolution(
            x=part.pointer(words, pixels), w=weight.data_ptr(), scale=scale.data_ptr(), out=part.pointer(out, pixels),
            bias=None if bias is None else bias.data_ptr(), addend=part.pointer(addend, pixels), batch=part.batch,
            height=part.image[0], width=part.image[1], words=count, channels=channels, out_height=part.size[0],
            out_width=part.size[1], outputs=outputs, rows=rows, columns=columns, stride=tuple(stride),
            padding=tuple(padding), dilation=tuple(dilation), half=dtype == torch.bfloat16,
        )  # fmt: skip
        _kernels().convolve(task, _threads(out.numel() * channels // 16))
    return out


def _no_kernel_words(value: Tensor) -> Tensor:
    outputs, channels, rows, columns = value.shape
    return value.new_empty((-(-outputs // _LANES), rows, columns, -(-channels // 32), _LANES), dtype=torch.int32)


@_operator("kernel_words(Tensor value) -> Tensor", _no_kernel_words)
def kernel_words(value: Tensor) -> Tensor:
    """The signs of kernels ``(O, I, kh, kw)`` as :func:`convolve` reads them: ``(ceil(O / 16), kh, kw, words, 16)``."""
    words = _no_kernel_words(value).zero_()
    value = value.contiguous(memory_format=torch.channels_last)
    _run("kernel_words", value, {"a": value}, words=words.data_ptr(), taps=value.shape[2] * value.shape[3])
    return words


def kernel_signs(words: Tensor, outputs: int, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`kernel_words`: signs ``(O, I, kh, kw)``."""
    rows = words.permute(0, 4, 1, 2, 3).flatten(0, 1)[:outputs].contiguous()
    return cast(Tensor, spread(rows, channels, dtype))


def has_tables(dtype: torch.dtype, kernel: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether tables are faster than torch's operations for the gradients of a convolution by such a kernel.

    A table serves all taps; with AVX-512, torch's matrix products in bfloat16 are faster than tables for one.
    """
    is_faster = dtype == torch.float32 or math.prod(kernel) > 1 or not _IS_AVX512
    return dtype in _BY_TABLES and is_faster and (kernel[1] - 1) * dilation[1] <= _REACH


class _LookUp:
    """What both gradients of a convolution need: its sizes, its parts, and the threads for each of them."""

    def __init__(
        self, grad: Tensor, channels: int, image: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int],
    ) -> None:  # fmt: skip
        batch, outputs, out_height, out_width = grad.shape
        self.grad, self.image, self.kernel = grad, image, kernel
        self.channels, self.words = channels, -(-channels // 32)
        self.places = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
        self.parts = _parts(batch, image, (out_height, out_width), kernel, stride, padding)
        self.pixels, self.threads = grad.numel() // outputs, _threads(grad.numel() * channels // 16)

    def check(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError for a tensor that does not fit."""
        grad, (batch, outputs) = self.grad, self.grad.shape[:2]
        wanted = {
            "x": ((batch, *self.image, self.words), torch.int32), "scale": ((outputs,), torch.float32),
            "w": ((-(-outputs // _LANES), *self.kernel, self.words, _LANES), torch.int32),
        }  # fmt: skip
        fits = grad.is_contiguous(memory_format=torch.channels_last) and grad.dtype in (torch.float32, torch.bfloat16)
        for key, tensor in tensors.items():
            if not (fits and (tensor.shape, tensor.dtype) == wanted[key] and tensor.is_contiguous()):
                raise RuntimeError(
                    f"{name}: {key} is {tensor.dtype} {tuple(tensor.shape)}; the gradient {grad.dtype} "
                    f"{tuple(grad.shape)}, of {self.channels} channels of {tuple(self.image)}"
                )

    def run(self, name: str, part: _Part, **arguments: Any) -> None:
        """Run a kernel of :class:`library.Tables` on a part."""
        tables = _kernels().tables
        assert tables is not None
        task = library.Gradients(
            grad=part.pointer(self.grad, self.pixels), batch=part.batch, height=part.image[0], width=part.image[1],
            words=self.words, channels=self.channels, out_height=part.size[0], out_width=part.size[1],
            outputs=self.grad.shape[1], rows=self.kernel[0], columns=self.kernel[1],
            half=self.grad.dtype == torch.bfloat16, **self.places, **arguments,
        )  # fmt: skip
        size = tables.scratch_size(task)
        scratch = torch.empty(self.threads * size, dtype=torch.uint8)  # where torch allocates, a cache line begins
        task.scratch_size, task.scratch = size, scratch.data_ptr()
        getattr(tables, name)(task, self.threads)


@_operator(
    "input_gradient(Tensor grad, Tensor weight, Tensor scale, Tensor x, Tensor norm, int[] stride, int[] padding, "
    "int[] dilation, float clip, bool parabola, bool statistics) -> (Tensor, Tensor)",
    lambda grad, weight, scale, x, *_: (torch.empty_like(x), _no_totals(2, x)),
)
def input_gradient(
    grad: Tensor, weight: Tensor, scale: Tensor, x: Tensor, norm: Tensor, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], clip: float, parabola: bool, statistics: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient ``grad`` of :func:`convolve`'s output becomes that of its signs, and goes on as in :func:`gradient`.

    The second part is rounded less often than there.
    """
    fits = x.is_contiguous(memory_format=torch.channels_last) and x.dtype in (torch.float32, torch.bfloat16)
    if not fits or x.shape[0] != grad.shape[0]:
        raise RuntimeError(f"input_gradient: x is {x.dtype} {tuple(x.shape)}; the gradient {tuple(grad.shape)}")
    channels = x.shape[1]
    look_up = _LookUp(grad, channels, x.shape[2:], weight.shape[1:3], stride, padding, dilation)
    look_up.check("input_gradient", {"w": weight, "scale": scale})
    out, pixels, pointers = torch.empty_like(x), x.numel() // channels, _norm("input_gradient", norm, x)
    totals = torch.empty(library.SUMS, channels)
    sums = torch.zeros(look_up.threads, *totals.shape, dtype=torch.float64)
    for part in look_up.parts:
        signs = library.Task(
            a=part.pointer(x, pixels), channels=channels, sums=sums.data_ptr(), totals=totals.data_ptr(), clip=clip,
            parabola=parabola, **pointers,
        )  # fmt: skip
        look_up.run(
            "input_gradient", part, w=weight.data_ptr(), scale=scale.data_ptr(), signs=ctypes.pointer(signs),
            out=part.pointer(out, pixels), out_half=x.dtype == torch.bfloat16, scaled=not statistics,
        )  # fmt: skip
    if statistics:  # the estimator has been applied
        maps = {"a": x, "c": out, "out": out}
        _run("gradient", x, maps, totals=totals.data_ptr(), clip=math.inf, parabola=False, **pointers)
    return out, totals[:2]


def _no_weights(grad: Tensor, words: Tensor, channels: int, kernel: Sequence[int], *_: Any) -> Tensor:
    return _map(grad.shape[1], channels, kernel[0], kernel[1], torch.float32)


@_operator(
    "weight_gradient(Tensor grad, Tensor words, int channels, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation) -> Tensor",
    _no_weights,
)
def weight_gradient(
    grad: Tensor, words: Tensor, channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The gradient ``grad`` of :func:`convolve`'s output becomes that of its weights ``(O, C, *kernel)``."""
    outputs, image = grad.shape[1], words.shape[1:3]
    look_up = _LookUp(grad, channels, image, kernel, stride, padding, dilation)
    look_up.check("weight_gradient", {"x": words})
    size = (outputs + -outputs % library.STRIP, *kernel, channels + -channels % _LANES)
    sums = [torch.empty(size) for _ in look_up.parts]
    for part, sum_ in zip(look_up.parts, sums, strict=True):
        look_up.run(
            "weight_gradient", part, x=part.pointer(words, words.numel() // words.shape[-1]), sums=sum_.data_ptr()
        )
    total: Tensor = functools.reduce(torch.add, sums)[:outputs, ..., :channels]
    return total.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


@_operator(
    "gradient(Tensor grad, Tensor x, Tensor norm, float clip, bool parabola, bool statistics) -> (Tensor, Tensor)",
    lambda grad, x, *_: (torch.empty_like(x), _no_totals(2, x)),
)
def gradient(
    grad: Tensor, x: Tensor, norm: Tensor, clip: float, parabola: bool, statistics: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of a sign through its estimator and the norm before it, to x.

    With u = ``alpha x + beta - threshold``, the estimator passes ``grad [|u| < clip]``, or ``grad max(0, 2 - 2|u|)`` if
    it is a ``parabola``. ``statistics`` says that the norm's were those of x. Also returns the sums over all pixels of
    what the estimator passes, and of its product with ``x - mean``: ``(2, C)``.
    """
    out, pointers = torch.empty_like(x), _norm("gradient", norm, x)
    if not statistics:
        del pointers["factor"]
    maps = {"a": x, "c": grad, "out": out}
    return out, _totals("gradient", x, 2, maps, clip=clip, parabola=parabola, **pointers)


@_operator("affine(Tensor x, Tensor norm, Tensor? addend) -> Tensor", lambda x, norm, addend: torch.empty_like(x))
def affine(x: Tensor, norm: Tensor, addend: Tensor | None) -> Tensor:
    """``alpha x + beta``, plus ``addend``, a map like x."""
    out = torch.empty_like(x)
    _run("affine", x, {"a": x, "c": addend, "out": out}, **_norm("affine", norm, x))
    return out


def _vectors(name: str, vectors: Tensor, x: Tensor) -> dict[str, int]:
    return _pointers(name, vectors, ("alpha", "threshold", "beta")[: vectors.shape[0]], x.shape[1])


@_operator("prelu(Tensor x, Tensor vectors) -> Tensor", lambda x, vectors: torch.empty_like(x))
def prelu(x: Tensor, vectors: Tensor) -> Tensor:
    """``PReLU(x - before) + after``; ``vectors`` is the slope ``(1, C)``, or slope, before and after ``(3, C)``."""
    out = torch.empty_like(x)
    _run("prelu", x, {"a": x, "out": out}, **_vectors("prelu", vectors, x))
    return out


@_operator(
    "prelu_gradient(Tensor grad, Tensor x, Tensor vectors) -> (Tensor, Tensor)",
    lambda grad, x, vectors: (torch.empty_like(x), _no_totals(3, x)),
)
def prelu_gradient(grad: Tensor, x: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of :func:`prelu`'s output becomes those of x, and of slope, -before and after ``(3, C)``."""
    out, maps = torch.empty_like(x), {"a": x, "c": grad}
    return out, _totals("prelu_gradient", x, 3, maps | {"out": out}, **_vectors("prelu_gradient", vectors, x))


def takes_filters(latent: Tensor, modulation: Tensor) -> bool:
    """Whether there are kernels for latents ``(O, ...)`` of which all filters share a modulation ``(1, ...)``."""
    if not AVAILABLE or torch.compiler.is_compiling():  # a compiler makes one pass of torch's own operations
        return False
    is_plain = type(latent) in (Tensor, torch.nn.Parameter) and latent.device.type == "cpu"
    is_single = latent.dtype == modulation.dtype == torch.float32
    return is_plain and is_single and latent.ndim == modulation.ndim > 1 and modulation.shape[0] == 1


@_operator(
    "latent_gradient(Tensor grad, Tensor latent, Tensor modulation) -> (Tensor, Tensor)",
    lambda grad, latent, modulation: (torch.empty_like(latent), torch.empty_like(modulation)),
)
def latent_gradient(grad: Tensor, latent: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of latents X ``(O, N)`` and modulation w ``(N,)`` by BONN's (12) and (15), from that of X^."""
    out, rows = torch.empty_like(latent), _filters(latent)
    maps, pointers = {"a": rows, "c": _filters(grad), "out": _filters(out)}, _modulation(modulation, rows)
    return out, _totals("latent_gradient", rows, 1, maps, **pointers)[0]


@_operator(
    "kernel_sums(Tensor latent, Tensor modulation, Tensor scale, Tensor mu) -> Tensor",
    lambda latent, modulation, scale, mu: latent.new_empty((len(latent), 3), dtype=torch.float64),
)
def kernel_sums(latent: Tensor, modulation: Tensor, scale: Tensor, mu: Tensor) -> Tensor:
    """Of each filter the sums of ``(w |X| - scale)^2``, ``|X| - mu`` and its square; ``(O, 3)`` in double.

    Latents ``(O, N)``, modulation w ``(N,)``, scale and mu ``(O,)``.
    """
    totals, rows = latent.new_empty((len(latent), 3), dtype=torch.float64), _filters(latent)
    filters = _of_filters("kernel_sums", rows, threshold=scale, mean=mu)
    _run("kernel_sums", rows, {"a": rows}, sums=totals.data_ptr(), **filters, **_modulation(modulation, rows))
    return totals


@_operator(
    "kernel_gradient(Tensor grad, Tensor latent, Tensor modulation, Tensor scale, Tensor mu, Tensor factor) "
    "-> (Tensor, Tensor)",
    lambda grad, latent, modulation, *_: (torch.empty_like(latent), torch.empty_like(modulation)),
)
def kernel_gradient(
    grad: Tensor, latent: Tensor, modulation: Tensor, scale: Tensor, mu: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of latents and modulation in BONN's kernel loss, (13) and (16), times ``grad`` ``()``.

    ``factor`` ``(O,)`` is ``nu / sigma^2``; the rest as for :func:`kernel_sums`.
    """
    out, rows, times = torch.empty_like(latent), _filters(latent), float(grad)
    filters = _of_filters("kernel_gradient", rows, threshold=scale, mean=mu, factor=factor)
    maps, pointers = {"a": rows, "out": _filters(out)}, _modulation(modulation, rows)
    return out, _totals("kernel_gradient", rows, 1, maps, clip=times, **filters, **pointers)[0] * times


def _modulation(modulation: Tensor, rows: Tensor) -> dict[str, int]:
    return _pointers("modulation", modulation, ("alpha",), rows.shape[1])


def _of_filters(name: str, rows: Tensor, **vectors: Tensor) -> dict[str, int]:
    return {key: _pointers(name, vector, (key,), rows.shape[0])[key] for key, vector in vectors.items()}


def _filters(rows: Tensor) -> Tensor:
    return rows.reshape(*rows.shape, 1, 1)
