"""Precision: the types in which the steps of a run multiply."""

import contextlib
import functools
import warnings
from collections.abc import Iterator

import torch

from bonn_qat.environment import instructions

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What a CPU must have one of.
_INSTRUCTIONS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}


class SlowPrecision(UserWarning):
    """A CPU without instructions for the precision of a recipe."""


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a training step; for ``"float32"`` and ``"tf32"`` it does nothing."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@functools.cache  # to say it once, for the blocks below make Python forget what it has warned of
def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warn with :class:`SlowPrecision` if ``device`` is a CPU that has no instructions for products in ``precision``.

    Only the first call with these arguments does so. Of a system that does not list its instructions nothing is said.
    """
    needed, found = _INSTRUCTIONS.get(precision, ()), instructions()
    if device.type == "cpu" and needed and found and found.isdisjoint(needed):
        warnings.warn(
            f"this CPU has no instructions for {precision} (none of {', '.join(needed)}), so that precision = "
            f'"{precision}" is slower than "float32" here',
            SlowPrecision,
            stacklevel=2,
        )


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Compute float32 matrix products in float32 within the block if ``precision`` is that, else in TF32.

    Affects GPUs only. Products of ±1 and their sums, which a GPU accumulates in float32, are exact in both. Under
    autocast these are the only products of a training step that are not in its type.
    """
    allowed = precision != "float32"
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
