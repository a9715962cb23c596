"""Numbers and text as C has them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bool: "uint8_t", torch.uint8: "uint8_t",
    torch.int8: "int8_t", torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip
_DIGITS = {torch.float32: (".9g", "f"), torch.float64: (".17g", "")}  # enough to read the same number back
_COLUMNS = 112


def words(tensor: Tensor) -> list[str]:
    """Int64 words of bits as literals."""
    return [f"0x{word & (1 << 64) - 1:016x}u" for word in tensor.tolist()]


def numbers(tensor: Tensor) -> list[str]:
    """The elements of a tensor as literals, each exact."""
    elements = tensor.flatten().tolist()
    if tensor.dtype in _DIGITS:
        digits, suffix = _DIGITS[tensor.dtype]
        return [_float(element, digits, suffix) for element in elements]
    # A literal has no sign, and this one would be too large before its minus is applied.
    return ["INT64_MIN" if element == -(1 << 63) else str(int(element)) for element in elements]


def _float(number: float, digits: str, suffix: str) -> str:
    if math.isfinite(number):
        text = format(number, digits)
        return f"{text}{suffix}" if "." in text or "e" in text else f"{text}.0{suffix}"
    return "NAN" if math.isnan(number) else "INFINITY" if number > 0 else "-INFINITY"


def columns(items: Sequence[str]) -> str:
    """The items of an array in lines."""
    step = max(1, _COLUMNS // (2 + max(map(len, items))))
    return ",\n    ".join(", ".join(items[at : at + step]) for at in range(0, len(items), step))


def braces(items: Sequence[object]) -> str:
    """The initializer of a struct."""
    return f"{{{', '.join(map(str, items))}}}"


def comment(text: str) -> str:
    """Text that is safe in a comment of C, whatever a file contains."""
    line = text.encode("ascii", "backslashreplace").decode().replace("*/", "* /").replace("/*", "/ *")
    return "".join(c if c.isprintable() else "?" for c in line).rstrip()
