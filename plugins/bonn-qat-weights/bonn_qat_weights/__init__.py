"""Trained networks for ``bonn_qat.create_model``; benchmarks/make_pretrained.py made the files."""

from pathlib import Path

from bonn_qat import Pretrained, hookimpl

FILES = Path(__file__).parent / "files"
WEIGHTS, PACKED = ".safetensors", ".packed.safetensors"


@hookimpl
def bonn_qat_pretrained() -> list[Pretrained]:
    """Every weights file, with the packed network beside it if there is one."""
    found = []
    for path in sorted(FILES.glob(f"*{WEIGHTS}")):
        if not path.name.endswith(PACKED):
            name = path.name.removesuffix(WEIGHTS)
            packed = path.with_name(name + PACKED)
            found.append(Pretrained(name, path, packed if packed.exists() else None))
    return found
