"""Measure the cost of a training step: forward, losses, backward and SGD, for a float network and its binary forms.

The arms take turns in one run, each round in another order, so that noise of the machine affects all alike; only
ratios within one run are meaningful. ``--compile`` runs each arm eagerly and compiled, losses included. Examples::

    python benchmarks/training_step.py --batch 64 128 --channels-last --compile --clock process --output step.json
    python benchmarks/training_step.py --device cuda --batch 128 1024 --channels-last --precision float16 \\
        --compile default reduce-overhead --rounds 30 --output step-cuda.json

The file that ``--output`` names is JSON: ``options`` of the command line, ``environment`` (versions, commit),
``machine``, and ``results``, one for each batch size: ``batch``, ``arms`` (the summary of each, see :func:`summarize`;
a compiled arm is named "ARM, MODE"), ``seconds`` (of one step, a list with one entry for each round, by arm),
``first_step_seconds`` (with compilation), and on a GPU ``synchronizations`` of the host in one step, which should be 0.
"""

import argparse
import contextlib
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch._dynamo
from torch import nn

import bonn_qat
from bonn_qat.environment import environment, processor
from bonn_qat.layers import BinaryConv2d
from bonn_qat.training.network import to_memory_format
from bonn_qat.training.precision import matmul_precision

BASE = "float"
REGULARIZERS = {"binary + kernel loss": {"kernel": 1e-4}, "binary + both losses": {"kernel": 1e-4, "feature": 1e-3}}
DEFAULT_ARMS = (BASE, "binary", *REGULARIZERS, "brevitas stock")
ARMS = (*DEFAULT_ARMS, "brevitas bonn", "brevitas bonn, no QuantTensor")
EPOCH = 50_000  # images
BF16_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}  # dense, from NVIDIA's data sheets

Times = dict[str, list[float]]
Step = Callable[[], None]


def main() -> None:
    """Measure, print a table for each batch size, and write the results to ``--output``."""
    args = arguments()
    prepare(args)
    found = dict(environment(torch.device(args.device)))  # now: a commit during the measurement is not what runs
    results = []
    with matmul_precision(args.precision):
        for batch in args.batch:
            results.append(measure(args, batch))
            print(f"\n{args.model}, batch {batch}, {args.size}x{args.size}, {args.device}, {args.precision}")
            print(table(results[-1]["arms"]), flush=True)
    if args.output:
        document = {
            "options": vars(args) | {"output": None},
            "environment": found,
            "machine": machine(args.device),
            "results": results,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n")


def prepare(args: argparse.Namespace) -> None:
    """Configure torch as the options say."""
    torch.set_num_threads(args.threads)
    # The search for the fastest convolution happens in the warm-up steps.
    torch.backends.cudnn.benchmark = True
    # To the compiler, all arms are one function with several compiled versions. Without hooks in the guards, the arm
    # that taps the features would run the version of an arm of the same shape that does not.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def measure(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Time every arm; returns the entry of ``results`` for this batch size."""
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    flops: dict[str, float] = {}
    for arm in args.arms:
        for mode in (None, *args.compile):
            name = arm if mode is None else f"{arm}, {_label(mode)}"
            steps[name], flops[name] = make_step(arm, args, batch, mode)
            start = time.perf_counter()
            steps[name]()
            synchronize(args.device)
            first[name] = time.perf_counter() - start
            for _ in range(args.warmup):
                steps[name]()
    result: dict[str, Any] = {"batch": batch, "first_step_seconds": first}
    if args.device == "cuda":
        result["synchronizations"] = {name: _synchronizations(step) for name, step in steps.items()}
    times = alternate(steps, args)
    return result | {"arms": summarize(times, batch, flops, args.peak_tflops), "seconds": times}


def alternate(steps: dict[str, Step], args: argparse.Namespace) -> Times:
    """Seconds of one step, per arm, in rounds that each start with another arm."""
    clock = time.process_time if args.clock == "process" else time.perf_counter
    times: Times = {name: [] for name in steps}
    order = list(steps)
    for _ in range(args.rounds):
        order.append(order.pop(0))
        for name in order:
            synchronize(args.device)
            start = clock()
            for _ in range(args.repeat):
                steps[name]()
            synchronize(args.device)
            times[name].append((clock() - start) / args.repeat)
    return times


def summarize(times: Times, batch: int, flops: dict[str, float], peak: float | None) -> dict[str, dict[str, Any]]:
    """Per arm: milliseconds, images per second, seconds per epoch, ratios, and TFLOP/s.

    ``to`` holds ratios to the float arm of the same round, eager and in each compile mode: median, smallest, largest.
    A MAC counts as two FLOPs, and the backward pass as two forward passes; ``share_of_peak`` is relative to ``peak``,
    in TFLOP/s.
    """
    summary: dict[str, dict[str, Any]] = {}
    bases = [name for name in times if name.partition(",")[0] == BASE]
    for name, seconds in times.items():
        median = statistics.median(seconds)
        tflops = flops[name] / median / 1e12
        summary[name] = {
            "median_ms": 1e3 * median,
            "fastest_ms": 1e3 * min(seconds),
            "images_per_second": batch / median,
            "epoch_seconds": EPOCH / batch * median,
            "tflops": tflops,
            "share_of_peak": tflops / peak if peak else None,
            "to": {base: _ratios(seconds, times[base]) for base in bases},
        }
    return summary


def _ratios(mine: list[float], base: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The summary as text; ratios are medians over the rounds, with the smallest and the largest."""
    bases = list(next(iter(summary.values()))["to"])
    head = f"{'arm':40}{'ms':>9}{'images/s':>10}{'s/epoch':>9}"
    lines = [head + "".join(f"{'to ' + base:>26}" for base in bases) + f"{'TFLOP/s':>9}{'of peak':>9}"]
    for name, row in summary.items():
        ratios = (row["to"][base] for base in bases)
        cells = "".join(f"{r['median']:12.3f} ({r['min']:.2f} to {r['max']:.2f})" for r in ratios)
        share = "-" if row["share_of_peak"] is None else f"{row['share_of_peak']:.2%}"
        lines.append(
            f"{name:40}{row['median_ms']:9.1f}{row['images_per_second']:10.0f}{row['epoch_seconds']:9.1f}{cells}"
            f"{row['tflops']:9.3f}{share:>9}"
        )
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """The machine of the measurement."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "platform": platform.system(),
    }


def make_step(arm: str, args: argparse.Namespace, batch: int, mode: str | None) -> tuple[Step, float]:
    """A function that does one step of ``arm``, eager or compiled in ``mode``, and the FLOPs of its network."""
    torch.manual_seed(0)
    model = _network(arm, args).to(args.device)
    report = bonn_qat.summary(model, (3, args.size, args.size))
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    objective = bonn_qat.Objective(model, regularizers=REGULARIZERS.get(arm, {})).to(args.device).train()
    to_memory_format(model, layout)
    groups = bonn_qat.parameter_groups(objective, lr=1e-3, weight_decay=1e-4)
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True, fused=True)
    images = torch.randn(batch, 3, args.size, args.size, device=args.device).contiguous(memory_format=layout)
    targets = torch.randint(args.classes, (batch,), device=args.device)
    forward: Callable[..., Any] = objective if mode is None else torch.compile(objective, mode=mode)
    half = args.precision == "float16"
    scaler = torch.amp.GradScaler(args.device, enabled=half)

    def step() -> None:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # Before the forward pass, because the next CUDA graph overwrites the memory of the gradients.
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.float16, enabled=half):
            loss = forward(images, targets).total
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step, 2.0 * 3 * report.macs * batch


