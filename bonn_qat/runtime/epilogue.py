"""Epilogue: the operations after a binary convolution, done while its result is in the cache, as a short program.

A program is a flat list of pairs of integers: an operation, and the row of ``vectors`` ``(rows, O)`` that it takes, or
the first of two. It starts from the value of the convolution, ``(B, O, H, W)``.
"""

from typing import Final

import torch
from torch import Tensor

SCALE: Final = 0  # value * row
ADD: Final = 1  # value + row
FMA: Final = 2  # value * row + next row, rounded once, as torch's batch norm on a CPU
RESIDUAL: Final = 3  # value + residual; takes no row
PRELU: Final = 4  # value where it is above 0, else value * row
CLAMP: Final = 5  # value, at least row and at most next row
ROWS = {SCALE: 1, ADD: 1, FMA: 2, RESIDUAL: 0, PRELU: 1, CLAMP: 2}


def check(program: list[int], rows: int, has_residual: bool) -> None:
    """Raise ValueError for a program that does not fit its vectors."""
    if len(program) % 2:
        raise ValueError(f"an epilogue is a list of pairs; got {len(program)} numbers")
    for operation, row in zip(program[::2], program[1::2], strict=True):
        if operation not in ROWS or not 0 <= row <= rows - ROWS[operation]:
            raise ValueError(f"an epilogue with {rows} vectors has no operation {operation} with row {row}")
        if operation == RESIDUAL and not has_residual:
            raise ValueError("an epilogue adds a residual that is not given")


def run(values: Tensor, program: list[int], vectors: Tensor, residual: Tensor | None) -> Tensor:
    """Apply a program to float32 ``(B, O, H, W)``; the shape stays the same."""
    rows = vectors[:, :, None, None]
    for operation, row in zip(program[::2], program[1::2], strict=True):
        if operation == SCALE:
            values = values * rows[row]
        elif operation == ADD:
            values = values + rows[row]
        elif operation == FMA:
            values = _fma(values, rows[row], rows[row + 1])
        elif operation == RESIDUAL:
            assert residual is not None
            values = values + residual
        elif operation == PRELU:
            values = torch.where(values > 0, values, values * rows[row])
        else:
            values = values.clamp(rows[row], rows[row + 1])
    return values


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.addcmul(c, a, b)
    # A CPU's batch norm is one multiplication and addition, with this mean and variance of these factors and addends.
    factor, addend = b.flatten(), c.flatten()
    return torch.batch_norm(
        a, factor, addend, torch.zeros_like(factor), torch.ones_like(factor), False, 0.0, 0.0, False
    )
