"""Make the networks of the demo: WebAssembly of trained networks, and what the page says of them.

``index.html`` needs them in the folder ``nets`` beside it, and a server, because browsers load no module from a file::

    python docs/demo/make.py && python -m http.server --directory docs/demo
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bonn_qat_runtime.sources import wasm_files
from torch import Tensor, nn

import bonn_qat
from bonn_qat.files.preprocessing import preprocessing_of

HERE = Path(__file__).parent
NAMES = {"binary": "wrn22_16.bonn_cifar10", "float": "wrn22_16.float_cifar10"}
SHOWN = ("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1")  # whose inputs' signs the page shows


class Showing(nn.Module):
    """A network whose output is what some of its layers take, one after another, each ``(h, w, channels)``."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W) -> (B, n)``."""
        taken: list[Tensor] = []
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda layer, args: taken.append(args[0]))
            for name in self.layers
        ]
        self.model(x)
        for hook in hooks:
            hook.remove()
        return torch.cat([maps.permute(0, 2, 3, 1).flatten(1) for maps in taken], 1)


def make(folder: Path) -> None:
    """Write the networks, ``nets.json`` and a picture into the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    networks = {key: (name, bonn_qat.create_model(name, pretrained=True).eval()) for key, name in NAMES.items()}
    binary = networks["binary"][1]
    known = preprocessing_of(binary)
    assert known is not None
    facts: dict[str, Any] = {"labels": known.labels, "mean": known.mean, "std": known.std, "networks": {}}
    for key, (name, model) in networks.items():
        sizes = write(model, (3, 32, 32), key, folder)
        facts["networks"][key] = {"name": name, "top1": model.card["top1"], **sizes}  # type: ignore[index]
    showing = Showing(binary, SHOWN)
    write(showing, (3, 32, 32), "signs", folder)
    with torch.no_grad():
        shapes = {}
        for name in SHOWN:
            layer = binary.get_submodule(name)
            layer.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: args[0].shape[1:]}))
        binary(torch.zeros(1, 3, 32, 32))
    facts["signs"] = [{"layer": name, "shape": list(shapes[name])} for name in SHOWN]
    (folder / "nets.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    picture(folder / "cat.png")


def write(model: nn.Module, size: tuple[int, int, int], key: str, folder: Path) -> dict[str, int]:
    """A network as ``key.wasm`` and ``key.js``; returns the bytes of its packed file and of the module."""
    with tempfile.TemporaryDirectory() as place:
        packed = bonn_qat.pack(model, size).save(Path(place, "packed"))
        files = wasm_files(packed, f"net_{key}")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return {"packed_bytes": packed.stat().st_size, "module_bytes": len(files[f"net_{key}.wasm"])}


def picture(path: Path) -> None:
    """A photograph of a cat, which its maker gave to the public domain."""
    from PIL import Image
    from skimage import data

    Image.fromarray(data.chelsea()).crop((75, 0, 375, 300)).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "nets")
    make(parser.parse_args(sys.argv[1:]).output)