def _network(arm: str, args: argparse.Namespace) -> nn.Module:
    model: nn.Module = timm.create_model(args.model, num_classes=args.classes)
    if arm == BASE:
        return model
    model = bonn_qat.binarize(model, args.scheme, input_size=(3, args.size, args.size))
    return _brevitas_form(model, arm) if arm.startswith("brevitas") else model


def _brevitas_form(model: nn.Module, arm: str) -> nn.Module:
    """The binarized model with Brevitas' layers instead of ours: the norm, a QuantIdentity and a QuantConv2d."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import brevitas.nn as qnn
        from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst

        from bonn_qat.adapters import brevitas as adapter

    if "stock" in arm:
        weight, act = SignedBinaryWeightPerTensorConst, SignedBinaryActPerTensorConst
    else:
        weight = adapter.SignedBinaryBonnWeightPerTensorFloat
        act = adapter.SignedBinaryBonnActPerTensorConst
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BinaryConv2d):
            conv = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, bias=layer.bias is not None, weight_quant=weight,
            )  # fmt: skip
            conv.load_state_dict({key: copy.deepcopy(value) for key, value in layer.named_parameters(recurse=False)})
            form = nn.Sequential(layer.norm, qnn.QuantIdentity(act_quant=act), conv)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, form)
    return adapter.skip_quant_tensors(model) if "no QuantTensor" in arm else model


def _label(mode: str) -> str:
    return "compiled" if mode == "default" else mode


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def _synchronizations(step: Step) -> int:
    with _watched_synchronizations() as caught:
        step()
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def _watched_synchronizations() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; the float arm is always included and comes first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn22_16", help="a timm model (default: %(default)s)")
    parser.add_argument("--scheme", default="bonn")
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS, choices=ARMS, metavar="ARM", help=f"of {ARMS}")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, help="steps in one timing (default: 1, on a GPU 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each arm before the first round")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "process"], help="process: CPU time, for a machine with other work"
    )
    parser.add_argument(
        "--compile", nargs="*", metavar="MODE", choices=["default", "reduce-overhead", "max-autotune"],
        help="add a compiled form of each arm, for each of these modes of torch.compile (without a value: default)",
    )  # fmt: skip
    parser.add_argument("--channels-last", action="store_true", help="images and weights in channels_last")
    parser.add_argument(
        "--precision", default="float32", choices=["float32", "tf32", "float16"],
        help="tf32 is for GPUs; float16 is autocast with loss scaling",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--peak-tflops", type=float, help="dense bf16 peak of the device, for its share (known: H100 SXM, H200)"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args(argv)
    args.arms = [BASE, *(arm for arm in args.arms if arm != BASE)]
    args.compile = [] if args.compile is None else args.compile or ["default"]
    on_gpu = args.device == "cuda"
    args.repeat = args.repeat or (10 if on_gpu else 1)
    if on_gpu and args.clock == "process":
        parser.error("--clock process counts the CPU's time; a GPU's needs --clock wall")
    if on_gpu and args.peak_tflops is None:
        args.peak_tflops = BF16_TFLOPS.get(torch.cuda.get_device_name())
    return args


if __name__ == "__main__":
    main()
