"""What ``export --format c`` and ``wasm`` give: bits equal to Python's, size, and CPU time to the first result.

Each packed file is written as C and built by each compiler for each level of instructions, and as WebAssembly for
Node. The programs run in turns with a Python process that uses bonn-qat-runtime; the medians of their CPU times for one
image, and for each further one, are printed and, with ``--output``, written as JSON. Example::

    python benchmarks/delivered.py wrn10.safetensors resnet18.safetensors --output FILE.json
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bonn_qat_runtime
import numpy as np
import torch
from bonn_qat_runtime.sources import c_files, wasm_files

from bonn_qat.environment import environment, processor
from bonn_qat.exporting.sources import _SCRIPT

ZIG = [sys.executable, "-m", "ziglang", "cc"]
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
LEVELS = {"zig": ("native", "x86-64-v3", "x86-64"), "gcc": ("native", "x86-64-v3"), "clang": ("native",)}
BUILDS = {
    f"{name} {level}": [*ZIG, *FLAGS, f"-march={level.replace('-', '_')}"] if name == "zig" else
    [name, *FLAGS, f"-march={level}"]
    for name, levels in LEVELS.items() if name == "zig" or shutil.which(name) for level in levels
}  # fmt: skip
PYTHON = """
import sys, numpy, bonn_qat_runtime
net = bonn_qat_runtime.Network(sys.argv[1])
images = numpy.frombuffer(sys.stdin.buffer.read(), numpy.float32).reshape(-1, *net.input_size)
print(*net(images).reshape(-1))
"""


def arms(path: Path, folder: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The commands that run a network, and the bytes of the stripped programs and the module."""
    commands, sizes = {"python": [sys.executable, "-c", PYTHON, str(path)]}, {}
    for name, content in {**c_files(path, "net"), **wasm_files(path, "net")}.items():
        (folder / name).write_bytes(content)
    for name, command in BUILDS.items():
        program = folder / name.replace(" ", "-")
        subprocess.run([*command, "-s", "main.c", "net.c", "-o", str(program)], cwd=folder, check=True)
        commands[name], sizes[name] = [str(program), "--logits"], program.stat().st_size
    if shutil.which("node"):
        commands["node"] = ["node", "--input-type=module", "-e", _SCRIPT, (folder / "net.js").as_uri()]
        sizes["node"] = (folder / "net.wasm").stat().st_size
    return commands, sizes


def run(command: list[str], images: bytes) -> tuple[float, bytes]:
    """The CPU seconds of a process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, input=images, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def measured(path: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each way to run a network."""
    network = bonn_qat_runtime.Network(path)
    more = 8 if np.prod(network.input_size) > 2**14 else 400  # images in the second run of each program
    images = np.random.default_rng(0).standard_normal((1 + more, *network.input_size)).astype(np.float32)
    expected = np.asarray(network(images)).reshape(-1)
    with tempfile.TemporaryDirectory() as folder:
        commands, sizes = arms(path, Path(folder))
        first = {name: list[float]() for name in commands}
        further = {name: list[float]() for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                one, _ = run(command, images[:1].tobytes())
                all_of_them, printed = run(command, images.tobytes())
                first[name].append(one)
                further[name].append((all_of_them - one) / more)
                found = np.array(printed.split(), np.float32)
                assert found.tobytes() == expected.tobytes(), f"{name} gives other bits"
    return [
        {
            "network": path.stem, "by": name, "bytes": sizes.get(name),
            "first_ms": 1e3 * statistics.median(first[name]), "further_ms": 1e3 * statistics.median(further[name]),
        }
        for name in commands
    ]  # fmt: skip


def main() -> None:
    """Measure each file, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = [row for path in args.files for row in measured(path, args.rounds)]
    print("| network | by | kB | first result, CPU ms | further image, CPU ms |\n|---|---|---|---|---|")
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e3:,.0f}"
        print(f"| {row['network']} | {row['by']} | {size} | {row['first_ms']:.1f} | {row['further_ms']:.2f} |")
    if args.output:
        found = {"environment": dict(environment(torch.device("cpu"))), "machine": processor(), "rounds": args.rounds}
        args.output.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
