"""How fast the runtime in C is: against onnxruntime, OpenVINO and ``PackedModel``, and against the machine's limit.

The forms of a network take turns in one process (``bonn_qat.bench``): onnxruntime with the float network and with its
static int8 quantization, OpenVINO, if it is installed, with the float network and with its 3x3 convolutions binary,
``PackedModel``, and the runtime with each instruction set that the machine runs but ``plain``, which takes a hundred
times as long. Ratios are to onnxruntime with the float network in the same round. One thread unless said, whose CPU
time is measured: on a shared machine it means more than the time of day. Then:

- ``threads``: images per second with two threads, as a ratio to one, by the time of day, in the fastest calls;
- ``starts``: CPU seconds of a new process that ends with its first result, and its largest memory;
- ``layers``: each row of the plans for itself, or those that take turns together, and the share of binary ones of what
  ``limit.c`` measures of the processor: as many products of signs in a cycle as its instructions allow, without loads.

Example, for the table of the README::

    python benchmarks/runtime.py --output FILE.json
    python benchmarks/runtime.py --networks resnet18 wrn10_16 --rounds 5
"""

import argparse
import ctypes
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from bonn_qat_runtime import Network, UnsupportedOperator, library
from bonn_qat_runtime.files import read_packed
from bonn_qat_runtime.fuse import fuse
from bonn_qat_runtime.lower import lower
from bonn_qat_runtime.plan import BINARY, COPY, DEPTHWISE, FIELDS, FLOAT, POINTWISE, POOL, RESULT, plan
from measuring import alternate, heading
from packed_runtime import made
from torch import Tensor

import bonn_qat
from bonn_qat.bench import BACKENDS, bench
from bonn_qat.bench.backends import Backend, BackendMissing, Networks
from bonn_qat.bench.engines import Run
from bonn_qat.binarization.binarize import binary_layers

CPU = "BONN_QAT_RUNTIME_CPU"
REFERENCE = "onnxruntime float"
NAMES = {
    COPY: "copy", POINTWISE: "epilogue", POOL: "pool", FLOAT: "float", DEPTHWISE: "depthwise", BINARY: "binary",
    RESULT: "result",
}  # fmt: skip
MCPU = {"v3": "x86_64_v3", "v4": "x86_64_v4+avx512vpopcntdq"}


class Case(NamedTuple):
    """The pixels of a network, and for each batch the ratios that v4 and v3 aim at."""

    pixels: int
    aims: Mapping[int, tuple[float, float]]


# The table of the issue; an aim of 1 is "never below float".
CASES: Mapping[str, Case] = {
    "resnet18": Case(224, {1: (6.5, 4.5), 32: (6, 4)}),
    "wrn22_64": Case(32, {1: (10, 6), 32: (10, 6)}),
    "wrn22_16": Case(32, {1: (3.2, 2), 32: (4.5, 2)}),
    "wrn10_16": Case(32, {1: (2.3, 1.5), 32: (3, 1.5)}),
    "mobilenetv2_100": Case(224, {1: (2.4, 1.5)}),
    "mobilenetv3_large_100": Case(224, {1: (1, 1)}),
    "convnext_tiny": Case(224, {1: (1, 1)}),
    "efficientnet_b0": Case(224, {1: (1, 1)}),
    "vit_tiny_patch16_224": Case(224, {1: (1, 1)}),
}

# What a new process runs, and how it ends.
STARTS = {
    "runtime": "import sys, numpy; from bonn_qat_runtime import Network; net = Network(sys.argv[1]); "
    "net(numpy.zeros((1, *net.input_size), numpy.float32))",
    "PackedModel": "import sys, torch; torch.set_num_threads(1); from bonn_qat import PackedModel; "
    "net = PackedModel.load(sys.argv[1]); net(torch.zeros(1, *net.input_size))",
    REFERENCE: "import sys, numpy, onnxruntime as o; s = o.SessionOptions(); s.intra_op_num_threads = 1; "
    "net = o.InferenceSession(sys.argv[2], s); "
    "net.run(None, {net.get_inputs()[0].name: numpy.zeros([1, *net.get_inputs()[0].shape[1:]], numpy.float32)})",
}
END = (
    "import os, re, time; print(time.process_time(), re.search('VmHWM: *\\t* *([0-9]+)', "
    "open('/proc/self/status').read())[1], flush=True); os._exit(0)"
)


