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


def _run(
    name: str,
    like: Tensor,
    tensors: Mapping[str, Tensor | None],
    *,
    sums: int = 0,
    of_pixels: Sequence[str] = (),
    into: Tensor | None = None,
    **values: Any,
) -> list[Tensor]:
    """Run a pass over maps of the shape of ``like``; returns ``sums`` of its sums over pixels, in double.

    Tensors that are not maps have a number for each channel, but those ``of_pixels`` for each pixel; None is one that
    the pass does without. ``into`` gets the sums of a pass whose sums are not over pixels.
    """
    batch, channels, height, width = like.shape
    pixels, threads = batch * height * width, _threads(like.numel())
    partial = torch.zeros(threads, library.SUMS, channels, dtype=torch.float64) if sums else None
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        if key in _MAPS:
            good = tensor.shape == like.shape and tensor.dtype == like.dtype
            good = good and tensor.is_contiguous(memory_format=torch.channels_last)
        else:
            size, dtype = (pixels * -(-channels // 32), torch.int32) if key == "words" else (channels, torch.float32)
            size = pixels if key in of_pixels else size
            good = tensor.is_contiguous() and tensor.numel() == size and tensor.dtype == dtype
        if not good:
            raise RuntimeError(f"{name}: {key} is {tensor.dtype} {tuple(tensor.shape)}; the map {tuple(like.shape)}")
        values[key] = tensor.data_ptr()
    sums_of = into if partial is None else partial
    values["sums"] = None if sums_of is None else sums_of.data_ptr()
    kernels = library.load()
    assert kernels is not None
    task = library.Task(pixels=pixels, channels=channels, half=like.dtype == torch.bfloat16, **values)
    getattr(kernels, name)(task, threads)
    return [] if partial is None else list(partial.sum(0)[:sums].unbind())


_MAPS = {"a", "c", "out"}
_NORM = ("alpha", "beta", "threshold", "mean")


def _vectors(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(count))


def _no_words(x: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, -(-channels // 32)), dtype=torch.int32)


@_operator("moments(Tensor x) -> (Tensor, Tensor)", lambda x: _vectors(x, 2))
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance of each channel."""
    origin = x[:1].mean((0, 2, 3), dtype=torch.float32)  # of the first image
    first, second = _run("moments", x, {"a": x, "mean": origin}, sums=2)
    count = x.numel() // x.shape[1]
    first /= count
    variance = (second / count - first.square()).clamp_(min=0)
    return (first + origin).float(), variance.float()


@_operator("signs(Tensor x, Tensor alpha, Tensor beta, Tensor threshold) -> Tensor", _no_words)
def signs(x: Tensor, alpha: Tensor, beta: Tensor, threshold: Tensor) -> Tensor:
    """The words of ``alpha x + beta >= threshold``, where the left side is rounded once."""
    words = _no_words(x)
    _run("signs", x, {"a": x, "alpha": alpha, "beta": beta, "threshold": threshold, "words": words})
    return words


def _no_map(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    batch, height, width, _ = words.shape
    return _map(batch, channels, height, width, dtype)


@_operator("spread(Tensor words, int channels, ScalarType dtype) -> Tensor", _no_map)
def spread(words: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Words as a map of -1 and +1."""
    out = _no_map(words, channels, dtype)
    _run("spread", out, {"out": out, "words": words})
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
    kernels = library.load()
    assert kernels is not None
    pixels = out.numel() // outputs
    for part in _parts(batch, (height, width), size, (rows, columns), stride, padding):
        task = library.Convolution(
            x=part.pointer(words, pixels), w=weight.data_ptr(), scale=scale.data_ptr(), out=part.pointer(out, pixels),
            bias=None if bias is None else bias.data_ptr(), addend=part.pointer(addend, pixels), batch=part.batch,
            height=part.image[0], width=part.image[1], words=count, channels=channels, out_height=part.size[0],
            out_width=part.size[1], outputs=outputs, rows=rows, columns=columns, stride=tuple(stride),
            padding=tuple(padding), dilation=tuple(dilation), half=dtype == torch.bfloat16,
        )  # fmt: skip
        kernels.convolve(task, _threads(out.numel() * channels // 16))
    return out


def kernel_words(value: Tensor) -> Tensor:
    """The signs of kernels ``(O, I, kh, kw)`` as :func:`convolve` reads them: ``(ceil(O / 16), kh, kw, words, 16)``."""
    value = value.float().contiguous(memory_format=torch.channels_last)
    one, zero = value.new_ones(value.shape[1]), value.new_zeros(value.shape[1])
    words: Tensor = signs(value, one, zero, zero)
    words = torch.nn.functional.pad(words, (0, 0, 0, 0, 0, 0, 0, -len(words) % _LANES))
    blocks = words.view(-1, _LANES, *words.shape[1:])
    return blocks.permute(0, 2, 3, 4, 1).contiguous()


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
            **dict.fromkeys((*_NORM, "invstd"), ((self.channels,), torch.float32)),
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
        kernels = library.load()
        assert kernels is not None
        assert kernels.tables is not None
        task = library.Gradients(
            grad=part.pointer(self.grad, self.pixels), batch=part.batch, height=part.image[0], width=part.image[1],
            words=self.words, channels=self.channels, out_height=part.size[0], out_width=part.size[1],
            outputs=self.grad.shape[1], rows=self.kernel[0], columns=self.kernel[1],
            half=self.grad.dtype == torch.bfloat16, **self.places, **arguments,
        )  # fmt: skip
        size = kernels.tables.scratch_size(task)
        scratch = torch.empty(self.threads * size, dtype=torch.uint8)  # where torch allocates, a cache line begins
        task.scratch_size, task.scratch = size, scratch.data_ptr()
        getattr(kernels.tables, name)(task, self.threads)


@_operator(
    "input_gradient(Tensor grad, Tensor weight, Tensor scale, Tensor x, Tensor alpha, Tensor beta, Tensor threshold, "
    "Tensor mean, Tensor invstd, int[] stride, int[] padding, int[] dilation, float clip, bool parabola, "
    "bool statistics) -> (Tensor, Tensor, Tensor)",
    lambda grad, weight, scale, x, *_: (torch.empty_like(x), *_vectors(x, 2)),
)
def input_gradient(
    grad: Tensor, weight: Tensor, scale: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, threshold: Tensor,
    mean: Tensor, invstd: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], clip: float,
    parabola: bool, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient ``grad`` of :func:`convolve`'s output becomes that of its signs, and goes on as in :func:`gradient`.

    The second part is rounded less often than there.
    """
    fits = x.is_contiguous(memory_format=torch.channels_last) and x.dtype in (torch.float32, torch.bfloat16)
    if not fits or len(x) != len(grad):
        raise RuntimeError(f"input_gradient: x is {x.dtype} {tuple(x.shape)}; the gradient {tuple(grad.shape)}")
    look_up = _LookUp(grad, x.shape[1], x.shape[2:], weight.shape[1:3], stride, padding, dilation)
    norm = {"alpha": alpha, "beta": beta, "threshold": threshold, "mean": mean}
    look_up.check("input_gradient", {"w": weight, "scale": scale, **norm, "invstd": invstd})
    out, pixels = torch.empty_like(x), x.numel() // x.shape[1]
    vectors = {key: vector.data_ptr() for key, vector in norm.items()}
    sums = torch.zeros(len(look_up.parts), look_up.threads, library.SUMS, x.shape[1], dtype=torch.float64)
    for part, sum_ in zip(look_up.parts, sums, strict=True):
        signs = library.Task(
            a=part.pointer(x, pixels), sums=sum_.data_ptr(), clip=clip, parabola=parabola, **vectors
        )  # fmt: skip
        look_up.run(
            "input_gradient", part, w=weight.data_ptr(), scale=scale.data_ptr(), signs=ctypes.pointer(signs),
            out=part.pointer(out, pixels), out_half=x.dtype == torch.bfloat16, scaled=not statistics,
        )  # fmt: skip
    total, product = (both.float() for both in sums.sum((0, 1))[:2])
    if statistics:  # the estimator has been applied
        passes = {"a": x, "c": out, "out": out, **norm, **_mean_factors(total, product, x, invstd)}
        _run("gradient", x, passes, clip=math.inf, parabola=False)
    return out, total, product


def _mean_factors(total: Tensor, product: Tensor, x: Tensor, invstd: Tensor) -> dict[str, Tensor]:
    """What goes through the statistics of a norm."""
    count = x.numel() // x.shape[1]
    return {"k1": total / count, "k2": product / count * invstd.square()}


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
    sums = torch.empty(len(look_up.parts), *size)
    for part, sum_ in zip(look_up.parts, sums, strict=True):
        look_up.run(
            "weight_gradient", part, x=part.pointer(words, words.numel() // words.shape[-1]), sums=sum_.data_ptr()
        )
    total = functools.reduce(torch.add, sums)[:outputs, ..., :channels]
    return _no_weights(grad, words, channels, kernel).copy_(total.permute(0, 3, 1, 2))


@_operator(
    "gradient(Tensor grad, Tensor x, Tensor alpha, Tensor beta, Tensor threshold, Tensor mean, Tensor invstd, "
    "float clip, bool parabola, bool statistics) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, *_: (torch.empty_like(x), *_vectors(x, 2)),
)
def gradient(
    grad: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, threshold: Tensor, mean: Tensor, invstd: Tensor,
    clip: float, parabola: bool, statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradient of a sign through its estimator and the norm before it, to x.

    With u = ``alpha x + beta - threshold``, the estimator passes ``grad [|u| < clip]``, or ``grad max(0, 2 - 2|u|)`` if
    it is a ``parabola``. ``statistics`` says that the norm's were those of x. Also returns the sums over all pixels of
    what the estimator passes, and of its product with ``x - mean``.
    """
    tensors = {"a": x, "c": grad, "alpha": alpha, "beta": beta, "threshold": threshold, "mean": mean}
    constants: dict[str, Any] = {"clip": clip, "parabola": parabola}
    total, product = (sums.float() for sums in _run("gradient_sums", x, tensors, sums=2, **constants))
    out, factors = torch.empty_like(x), _mean_factors(total, product, x, invstd) if statistics else {}
    _run("gradient", x, tensors | factors | {"out": out}, **constants)
    return out, total, product


@_operator(
    "affine(Tensor x, Tensor alpha, Tensor beta, Tensor? addend) -> Tensor",
    lambda x, alpha, beta, addend: torch.empty_like(x),
)
def affine(x: Tensor, alpha: Tensor, beta: Tensor, addend: Tensor | None) -> Tensor:
    """``alpha x + beta``, plus ``addend``, a map like x."""
    out = torch.empty_like(x)
    _run("affine", x, {"a": x, "alpha": alpha, "beta": beta, "c": addend, "out": out})
    return out


@_operator(
    "prelu(Tensor x, Tensor slope, Tensor? before, Tensor? after) -> Tensor",
    lambda x, slope, before, after: torch.empty_like(x),
)
def prelu(x: Tensor, slope: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
    """``PReLU(x - before) + after``, all but x ``(C,)``."""
    out = torch.empty_like(x)
    _run("prelu", x, {"a": x, "alpha": slope, "threshold": before, "beta": after, "out": out})
    return out


@_operator(
    "prelu_gradient(Tensor grad, Tensor x, Tensor slope, Tensor? before) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, slope, before: (torch.empty_like(x), *_vectors(x, 3)),
)
def prelu_gradient(
    grad: Tensor, x: Tensor, slope: Tensor, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of :func:`prelu`'s output becomes those of x, slope, before and after."""
    out = torch.empty_like(x)
    tensors = {"a": x, "c": grad, "alpha": slope, "threshold": before, "out": out}
    slopes, passed, given = (sums.float() for sums in _run("prelu_gradient", x, tensors, sums=3))
    return out, slopes, -passed, given


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
    out = torch.empty_like(latent)
    tensors = {"a": _filters(latent), "c": _filters(grad), "alpha": modulation, "out": _filters(out)}
    (sums,) = _run("latent_gradient", tensors["a"], tensors, sums=1)
    return out, sums.float()


@_operator(
    "kernel_sums(Tensor latent, Tensor modulation, Tensor scale, Tensor mu) -> Tensor",
    lambda latent, modulation, scale, mu: latent.new_empty((len(latent), 3), dtype=torch.float64),
)
def kernel_sums(latent: Tensor, modulation: Tensor, scale: Tensor, mu: Tensor) -> Tensor:
    """Of each filter the sums of ``(w |X| - scale)^2``, ``|X| - mu`` and its square; ``(O, 3)`` in double.

    Latents ``(O, N)``, modulation w ``(N,)``, scale and mu ``(O,)``.
    """
    totals = latent.new_empty((len(latent), 3), dtype=torch.float64)
    tensors = {"a": _filters(latent), "alpha": modulation, "threshold": scale, "mean": mu}
    _run("kernel_sums", tensors["a"], tensors, of_pixels=("threshold", "mean"), into=totals)
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
    out, times = torch.empty_like(latent), float(grad)
    tensors = {"a": _filters(latent), "alpha": modulation, "threshold": scale, "mean": mu, "k1": factor}
    tensors["out"] = _filters(out)
    of_pixels = ("threshold", "mean", "k1")
    (sums,) = _run("kernel_gradient", tensors["a"], tensors, sums=1, of_pixels=of_pixels, clip=times)
    return out, (sums * times).float()


def _filters(rows: Tensor) -> Tensor:
    return rows.reshape(*rows.shape, 1, 1)
