"""Files of tensors: safetensors with a JSON header, written atomically and read without running code.

The sizes that a file claims are checked against the file's own size before memory is allocated; safetensors does so for
the tensors' types, shapes and offsets.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bonn_qat.errors import InvalidData, within_memory
from bonn_qat.files import plain
from bonn_qat.files.atomic import write_bytes

_KEY = "bonn_qat"
_TENSORS = 2**15  # in a file; the largest networks of timm have a few thousand
_AXES = 16
_HEADER = 2**23  # characters of ours; a network of 2,000 nodes has 300,000
_TYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "F8_E5M2", "F16", "BF16", "F32", "F64")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> Path:
    """Write tensors by name, with a header, atomically. Raises OSError if the file cannot be written."""
    # safetensors' save_file would turn a full disk into an error of its own.
    return write_bytes(path, dump_tensors(tensors, header))


def dump_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> bytes:
    """What :func:`write_tensors` writes."""
    # safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps(header, separators=(",", ":"))} if header is not None else None
    content: bytes = safetensors.torch.save(copies, metadata)
    return content


def load_tensors(content: bytes) -> dict[str, Tensor]:
    """What :func:`dump_tensors` made in this process or one that it trusts."""
    return safetensors.torch.load(content)


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """The SHA-256 of names, types, shapes and values of ``tensors``, and of ``header``, in hexadecimal digits."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote, on the CPU; the header is empty for a file without one.

    The tensors are copies, which do not change with the file. Those of 8-bit floats are float16, which has all their
    values and in which torch can compute. Raises InvalidData naming the file if it cannot be read,
    and for types, sizes and headers that this package does not write.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InvalidData(f"cannot read {path}: it is not a regular file")
        with within_memory(str(path)), safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > _TENSORS:
                raise ValueError(f"it holds {len(names):,} tensors; at most {_TENSORS:,} are allowed")
            tensors = {name: _tensor(name, file) for name in names}
            text = (file.metadata() or {}).get(_KEY, "{}")
            if len(text) > _HEADER:
                raise ValueError(f"its bonn-qat header has {len(text):,} characters; at most {_HEADER:,} are allowed")
            header = plain.from_json(text)
    except InvalidData:
        raise
    except OSError as error:
        reason = error.strerror or ("no such file" if not path.is_file() else str(error))
        raise InvalidData(f"cannot read {path}: {reason}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise InvalidData(f"{path} is not a complete safetensors file: {plain.one_line(error)}") from error
    if not isinstance(header, dict):
        raise InvalidData(f"{path} has a bonn-qat header that is not a table")
    return tensors, header


def _tensor(name: str, file: Any) -> Tensor:
    place = file.get_slice(name)
    kind, shape = place.get_dtype(), place.get_shape()
    if kind not in _TYPES:
        raise ValueError(f"the tensor {plain.shown(name)} is of type {kind}; known: {', '.join(_TYPES)}")
    if len(shape) > _AXES or max(shape, default=0) >= 2**48:
        raise ValueError(f"the tensor {plain.shown(name)} has the impossible shape {plain.shown(shape)}")
    tensor: Tensor = file.get_tensor(name)
    if kind == "BOOL" and bool((tensor.view(torch.uint8) > 1).any()):
        raise ValueError(f"the tensor {plain.shown(name)} is boolean, but holds bytes other than 0 and 1")
    # The tensor is a view of the file, which another process may change or shorten, and may be unaligned.
    return tensor.half() if tensor.dtype == torch.float8_e5m2 else tensor.clone()
