"""The cost of `binarize`: seconds, and memory beyond that of the model, for models up to the largest that fits.

Each measurement runs in its own process, because Linux never resets a process's peak memory. The parameters are filled
with noise instead of timm's initialization, which would take minutes. Example::

    python benchmarks/binarize_cost.py --models resnet18 vit_gigantic_patch14_224 --output cost.json
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

import bonn_qat
from bonn_qat.binarization.binarize import BypassedLayers, binary_layers
from bonn_qat.environment import environment

MODELS = ("resnet18", "vit_base_patch16_224", "convnext_xxlarge", "vit_gigantic_patch14_224")
WAYS = ("in place", "copy")


def measure(name: str, way: str) -> dict[str, Any]:
    """Binarize ``name`` in this process; sizes in bytes."""
    with torch.device("meta"):
        model = timm.create_model(name)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(-0.1, 0.1)
    size = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    # A tiny model first, so that everything that is loaded only once does not count.
    bonn_qat.binarize(timm.create_model("test_resnet"))
    before, start = _peak(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BypassedLayers)
        binary = bonn_qat.binarize(model, inplace=way == "in place")
    seconds, extra = time.process_time() - start, _peak() - before
    return {
        "model": name, "way": way, "parameters": sum(p.numel() for p in model.parameters()), "bytes": size,
        "layers": sum(1 for _ in binary_layers(binary)),
        "seconds": seconds, "extra_bytes": extra,
    }  # fmt: skip


def _peak() -> int:
    # Address space, because a system that pages out idle memory reports less resident memory than is in use.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmPeak:\s+(\d+) kB", status)[0]) * 1024


def main() -> None:
    """Measure each model in both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    print("| model | M parameters | binary layers | way | CPU seconds | memory beyond the model |")
    print("|---|---|---|---|---|---|")
    for name in args.models:
        for way in WAYS:
            command = [sys.executable, __file__, "--one", name, way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                told = done.stderr.strip().splitlines()
                reason = "too little memory" if done.returncode == -signal.SIGKILL else (told or ["failed"])[-1]
                rows.append({"model": name, "way": way, "failed": reason})
                print(f"| {name} | | | {way} | | {reason} |", flush=True)
                continue
            row = json.loads(done.stdout)
            rows.append(row)
            share = f"{row['extra_bytes'] / 2**20:,.0f} MiB, {row['extra_bytes'] / row['bytes']:.1%}"
            size = f"{row['parameters'] / 1e6:,.0f} | {row['layers']}"
            print(f"| {name} | {size} | {way} | {row['seconds']:.1f} | {share} |", flush=True)
    if args.output:
        document = {"environment": dict(environment(torch.device("cpu"))), "rows": rows}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
