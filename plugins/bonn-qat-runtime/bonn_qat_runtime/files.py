"""Files: a packed network as it lies on disk, read strictly and without running code.

A safetensors file: eight bytes with the length of a JSON table, the table, and the tensors' bytes. The entry
``__metadata__`` has bonn-qat's own header as text, with the checksum of all the rest.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.errors import InvalidFile, UnsupportedOperator, shown

FORMAT = 2
_TABLE = 100_000_000  # bytes, as safetensors has it
_HEADER = 2**23  # characters
_TENSORS, _NODES, _AXES, _LABELS = 2**15, 20_000, 16, 2**16
# Torch's names of the types, which are part of the checksum; numpy has no bfloat16.
_TYPES = {
    "BOOL": ("bool", "?"), "U8": ("uint8", "u1"), "I8": ("int8", "i1"), "I16": ("int16", "<i2"),
    "I32": ("int32", "<i4"), "I64": ("int64", "<i8"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"),
    "F32": ("float32", "<f4"), "F64": ("float64", "<f8"),
}  # fmt: skip


class Tensor(NamedTuple):
    """Values with torch's name of their type, such as ``float32``."""

    type: str
    array: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """``(x - mean) / std`` of each channel of images with values from 0 to 1; ``labels`` are the classes' names.

    ``crop`` is the part of an image's height and width, in its middle, that the network saw in evaluation.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...] = ()
    crop: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """What a file holds. ``input_size`` is that of an image, ``(C, H, W)``; ``nodes`` are the calls, as plain data."""

    name: str
    scheme: str
    input_size: tuple[int, int, int]
    nodes: list[dict[str, Any]]
    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing | None


def read_packed(path: str | Path | bytes) -> PackedFile:
    """Read a file that ``bonn_qat.pack(model).save(path)`` wrote, or its bytes, which ``dump()`` gives.

    Raises InvalidFile naming it if it is missing, truncated, altered, of another version or kind; UnsupportedOperator
    for a network that takes something else than images.
    """
    try:
        tensors, header = _parse(path if isinstance(path, bytes) else _content(path))
        return _checked(tensors, header)
    except OSError as error:
        raise InvalidFile(f"cannot read {name_of(path)}: {error.strerror or error}") from error
    except UnsupportedOperator as error:
        raise UnsupportedOperator(f"{name_of(path)}: {error}") from error
    except RecursionError as error:
        raise InvalidFile(f"{name_of(path)}: its tables and lists are nested too deeply") from error
    except ValueError as error:
        raise InvalidFile(f"{name_of(path)}: {' '.join(str(error).split())[:500]}") from error


def name_of(path: str | Path | bytes) -> str:
    """How messages call a file."""
    return "the bytes" if isinstance(path, bytes) else str(path)


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """The SHA-256 of names, types, shapes and values of ``tensors``, and of ``header``, as bonn-qat computes it."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        kind, array = tensors[name]
        found.update(json.dumps([name, f"torch.{kind}", list(array.shape)]).encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _content(path: str | Path) -> bytes:
    # Without waiting, as a plain open of a named pipe would.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        return file.read()


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice in a table")
    return table


def _json(text: str) -> dict[str, Any]:
    value = json.loads(text, object_pairs_hook=_table)
    if not isinstance(value, dict):
        raise ValueError("its header is not a table")
    return value


def _parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(_TABLE, len(content) - 8):
        raise ValueError("it is not a complete safetensors file")
    entries = _json(content[8 : 8 + length].decode())
    metadata = entries.pop("__metadata__", {})
    text = metadata.get("bonn_qat") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or len(text) > _HEADER:
        raise ValueError("it is not a packed network; bonn_qat.pack(model).save(path) writes one")
    if len(entries) > _TENSORS:
        raise ValueError(f"it holds {len(entries):,} tensors; at most {_TENSORS:,} are allowed")
    tensors, places = {}, []
    for name, entry in entries.items():
        tensors[name], place = _tensor(name, entry, memoryview(content)[8 + length :])
        places.append(place)
    end = 0
    for begin, stop in sorted(places):
        if begin != end:
            raise ValueError("its tensors overlap or leave a gap")
        end = stop
    if end != len(content) - 8 - length:
        raise ValueError("it does not end where its last tensor ends")
    return tensors, _json(text)


def _tensor(name: str, entry: Any, data: memoryview) -> tuple[Tensor, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {shown(name)} is not described by dtype, shape and data_offsets")
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"the tensor {shown(name)} is of type {shown(kind)}; known: {', '.join(_TYPES)}")
    if not _are_whole(shape) or not _are_whole(place) or len(place) != 2 or len(shape) > _AXES:
        raise ValueError(f"the tensor {shown(name)} has an impossible shape or place")
    type_name, code = _TYPES[kind]
    begin, end = place
    if begin > end or end > len(data) or end - begin != math.prod(shape) * np.dtype(code).itemsize:
        raise ValueError(f"the tensor {shown(name)} does not lie in the file")
    octets = np.frombuffer(data[begin:end], np.uint8)
    if kind == "BOOL" and bool((octets > 1).any()):
        raise ValueError(f"the tensor {shown(name)} is boolean, but holds bytes other than 0 and 1")
    return Tensor(type_name, octets.view(code).reshape(shape)), (begin, end)


def _are_whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**48 for n in numbers)


