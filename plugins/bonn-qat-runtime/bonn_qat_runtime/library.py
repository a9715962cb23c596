"""Library: the compiled C functions of ``engine/bonn_qat_runtime.h``, and the instruction set that they use."""

import ctypes
import functools
import math
import os
import sys
import zlib
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.errors import InvalidPlan, LibraryMissing
from bonn_qat_runtime.plan import FIELDS, Plan, aligned

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor  # takes longer to import than a small network to run

_ENGINE = Path(__file__).parent / "engine"
_FILE = _ENGINE / "lib" / f"runtime.{ {'darwin': 'dylib', 'win32': 'dll'}.get(sys.platform, 'so') }"
_TODO = "install bonn-qat-runtime again (in a clone: pip install -e plugins/bonn-qat-runtime)"
_STATUS = {
    1: "its sizes are wrong",
    2: "a number is outside its range",
    3: "something does not lie in the arena",
    4: "something does not lie in the constants, or a table has a wrong number",
    5: "it was made for another instruction set",
    6: "its memory does not begin at a multiple of 64",
}

Outputs = NDArray[np.float32] | tuple[NDArray[np.float32], ...]


class _Plan(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("row_count", ctypes.c_int64),
        ("constants", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("constant_bytes", "arena_bytes", "inputs", "outputs", "layout")),
    )


@functools.cache
def load() -> Any:
    """The library. Raises LibraryMissing, saying what to do, if it is not there or not what the sources say."""
    if not _FILE.exists():
        raise LibraryMissing(f"{_FILE} is missing; {_TODO}")
    try:
        library = ctypes.CDLL(str(_FILE))
        library.bonn_qat_sources.restype = ctypes.c_uint32
        library.bonn_qat_row_size.restype = library.bonn_qat_layout.restype = ctypes.c_int64
        library.bonn_qat_layout.argtypes = (ctypes.c_void_p,)
        library.bonn_qat_find_cpu.argtypes = (ctypes.c_char_p,)
        library.bonn_qat_find_cpu.restype = ctypes.c_void_p
        library.bonn_qat_cpus.restype = ctypes.c_char_p
        library.bonn_qat_verify.argtypes = (ctypes.POINTER(_Plan), ctypes.POINTER(ctypes.c_int64))
        library.bonn_qat_run.argtypes = (
            ctypes.POINTER(_Plan), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
    except (OSError, AttributeError) as error:
        raise LibraryMissing(f"{_FILE} cannot be loaded ({error}); {_TODO}") from error
    sources = zlib.crc32(b"".join(path.read_bytes() for path in sorted(_ENGINE.glob("*.[ch]"))))
    if library.bonn_qat_sources() != sources or library.bonn_qat_row_size() != 8 * len(FIELDS):
        raise LibraryMissing(f"{_FILE} was compiled from other sources than those beside it; {_TODO}")
    return library


def cpus() -> tuple[str, ...]:
    """The instruction sets that this machine runs, the fastest first.

    >>> cpus()  # doctest: +SKIP
    ('v3', 'plain')
    """
    return tuple(load().bonn_qat_cpus().decode().split())


def chosen_cpu() -> str:
    """The fastest instruction set, or the one that the environment variable ``BONN_QAT_RUNTIME_CPU`` names.

    Raises LibraryMissing for one that this machine does not run.
    """
    asked, known = os.environ.get("BONN_QAT_RUNTIME_CPU"), cpus()
    if asked and asked not in known:
        raise LibraryMissing(f"BONN_QAT_RUNTIME_CPU is {asked!r}; this machine runs {', '.join(known)}")
    return asked or known[0]


def layout(cpu: str) -> int:
    """The layout of binary weights of an instruction set."""
    return int(load().bonn_qat_layout(_handle(cpu)))


@functools.cache
def _handle(cpu: str) -> int:
    found: int | None = load().bonn_qat_find_cpu(cpu.encode())
    assert found is not None
    return found


class Program:
    """A verified plan, and its runs. Raises InvalidPlan for one that reads or writes what is not its own."""

    def __init__(self, plan: Plan, cpu: str) -> None:
        self._library, self._cpu, self._plan = load(), _handle(cpu), plan
        self._sizes = [math.prod(shape) for shape in plan.results]
        # What the library verified must not change.
        self._rows = np.ascontiguousarray(plan.rows, np.int64).copy()
        for array in (self._rows, plan.constants):
            array.flags.writeable = False
        self._c = _Plan(
            self._rows.ctypes.data, len(self._rows), plan.constants.ctypes.data, plan.constants.nbytes,
            plan.arena_bytes, plan.inputs, sum(self._sizes), plan.layout,
        )  # fmt: skip
        row = ctypes.c_int64()
        status = self._library.bonn_qat_verify(ctypes.byref(self._c), ctypes.byref(row))
        if status:
            raise InvalidPlan(f"row {row.value} of the plan is refused: {_STATUS.get(status, status)}")
        self._arenas: list[NDArray[np.uint8]] = []
        self._pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None

    def __call__(self, images: NDArray[np.float32], threads: int = 1) -> Outputs:
        """Contiguous images ``(B, ...)`` of ``plan.inputs`` numbers each -> ``(B, *shape)`` for each result."""
        results = np.empty((len(images), sum(self._sizes)), np.float32)
        self._run_all(images, results, threads)
        parts = np.split(results, np.cumsum(self._sizes)[:-1], axis=1)
        shaped = [
            np.ascontiguousarray(part).reshape(len(images), *shape)
            for part, shape in zip(parts, self._plan.results, strict=True)
        ]
        return shaped[0] if self._plan.is_single else tuple(shaped)

    def _run_all(self, images: NDArray[np.float32], results: NDArray[np.float32], threads: int) -> None:
        threads = min(threads, len(images))
        if threads <= 1:
            self._run(images, results)
            return
        # Small parts, because other processes may hold up a thread.
        size = max(1, len(images) // (4 * threads))
        parts = deque(slice(start, start + size) for start in range(0, len(images), size))

        def run_parts() -> None:
            while True:
                try:
                    part = parts.popleft()
                except IndexError:
                    return
                self._run(images[part], results[part])

        others = [self._helpers(threads - 1).submit(run_parts) for _ in range(threads - 1)]
        run_parts()
        for other in others:
            other.result()

    def _helpers(self, count: int) -> "ThreadPoolExecutor":
        # A process that was forked has the object of its parent, without the threads.
        if self._pool is None or self._pool[0] != (os.getpid(), count):
            from concurrent.futures import ThreadPoolExecutor

            self._pool = (os.getpid(), count), ThreadPoolExecutor(count)
        return self._pool[1]

    def _run(self, images: NDArray[np.float32], results: NDArray[np.float32]) -> None:
        # Each thread that is in here has an arena of its own.
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = aligned(self._plan.arena_bytes)
        status = self._library.bonn_qat_run(
            ctypes.byref(self._c), self._cpu, images.ctypes.data, len(images), results.ctypes.data, arena.ctypes.data
        )
        self._arenas.append(arena)
        if status:
            raise InvalidPlan(f"the plan cannot run: {_STATUS.get(status, status)}")
