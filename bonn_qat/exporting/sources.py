"""Sources: a packed network as C or WebAssembly, written by the package bonn-qat-runtime; and how these are run."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bonn_qat.errors import InvalidModel
from bonn_qat.inputs import Inputs

_SCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
const run = await (await import(process.argv[1])).load();
const bytes = readFileSync(0);
writeFileSync(1, Array.from(run(new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4))).join(" "));
"""


def files_of(packed: bytes, name: str, format: str) -> Mapping[str, bytes]:
    """A packed file as a folder of the format ``c`` or ``wasm``: its files' names and contents.

    Raises InvalidModel for a network that the runtime cannot run, and a ``name`` that is no identifier in C.
    """
    from bonn_qat_runtime import InvalidFile, RuntimeFailure
    from bonn_qat_runtime.sources import c_files, wasm_files

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "packed.safetensors")
        path.write_bytes(packed)
        try:
            return {"c": c_files, "wasm": wasm_files}[format](path, _identifier(name))
        except InvalidFile as error:
            raise InvalidModel(f"the folder {name}: {error}") from error
        except RuntimeFailure as error:
            reason = str(error).removeprefix(f"{path}: ").partition("; use bonn_qat.PackedModel")[0]
            raise InvalidModel(
                f"the format {format!r} cannot hold this network: {reason}; 'packed', 'onnx' and 'pt2' can"
            ) from error


def run_c(path: Path, inputs: Tensor | Inputs) -> list[Tensor]:
    """What the program of a folder gives, compiled by zig."""
    source = path / f"{_name_of(path)}.c"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        options = ["-O3", "-std=c11", "-ffp-contract=off", path / "main.c", source, "-o", program]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *map(str, options)], capture_output=True, check=True)
        return _outputs([program, "--logits"], inputs)


def run_wasm(path: Path, inputs: Tensor | Inputs) -> list[Tensor]:
    """What the module of a folder gives in Node."""
    module = (path / f"{_name_of(path)}.js").resolve()
    return _outputs(["node", "--input-type=module", "-e", _SCRIPT, module.as_uri()], inputs)


def _name_of(path: Path) -> str:
    return _identifier(path.resolve().name)


def _identifier(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def _outputs(command: Sequence[str | Path], inputs: Tensor | Inputs) -> list[Tensor]:
    (images,) = Inputs.batch(inputs).tensors
    done = subprocess.run(command, input=images.numpy().tobytes(), capture_output=True, check=True)
    return [torch.from_numpy(np.array(done.stdout.split(), np.float32)).view(len(images), -1)]