def _checked(tensors: dict[str, Tensor], header: dict[str, Any]) -> PackedFile:
    if header.get("kind") != "packed":
        raise ValueError("it is not a packed network; bonn_qat.pack(model).save(path) writes one")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"a packed network of format {shown(header.get('format'))}; this version of bonn-qat-runtime reads {FORMAT}"
        )
    if header.pop("sha256", None) != digest(tensors, header):
        raise ValueError("the file was altered after it was written: its checksum does not match")
    size: Any = header.get("input_size")
    nodes, known = header.get("nodes"), header.get("preprocessing")
    if not _are_whole(size) or not all(1 <= number <= 2**16 for number in size):
        raise ValueError(f"its images have the impossible size {shown(size)}")
    if len(size) != 3:
        raise UnsupportedOperator(f"the network takes inputs {shown(size)}, not images; use bonn_qat.PackedModel")
    if header.get("inputs"):
        raise UnsupportedOperator("the network takes several inputs, or others than images; use bonn_qat.PackedModel")
    if header.get("batch") is not None:
        raise UnsupportedOperator(
            f"the network takes {shown(header['batch'])} images at a time only; use bonn_qat.PackedModel"
        )
    if not isinstance(nodes, list) or len(nodes) > _NODES or not all(isinstance(node, dict) for node in nodes):
        raise ValueError(f"its nodes are not a list of at most {_NODES:,} tables")
    name, scheme = header.get("name"), header.get("scheme")
    if not isinstance(name, str) or not isinstance(scheme, str):
        raise ValueError("its name and scheme are not texts")
    return PackedFile(
        name=name, scheme=scheme, input_size=(size[0], size[1], size[2]), nodes=nodes, tensors=tensors,
        preprocessing=None if known is None else _preprocessing(known),
    )  # fmt: skip


def _preprocessing(table: Any) -> Preprocessing:
    mean: Any
    std: Any
    mean, std, labels = (table.get(key) if isinstance(table, dict) else None for key in ("mean", "std", "labels"))
    if not _are_finite(mean) or not _are_finite(std) or not all(number > 0 for number in std) or len(mean) != len(std):
        raise ValueError("its preprocessing has no mean and std for each channel")
    if not isinstance(labels, list) or len(labels) > _LABELS:
        raise ValueError(f"its labels are not a list of at most {_LABELS:,} names")
    if not all(isinstance(label, str) and label.isprintable() for label in labels):
        raise ValueError("its labels are not names of characters that can be printed")
    crop = table.get("crop", 1.0)
    if not _are_finite([crop]) or not 0 < crop <= 1:
        raise ValueError("its crop is not a number above 0 and at most 1")
    return Preprocessing(mean=tuple(mean), std=tuple(std), labels=tuple(labels), crop=float(crop))


def _are_finite(numbers: Any) -> bool:
    return (
        isinstance(numbers, list)
        and 1 <= len(numbers) <= 1024
        and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    )
