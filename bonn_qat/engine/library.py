"""The compiled kernels: which functions there are, and their arguments as in ``kernels.c``."""

import ctypes
import functools
import os
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SUMS = 3  # at most, for each channel, of a pass over pixels
STRIP = 8  # outputs: the sums of their weights are written as a whole
_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = 1, -1, -3  # of glibc's malloc.h
_FOLDER = Path(__file__).parent
_FILE = _FOLDER / "lib" / f"kernels.{ {'darwin': 'dylib', 'win32': 'dll'}.get(sys.platform, 'so') }"


class Task(ctypes.Structure):
    """A pass over maps. Pointers are ``data_ptr()``s; None where a kernel does not read them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "c", "out", "alpha", "beta", "threshold", "mean", "factor")),
        *((name, ctypes.c_void_p) for name in ("totals", "sums", "words")),
        *((name, ctypes.c_int64) for name in ("pixels", "channels", "taps")),
        ("clip", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("half", "parabola")),
    )


class Convolution(ctypes.Structure):
    """A convolution of signs, in bits, with binary weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "scale", "bias", "addend", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "words", "channels", "out_height")),
        *((name, ctypes.c_int64) for name in ("out_width", "outputs", "rows", "columns")),
        *((name, ctypes.c_int64 * 2) for name in ("stride", "padding", "dilation")),
        ("half", ctypes.c_int64),
    )


class Gradients(ctypes.Structure):
    """The gradients of such a convolution to its signs or its weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "x", "w", "scale")),
        ("signs", ctypes.POINTER(Task)),
        *((name, ctypes.c_void_p) for name in ("out", "sums", "scratch")),
        *((name, ctypes.c_int64) for name in ("scratch_size", "batch", "height", "width", "words", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "outputs", "rows", "columns")),
        *((name, ctypes.c_int64 * 2) for name in ("stride", "padding", "dilation")),
        *((name, ctypes.c_int64) for name in ("half", "out_half", "scaled")),
    )


Pass = Callable[[Task, int], None]


@dataclass(frozen=True)
class Tables:
    """The kernels that look gradients up in tables. ``scratch_size`` is that of a task, in bytes for each thread."""

    faster_for: frozenset[torch.dtype]  # than torch's convolutions
    scratch_size: Callable[[Gradients], int]
    input_gradient: Callable[[Gradients, int], None]
    weight_gradient: Callable[[Gradients, int], None]


@dataclass(frozen=True, kw_only=True)
class Library:
    """The kernels for one set of instructions. Each takes its arguments and the number of threads."""

    variant: str
    moments: Pass
    signs: Pass
    kernel_words: Pass
    spread: Pass
    gradient: Pass
    affine: Pass
    prelu: Pass
    prelu_gradient: Pass
    latent_gradient: Pass
    kernel_gradient: Pass
    kernel_sums: Pass
    convolve: Callable[[Convolution, int], None]
    tables: Tables | None  # on x86 alone


@functools.cache
def load() -> Library | None:
    """The fastest kernels that this machine runs.

    None where the package was built without them, for CPUs without AVX2 or NEON, and with ``BONN_QAT_NO_ENGINE=1``.
    A library that cannot be loaded, or is older than its sources, is not used and a warning says what to do.
    """
    if os.environ.get("BONN_QAT_NO_ENGINE") == "1" or not _FILE.exists():
        return None
    try:
        shared = ctypes.CDLL(str(_FILE))
        shared.sources.restype = ctypes.c_uint32
        stale = shared.sources() != sources()
    except (OSError, AttributeError) as error:
        _warn(f"cannot be loaded ({error})")
        return None
    if stale:
        _warn("was compiled from other sources than those beside it")
        return None
    found = variants(shared)
    return bind(shared, found[0]) if found else None


def keep_freed_memory() -> None:
    """Have the GNU allocator keep blocks of up to 32 MiB that are freed, up to 1 GiB, for the next step or call.

    Otherwise it returns them, and every page of the next block costs a fault. Small blocks are joined with free ones
    beside them at once, for they may be ends of large ones: a map that misses its end is too small for the next map.
    Other allocators are not affected, nor are processes whose environment sets such a threshold.
    """
    settings = (f"{name}={value}" for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_")))
    if sys.platform == "linux" and not any("threshold" in setting.lower() for setting in settings):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, size: None)
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**30)
        mallopt(_M_MXFAST, 0)


def sources() -> int:
    """The checksum of the C sources, which a library compiled from them has too."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.[ch]"))))


def _warn(reason: str) -> None:
    warnings.warn(
        f"{_FILE} {reason}; training is slower and takes more memory without it: install bonn-qat again "
        "(in a clone: pip install -e .)",
        stacklevel=3,
    )


def variants(shared: ctypes.CDLL) -> list[str]:
    """The variants in a library that this machine runs, the fastest first."""
    shared.variants.restype = ctypes.c_char_p
    return str(shared.variants().decode()).split()


def bind(shared: ctypes.CDLL, variant: str) -> Library:
    """The kernels of one variant, which run on torch's threads if they can be found."""

    def kernel(name: str, arguments: type[ctypes.Structure]) -> Callable[..., None]:
        function = shared[f"{name}_{variant}"]
        function.argtypes, function.restype = (ctypes.POINTER(arguments), ctypes.c_int), None
        return function

    use_threads = shared[f"use_threads_{variant}"]
    use_threads.argtypes, use_threads.restype = (ctypes.c_void_p,) * 3, None
    # The extension module of torch is loaded, and a search in it goes on in what it was linked to: in that OpenMP
    # library, whatever its name is. Windows has no such search.
    linked = ctypes.CDLL(torch._C.__file__)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if all(hasattr(linked, name) for name in names):
        use_threads(*(ctypes.cast(getattr(linked, name), ctypes.c_void_p) for name in names))
        # A forked process has none of the threads, and OpenMP would wait for them forever.
        os.register_at_fork(after_in_child=lambda: use_threads(None, None, None))
    passes = (
        "moments", "signs", "kernel_words", "spread", "gradient", "affine", "prelu", "prelu_gradient",
        "latent_gradient", "kernel_gradient", "kernel_sums",
    )  # fmt: skip
    tables = None
    if hasattr(shared, f"scratch_size_{variant}"):
        size = shared[f"scratch_size_{variant}"]
        size.argtypes, size.restype = (ctypes.POINTER(Gradients),), ctypes.c_int64
        # A unit that multiplies bfloat16 in tiles is faster.
        faster_for = {torch.float32} if shared.has_tiles() else {torch.float32, torch.bfloat16}
        tables = Tables(
            frozenset(faster_for), size, kernel("input_gradient", Gradients), kernel("weight_gradient", Gradients)
        )
    return Library(
        variant=variant, convolve=kernel("convolve", Convolution), tables=tables,
        **{name: kernel(name, Task) for name in passes},
    )  # fmt: skip
