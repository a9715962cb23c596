"""Network: a packed file as a function of images."""

import functools
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime import library
from bonn_qat_runtime.errors import InvalidFile, InvalidPlan, InvalidThreads, UnsupportedOperator, shown
from bonn_qat_runtime.files import Preprocessing, name_of, read_packed
from bonn_qat_runtime.fuse import fuse
from bonn_qat_runtime.lower import lower
from bonn_qat_runtime.plan import plan


@final
class Network:
    """A network that ``bonn_qat.pack(model).save(path)`` wrote: images ``(B, C, H, W)`` -> logits ``(B, classes)``.

    It is made from the path of the file, or from its bytes. A network that returns several tensors gives a tuple of
    them. It computes what ``bonn_qat.PackedModel`` does, without torch. Binary layers are equal to the last bit, float
    layers up to the order of their sums, and on all CPUs alike. Images are computed one by one, ``threads`` of a call
    at the same time; several threads may also call a network at once.

    >>> net = Network("resnet18.safetensors")  # doctest: +SKIP
    >>> net(np.zeros((1, 3, 224, 224), np.float32)).shape  # doctest: +SKIP
    (1, 1000)

    Raises InvalidFile for a file that is damaged or no packed network, UnsupportedOperator naming what this runtime
    lacks, LibraryMissing if it was not compiled, InvalidThreads for less than one thread.
    """

    name: str
    scheme: str
    input_size: tuple[int, int, int]
    preprocessing: Preprocessing | None
    cpu: str  # the instruction set
    arena_bytes: int  # that each thread needs for an image
    threads: int

    def __init__(self, path: str | Path | bytes, *, threads: int = 1) -> None:
        if type(threads) is not int or threads < 1:
            raise InvalidThreads(f"threads is {shown(threads)}; it is a whole number, at least 1")
        self.threads, self._path = threads, path
        file = read_packed(path)
        self.name, self.scheme, self.input_size = file.name, file.scheme, file.input_size
        self.preprocessing, self.cpu = file.preprocessing, library.chosen_cpu()
        try:
            made = plan(fuse(lower(file)), file.input_size, library.layout(self.cpu))
            self._program, self.arena_bytes = library.Program(made, self.cpu), made.arena_bytes
        except (InvalidFile, InvalidPlan, UnsupportedOperator) as error:
            raise type(error)(f"{name_of(path)}: {error}") from error

    def __call__(self, images: NDArray[np.float32]) -> library.Outputs:
        """Raises InvalidFile for images of another size or type: they are neither converted nor scaled here."""
        if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.shape[1:] != self.input_size:
            given = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
            size = ", ".join(map(str, self.input_size))
            raise InvalidFile(f"this network was packed for float32 images (B, {size}); got {given}")
        return self._program(np.ascontiguousarray(images), self.threads)

    def __reduce__(self) -> tuple[Any, tuple[str | Path | bytes]]:
        # The compiled program is of this process: a copy reads the file again.
        return functools.partial(Network, threads=self.threads), (self._path,)

    def __repr__(self) -> str:
        return f"Network({self.name}, scheme={self.scheme!r}, input_size={self.input_size}, cpu={self.cpu!r})"
