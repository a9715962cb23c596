"""Files of tensors: safetensors with a header of JSON, written whole or not at all, and read without running code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from bonn_qat.errors import InvalidData
from bonn_qat.files import write_whole

_KEY = "bonn_qat"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> Path:
    """Write tensors by name, with a header, to a file that is there whole or not at all.

    Raises OSError where the system refuses to write.
    """
    # Not save_file, which turns a full disk into an error of its own.
    return write_whole(path, dump_tensors(tensors, header))


def dump_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> bytes:
    """What :func:`write_tensors` writes."""
    # A copy of each, because safetensors refuses tensors that share their memory.
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps(header, separators=(",", ":"))} if header is not None else None
    content: bytes = safetensors.torch.save(copies, metadata)
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote, on the CPU; the header is empty for a file without one.

    Raises InvalidData naming the file if it cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    except OSError as error:
        reason = error.strerror or ("no such file" if not path.is_file() else str(error))
        raise InvalidData(f"cannot read {path}: {reason}") from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise InvalidData(f"{path} is not a whole safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise InvalidData(f"{path} has a header of bonn-qat that is no table")
    return tensors, header
