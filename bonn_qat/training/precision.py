"""Precision: how a GPU multiplies, for the length of a run."""

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the block float32 products are TF32 for ``"tf32"``, exact float32 otherwise; a CPU has only the latter.

    Products of ±1 are exact in both, and so are their sums, which a GPU forms in float32.
    """
    allowed = precision == "tf32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32 behavior")  # the older setting, which torch.compile reads
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
