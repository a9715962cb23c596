"""Precision: switch TF32 on or off within a block."""

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Compute float32 matrix products in TF32 within the block if ``precision`` is ``"tf32"``, else in float32.

    Affects GPUs only. Products of ±1 and their sums, which a GPU accumulates in float32, are exact in both.
    """
    allowed = precision == "tf32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32 behavior")  # torch.compile reads the older setting
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