def main() -> None:
    """Measure, print the tables and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES), metavar="NETWORK")
    parser.add_argument("--scheme", default="bonn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args.device = "cpu"
    document = heading(args) | {"limits": limits(), "networks": {}}
    for name in args.networks:
        document["networks"][name] = found = measure(name, args)
        if args.output:
            args.output.write_text(json.dumps(document, indent=1) + "\n")
        print("\n".join(tables(name, found, document["limits"])), flush=True)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about a network; or, under "lacks", what the runtime lacks for it."""
    case = CASES[name]
    size = (3, case.pixels, case.pixels)
    model_float = timm.create_model(name).eval().requires_grad_(False)
    model_binary = made(name, args.scheme, case.pixels)
    binary = len(list(binary_layers(model_binary)))
    with tempfile.TemporaryDirectory() as folder:
        packed, onnx = bonn_qat.pack(model_binary, size).save(Path(folder, "net")), Path(folder, "float.onnx")
        try:
            Network(packed)
        except UnsupportedOperator as error:
            return {"lacks": str(error).replace(f"{packed}: ", "")}
        backends = {key: BACKENDS[key] for key in (REFERENCE, "onnxruntime int8", "packed")}
        backends |= {"openvino float": openvino(onnx, 0), "openvino binary": openvino(onnx, binary)}
        backends |= {f"runtime {cpu}": runtime(packed, cpu) for cpu in library.cpus() if cpu in MCPU}
        backends[REFERENCE] = kept(onnx)
        report = bench(
            model_float, model_binary, size, name=name, batches=list(case.aims), threads=[1], rounds=args.rounds,
            backends=backends, clock=time.process_time,
        )  # fmt: skip
        return {
            "bench": report.to_json(),
            "threads": threads(packed, args.rounds),
            "starts": starts(packed, onnx, max(3, args.rounds // 4)),
            "layers": {cpu: layers(packed, cpu, args.rounds) for cpu in library.cpus() if cpu in MCPU},
        }


def kept(path: Path) -> Callable[[Networks], Backend]:
    """onnxruntime with the float network, whose file is kept at ``path``."""

    def make(networks: Networks) -> Backend:
        backend = BACKENDS[REFERENCE](networks)
        shutil.copyfile(networks.directory / "float.onnx", path)
        return backend

    return make


def runtime(path: Path, cpu: str, threads: int = 1) -> Callable[[Networks], Backend]:
    """The runtime in C with an instruction set."""

    def make(networks: Networks) -> Backend:
        network = loaded(path, cpu, threads)

        def run(threads: int, images: Tensor) -> Run:
            array = images.numpy()
            return lambda: network(array)

        return Backend(make=run, size_bytes=path.stat().st_size, note=f"bonn_qat_runtime, {cpu}")

    return make


def loaded(path: Path, cpu: str, threads: int = 1) -> Network:
    """A network that uses this instruction set."""
    before = os.environ.get(CPU)
    os.environ[CPU] = cpu
    try:
        return Network(path, threads=threads)
    finally:
        os.environ.pop(CPU) if before is None else os.environ.update({CPU: before})


def openvino(path: Path, binary: int) -> Callable[[Networks], Backend]:
    """OpenVINO with the float network, in float32, of which ``binary`` convolutions become binary, or all stay float.

    The binary ones have random weights, a threshold in front of each sign and a scale for each filter. Raises
    BackendMissing without OpenVINO, or if the network's 3x3 convolutions are not ``binary`` many.
    """

    def make(networks: Networks) -> Backend:
        try:
            import openvino as ov
        except ImportError as error:
            raise BackendMissing("needs openvino") from error

        def run(threads: int, images: Tensor) -> Run:
            options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
            model = ov.Core().read_model(path)
            model.reshape([len(images), *images.shape[1:]])
            if binary:
                make_binary(model, binary)
            request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
            array = images.numpy()
            return lambda: request.infer([array], share_inputs=True)

        what = f"{binary} binary convolutions" if binary else "f32"
        return Backend(make=run, size_bytes=path.stat().st_size, note=f"OpenVINO {ov.__version__}, {what}, one stream")

    return make


def make_binary(model: Any, binary: int) -> None:
    """Replace the 3x3 convolutions of an OpenVINO model but the first by binary ones of random weights."""
    import openvino as ov
    import openvino.opset8 as ops

    generator = np.random.default_rng(0)
    low, high = (ops.constant(np.full((1, 1, 1, 1), sign, np.float32)) for sign in (-1, 1))
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"][1:]
    found = [node for node in convolutions if list(node.input(1).get_shape())[2:] == [3, 3]]
    if len(found) != binary:
        raise BackendMissing(f"{len(found)} convolutions of 3x3, but {binary} binary layers")
    for node in found:
        shape = list(node.input(1).get_shape())
        threshold, scale = (
            ops.constant(generator.standard_normal((1, size, 1, 1), np.float32)) for size in (shape[1], shape[0])
        )
        signs = ops.fake_quantize(node.input_value(0), threshold, threshold, low, high, 2)
        bits = generator.integers(0, 2, shape, np.uint8).ravel().tolist()
        geometry = node.get_attributes()
        sums = ov.opset1.binary_convolution(
            signs, ov.op.Constant(ov.Type.u1, ov.Shape(shape), bits), geometry["strides"], geometry["pads_begin"],
            geometry["pads_end"], geometry["dilations"], "xnor-popcount", 0.0,
        )  # fmt: skip
        node.output(0).replace(ops.multiply(sums, scale).output(0))


def threads(path: Path, rounds: int) -> float:
    """How much faster two threads are than one, for 32 images and by the time of day: the fastest calls of each.

    On a shared machine only those had both cores for themselves.
    """
    images = np.random.default_rng(0).standard_normal((32, *Network(path).input_size), np.float32)

    def timer(network: Network) -> Callable[[], float]:
        def turn() -> float:
            start = time.perf_counter()
            network(images)
            return time.perf_counter() - start

        turn()
        return turn

    times = alternate({"one": timer(Network(path)), "two": timer(Network(path, threads=2))}, 10 * rounds)
    return min(times["one"]) / min(times["two"])


def starts(packed: Path, onnx: Path, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds from the start of a process to its first result, and its largest memory in KiB: medians."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in STARTS}
    for _, (name, script) in itertools.product(range(rounds + 1), STARTS.items()):
        command = [sys.executable, "-c", f"{script}; {END}", str(packed), str(onnx)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        cpu_seconds, kib = done.stdout.split()
        found[name].append((float(cpu_seconds), int(kib)))
    names = ("cpu_seconds", "kib")
    return {
        # The first one fills caches.
        name: dict(zip(names, map(statistics.median, zip(*values[1:], strict=True)), strict=True))
        for name, values in found.items()
    }


def limits() -> dict[str, dict[str, float]]:
    """For each instruction set the clock in GHz and the most products of signs in a cycle."""
    found = {}
    for cpu in (cpu for cpu in library.cpus() if cpu in MCPU):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "limit.so")
            source = Path(__file__).with_name("limit.c")
            command = [sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", f"-mcpu={MCPU[cpu]}"]
            subprocess.run([*command, str(source), "-o", str(path)], check=True)
            limit = ctypes.CDLL(str(path))
            limit.cycles.argtypes = limit.multiply.argtypes = (ctypes.c_uint64,)
            hertz = 8 / seconds(limit.cycles)
            products = ctypes.c_uint64.in_dll(limit, "products").value / seconds(limit.multiply)
            found[cpu] = {"ghz": hertz / 1e9, "products": products / hertz}
    return found


def seconds(loop: Callable[[int], object], count: int = 200_000, rounds: int = 50) -> float:
    """Seconds of one round of a loop, in the fastest call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        loop(count)
        times.append(time.perf_counter() - start)
    return min(times) / count


def layers(path: Path, cpu: str, rounds: int) -> list[dict[str, Any]]:
    """Each row of the plan as a call of its own, in the order of the plan: microseconds and products of signs."""
    file, layout = read_packed(path), library.layout(cpu)
    whole = plan(fuse(lower(file)), file.input_size, layout)
    parts, turns = [], FIELDS.index("turns")
    rest = whole.rows
    while len(rest):
        count = 1 + rest[0, turns]
        parts.append(rest[:count])
        rest = rest[count:]
    programs = [library.Program(replace(whole, rows=rows), cpu) for rows in parts]
    # One arena for all of them, so that each row finds in the caches what the one before left there.
    arenas = programs[0]._arenas
    images = np.random.default_rng(0).standard_normal((1, whole.inputs), np.float32)
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(2 * rounds):
        for program, of in zip(programs, times, strict=True):
            program._arenas = arenas
            start = time.thread_time_ns()
            program(images)
            of.append((time.thread_time_ns() - start) / 1e3)
    call = min(min(of) for of in times)  # of the smallest row: what a call itself takes
    found = []
    for rows, of in zip(parts, times, strict=True):
        names = [described(dict(zip(FIELDS, row, strict=True))) for row in rows.tolist()]
        part = names[0] if len(names) == 1 else {"row": "; ".join(name["row"] for name in names)}
        found.append(part | {"us": statistics.median(of) - call})
    return found


def described(row: Mapping[str, int]) -> dict[str, Any]:
    """What a row computes, in words, and how many products of signs that are."""
    kind = NAMES.get(row["operation"], "other")
    size = f"{row['channels']}, {row['height']}x{row['width']}"
    if row["operation"] not in (FLOAT, BINARY, DEPTHWISE):
        return {"row": f"{kind} {size}"}
    taps = row["kernel_height"] * row["kernel_width"]
    filters = f"{row['outputs']}, {row['kernel_height']}x{row['kernel_width']}/{row['stride_y']}"
    products = row["out_height"] * row["out_width"] * row["outputs"] * taps * row["channels"] // row["groups"]
    return {"row": f"{kind} {size} -> {filters}"} | ({"products": products} if row["operation"] == BINARY else {})


def tables(name: str, found: Mapping[str, Any], most: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """What was measured, as lines of text."""
    if "lacks" in found:
        yield f"{name}: {found['lacks']}"
        return
    report, case = found["bench"], CASES[name]
    for batch, aims in case.aims.items():
        yield f"{name}, {case.pixels} pixels, batch {batch}"
        aim = dict(zip(("runtime v4", "runtime v3"), aims, strict=True))
        for row in report["latencies"]:
            if row["batch"] == batch:
                low, high = row["quartiles_speedup"]
                wanted = f"  aim {aim[row['backend']]:g}" if row["backend"] in aim else ""
                yield (
                    f"  {row['backend']:18}{row['median_milliseconds']:10.3f} ms{row['median_speedup']:8.2f}"
                    f" ({low:.2f} to {high:.2f}){wanted}"
                )
    yield "  left out: " + "; ".join(f"{k}: {v}" for k, v in (report["missing"] | report["failures"]).items())
    yield f"  two threads: {found['threads']:.2f}"
    for arm, start in found["starts"].items():
        yield f"  start of {arm}: {start['cpu_seconds']:.2f} s of CPU, {start['kib'] / 1024:.0f} MiB"
    for cpu, rows in found["layers"].items():
        total = sum(row["us"] for row in rows)
        binary = [row for row in rows if "products" in row]
        us = sum(row["us"] for row in binary)
        limit = 1e3 * most[cpu]["ghz"] * most[cpu]["products"]  # products in a microsecond
        shares = [row["products"] / row["us"] / limit for row in binary]
        yield (
            f"  {cpu}: {total:.0f} us, of which binary {us:.0f}: "
            f"{sum(row['products'] for row in binary) / us / limit:.0%} of {most[cpu]['products']:.0f} products a "
            f"cycle, by layer {min(shares):.0%} to {max(shares):.0%}"
        )


if __name__ == "__main__":
    main()
