"""Fuzz the C runtime under gcc's address and undefined-behaviour sanitizers, with plans and with packed files.

Plans of small random networks are altered, mixed with each other, or filled with random numbers. Each must be refused
by ``bonn_qat_verify`` or run, with every instruction set of this machine, without a report of a sanitizer; every buffer
is exactly as large as the plan says. The files are those of ``fuzz.py --kinds runtime``: each must be read and run, or
refused with an error of the package. A plan is a function of seed and number. Examples::

    python benchmarks/fuzz_runtime.py --plans 80000 --files 20000 --output FILE.json
    python benchmarks/fuzz_runtime.py --plans 1 --first 1234 --files 0
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bonn_qat_runtime
import fuzz
import numpy as np
import torch
from bonn_qat_runtime.files import PackedFile, Tensor
from bonn_qat_runtime.fuse import fuse
from bonn_qat_runtime.lower import lower
from bonn_qat_runtime.plan import BINARY, COPY, FIELDS, FLOAT, PRODUCT, Plan, plan
from bonn_qat_runtime.weights import NIBBLES, WORDS

from bonn_qat.environment import environment, processor

ENGINE = Path(bonn_qat_runtime.__file__).parent / "engine"
SANITIZERS = ("-O1", "-g", "-std=gnu11", "-ffp-contract=off", "-Wno-psabi", "-fno-omit-frame-pointer",
              "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # fmt: skip
X86 = {"plain": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4", "-mavx512vpopcntdq")}
VARIANTS = X86 if platform.machine() in ("x86_64", "AMD64") else {"neon": ()}
BATCH = 500  # plans for a process
STATUS = ("", "sizes", "range", "arena", "constants", "instruction set", "alignment")
Random = np.random.Generator


def build(folder: Path) -> Path:
    """The driver, which takes a file of plans and how many of them to pass over."""
    objects = list[Path]()
    for suffix, options in VARIANTS.items():
        objects.append(folder / f"{suffix}.o")
        compiled = (*options, f"-DVARIANT={suffix}", "-c", ENGINE / "kernels.c", "-o", objects[-1])
        subprocess.run(["gcc", *SANITIZERS, *map(str, compiled)], check=True)
    sources = (Path(__file__).with_suffix(".c"), ENGINE / "verify.c", ENGINE / "dispatch.c", *objects)
    linked = ("-DSOURCES=0", f"-I{ENGINE}", *sources, "-lm", "-o", folder / "driver")
    subprocess.run(["gcc", *SANITIZERS, *map(str, linked)], check=True)
    return folder / "driver"


# ------------------------------------------------------------------------------------------------------------- plans


def network(random: Random) -> PackedFile:
    """Convolutions of floats and of signs with all that may follow, a pool, a linear layer and attention."""
    groups = int(random.choice([1, 1, 2, 3]))
    inputs, middle = (groups * int(random.choice([1, 5, 8, 16, 33, 40])) for _ in range(2))
    (kh, kw), (sh, sw), (dh, dw) = (random.integers(1, most + 1, 2).tolist() for most in (3, 2, 2))
    top, bottom, left, right = random.integers(0, 3, 4).tolist()
    geometry = [middle, inputs, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups]
    height, width = (int(n) for n in random.integers(5, 10, 2))
    rows = -(-(height + top + bottom - dh * (kh - 1)) // sh), -(-(width + left + right - dw * (kw - 1)) // sw)
    tensors = {
        "first": random.standard_normal((inputs, 3, 3, 3)), "slope": random.random(1),
        "thresholds": np.sort(random.standard_normal((2, inputs)), 0),
        "words": random.integers(-(2**63), 2**63, -(-middle * inputs // groups * kh * kw // 64), np.int64),
        "vectors": random.standard_normal((6, middle)), "next": np.sort(random.standard_normal((2, middle)), 0),
        "last": random.standard_normal((7, middle)), "none": np.zeros((0, middle)),
        "square": random.integers(-(2**63), 2**63, -(-middle * middle // 64), np.int64),
    }  # fmt: skip
    alone = [middle, middle, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    program = [0, 0, 1, 1, 2, 2, 4, 4, 5, 4][: 2 * int(random.integers(0, 6))]
    pool = [["both0"], [2, 2], [1, 1], [1, 1]] if min(rows) > 1 else [["both0"], [1, 1], [1, 1], [0, 0]]
    nodes = [
        ("aten.conv2d.default", "a", ["x"], ["first"], None, [1, 1], [1, 1]),
        ("aten.prelu.default", "b", ["a"], ["slope"]),
        ("bonn_qat.sign_codes.default", "c", ["b"], ["thresholds"], geometry),
        ("bonn_qat.binary_conv2d_and_sign.default", "both", ["c"], ["words"], geometry, program, ["vectors"], None,
         ["next"], alone),
        ("python.getitem", "both0", ["both"], 0),
        ("python.getitem", "both1", ["both"], 1),
        ("bonn_qat.binary_conv2d.default", "e", ["both1"], ["square"], alone, [3, 0], ["none"], ["both0"]),
        ("aten.max_pool2d.default", "f", *pool),
        ("aten.adaptive_avg_pool2d.default", "g", ["f"], [1, 1]),
        ("aten.adaptive_avg_pool2d.default", "h", ["e"], [1, 1]),
        ("aten.add.Tensor", "i", ["g"], ["h"]),
        ("aten.flatten.using_ints", "j", ["i"], 1),
        ("aten.linear.default", "k", ["j"], ["last"]),
        ("aten.flatten.using_ints", "l", ["e"], 2),
        ("aten.transpose.int", "m", ["l"], 1, 2),
        ("aten.matmul.default", "n", ["l"], ["m"]),
        ("aten.softmax.int", "o", ["n"], -1),
        ("aten.gelu.default", "p", ["o"]),
    ]  # fmt: skip
    known = {"x", *tensors, *(name for _, name, *_ in nodes)}

    def argument(value: Any) -> Any:
        is_name = isinstance(value, list) and len(value) == 1 and value[0] in known
        return {"node": value[0]} if is_name else value

    held = {name: Tensor("int64" if value.dtype == np.int64 else "float32",
                         value if value.dtype == np.int64 else value.astype(np.float32))
            for name, value in tensors.items()}  # fmt: skip
    entries: list[dict[str, Any]] = [
        *({"op": "tensor", "name": name, "tensor": name} for name in tensors),
        {"op": "input", "name": "x"},
        *({"op": op, "name": name, "args": [argument(a) for a in args], "kwargs": {}} for op, name, *args in nodes),
        {"op": "output", "name": "output", "args": [[{"node": "k"}, {"node": "p"}]]},
    ]  # fmt: skip
    return PackedFile(
        name="", scheme="", input_size=(3, height, width), nodes=entries, tensors=held, preprocessing=None
    )


ODD = (-(2**63), -64, -1, 0, 1, 2, 3, 16, 63, 64, 128, 4096, 2**20, 2**31, 2**40, 2**63 - 1)


def altered(random: Random, made: Plan) -> Plan:
    """A plan with some numbers replaced, of rows, constants, or its own."""
    rows, constants = made.rows.copy(), made.constants.copy()
    for _ in range(int(random.integers(1, 4))):
        row, column = int(random.integers(len(rows))), int(random.integers(len(FIELDS)))
        value = int(rows[row, column])
        near = (value + 1, value - 1, value + 64, value - 64, 2 * value, value // 2, int(random.choice(rows[row])))
        rows[row, column] = _within(near[int(random.integers(len(near)))] if random.random() < 0.6 else
                                    ODD[int(random.integers(len(ODD)))])  # fmt: skip
    if random.random() < 0.3:
        numbers = constants[: len(constants) // 4 * 4].view(np.int32)
        numbers[random.integers(len(numbers))] = random.choice([0, 1, -1, 7, 2**20, int(random.integers(2**31))])
    if random.random() < 0.1:
        constants = constants[: int(random.integers(1, len(constants)))]
    if random.random() < 0.1:
        made = replace(made, arena_bytes=_within(made.arena_bytes + int(random.choice([-64, -1, 1, 64, -4096]))))
    if random.random() < 0.05:
        made = replace(made, layout=WORDS + NIBBLES - made.layout)
    return replace(made, rows=rows, constants=constants)


def _within(number: int) -> int:
    return max(-(2**63), min(number, 2**63 - 1))


def mixed(random: Random, made: Plan, other: Plan) -> Plan:
    """A plan with rows, or fields of rows, of another."""
    rows = made.rows.copy()
    for _ in range(int(random.integers(1, 4))):
        row, source = rows[int(random.integers(len(rows)))], other.rows[int(random.integers(len(other.rows)))]
        taken = random.random(len(FIELDS)) < random.choice([0.05, 0.3, 1.0])
        row[taken] = source[taken]
    return replace(made, rows=random.permutation(rows) if random.random() < 0.2 else rows)


def filled(random: Random, made: Plan) -> Plan:
    """Rows with random numbers that are small and often fit each other, over the constants of a plan."""
    rows = np.full((int(random.integers(1, 4)), len(FIELDS)), -1, np.int64)
    places = np.array([-1, 0, 64, 128, 1024, 4096])
    for row in rows:
        sides = random.integers(1, 6, 2)
        channels, outputs = random.choice([1, 3, 16, 17, 32], 2)
        row[:] = random.integers(0, 4, len(FIELDS))
        names = {
            "operation": random.integers(COPY, PRODUCT + 2), "height": sides[0], "width": sides[1],
            "channels": channels, "pitch": -(-channels // 16) * 16,
            "outputs": outputs, "out_pitch": -(-outputs // 16) * 16, "steps": 0,
            "groups": random.choice([1, 1, 2, 3]), "is_mean": random.integers(2), "classes": random.integers(1, 5),
        }  # fmt: skip
        for name in ("x", "y", "signs", "residual", "program", "vectors", "thresholds", "weight", "scratch", "windows",
                     "tables", "sums", "other"):  # fmt: skip
            names[name] = random.choice(places)
        if random.random() < 0.5 and names["operation"] not in (FLOAT, BINARY):
            names |= {"out_height": sides[0], "out_width": sides[1], "outputs": channels, "out_pitch": names["pitch"]}
        if random.random() < 0.5:
            names |= {"signs": -1, "thresholds": -1}
        for name, value in names.items():
            row[FIELDS.index(name)] = value
    return replace(made, rows=rows, arena_bytes=2**15)


def plans(seed: int, count: int, first: int) -> Iterator[tuple[str, Plan]]:
    """The kinds and the plans from number ``first`` on."""
    start = np.random.default_rng(seed)
    whole = [plan(fuse(lower(file)), file.input_size, layout)
             for file in (network(start) for _ in range(40)) for layout in (WORDS, NIBBLES)]  # fmt: skip
    for number in range(first, first + count):
        random = np.random.default_rng([seed, number])
        made, other = (whole[int(random.integers(len(whole)))] for _ in range(2))
        kind = ("altered", "altered", "mixed", "random")[number % 4]
        if kind == "altered":
            yield kind, altered(random, made)
        elif kind == "mixed":
            yield kind, mixed(random, made, other)
        else:
            yield kind, filled(random, made)


def packed(made: Plan) -> bytes:
    """A plan as the driver reads it."""
    sizes = [
        len(made.rows),
        len(made.constants),
        made.arena_bytes,
        made.inputs,
        sum(map(math.prod, made.results)),
        made.layout,
    ]
    return np.array(sizes, np.int64).tobytes() + made.rows.tobytes() + made.constants.tobytes()


def outcomes(driver: Path, folder: Path, batch: Sequence[Plan]) -> list[str]:
    """What became of each plan; after a report the driver starts again behind it."""
    file = folder / "plans"
    file.write_bytes(b"".join(map(packed, batch)))
    found: list[str] = []
    while len(found) < len(batch):
        done = subprocess.run([driver, file, str(len(found))], capture_output=True, text=True, check=False)
        for line in done.stdout.split():
            found.append(f"refused: {STATUS[int(line)]}" if line.isdigit() else line)
        if len(found) < len(batch):
            told = [line for line in done.stderr.splitlines() if "error" in line or "SUMMARY" in line]
            found.append(f"failed: {' '.join(told)[:400] or f'exit {done.returncode}'}")
    return found


def main() -> None:
    """Run plans and files, print the outcomes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=2000)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first plan and file")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        driver, last = build(folder), args.first + args.plans
        for first in range(args.first, last, BATCH):
            batch = list(plans(args.seed, min(BATCH, last - first), first))
            results = outcomes(driver, folder, [made for _, made in batch])
            for number, ((kind, _), what) in enumerate(zip(batch, results, strict=True), first):
                counts.setdefault(f"plans, {kind}", Counter())[
                    what.partition(":")[0] if "failed" in what else what
                ] += 1
                if what.startswith("failed"):
                    failures.append({"kind": kind, "seed": args.seed, "index": number, "what": what})
                    print(f"  {kind} {number}: {what}", flush=True)
    rows: list[dict[str, Any]] = [
        {"kind": kind, "files": found.total(), "outcomes": dict(found)} for kind, found in counts.items()
    ]
    print(f"{args.plans:,} plans in {time.perf_counter() - start:.0f} s")
    if args.files:
        row, failed = fuzz.examine("runtime", args, range(args.first, args.first + args.files))
        rows.append(row)
        failures += [failure.__dict__ for failure in failed]
    print(json.dumps(rows, indent=1))
    if args.output:
        options = {key: value for key, value in vars(args).items() if key != "output"}
        found = {"environment": dict(environment(torch.device("cpu"))), "machine": processor(), "options": options}
        found |= {"sanitizers": " ".join(SANITIZERS), "instruction sets": list(VARIANTS)}
        args.output.write_text(json.dumps(found | {"rows": rows, "failures": failures}, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
