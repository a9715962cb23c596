"""What one training step costs: forward, loss, backward and SGD, for a float network and its binary forms.

The arms take turns in one run, each round in another order, so that noise of the machine hits all alike:
only the ratios of one run mean something. Example::

    python benchmarks/training_step.py --batch 64 4 --rounds 15 --output step.json
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch._dynamo
from torch import nn

import bonn_qat
import bonn_qat.models
from bonn_qat.layers import BinaryConv2d

BASE = "float"
ARMS = (
    BASE, "binary", "binary + kernel loss", "binary + both losses",
    "brevitas stock", "brevitas bonn", "brevitas bonn, no QuantTensor",
)  # fmt: skip


def main() -> None:
    """Measure, print a table for each batch size, and write all of it where ``--output`` says."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    # Without it the arm that taps the features would run the code compiled for one of the same shape that does not.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    results = []
    for batch in args.batch:
        times = measure(args, batch)
        results.append({"batch": batch, "arms": summarize(times), "seconds": times})
        print(f"\n{args.model}, batch {batch}, {args.size}x{args.size}, {args.device}, {args.threads} thread(s)")
        print(table(results[-1]["arms"]))
    if args.output:
        document = {"options": vars(args) | {"output": None}, "machine": machine(args.device), "results": results}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(args: argparse.Namespace, batch: int) -> dict[str, list[float]]:
    """Seconds of one step, a list with one entry for each round, by arm."""
    arms = {name: _step(name, args, batch) for name in args.arms}
    for step in arms.values():
        for _ in range(args.warmup):
            step()
    clock = time.process_time if args.clock == "process" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for _ in range(args.rounds):
        order.append(order.pop(0))
        for name in order:
            _synchronize(args.device)
            start = clock()
            for _ in range(args.repeat):
                arms[name]()
            _synchronize(args.device)
            times[name].append((clock() - start) / args.repeat)
    return times


def summarize(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each arm, and the ratio to the first arm: of the medians, and over the rounds."""
    base = next(iter(times.values()))
    summary = {}
    for name, seconds in times.items():
        ratios = [mine / other for mine, other in zip(seconds, base, strict=True)]
        summary[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "fastest_ms": 1e3 * min(seconds),
            "ratio_of_medians": statistics.median(seconds) / statistics.median(base),
            "ratio_min": min(ratios),
            "ratio_median": statistics.median(ratios),
            "ratio_max": max(ratios),
        }
    return summary


def table(summary: dict[str, dict[str, float]]) -> str:
    """The summary as text; the ratios are those of single rounds, the last column compares the fastest ones."""
    base = next(iter(summary.values()))
    lines = [f"{'arm':32}{'median ms':>11}{'ratio':>8}{'min':>7}{'max':>7}{'fastest':>9}"]
    for name, row in summary.items():
        lines.append(
            f"{name:32}{row['median_ms']:11.1f}{row['ratio_median']:8.2f}{row['ratio_min']:7.2f}"
            f"{row['ratio_max']:7.2f}{row['fastest_ms'] / base['fastest_ms']:9.2f}"
        )
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "platform": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _step(arm: str, args: argparse.Namespace, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = _network(arm, args).to(args.device).train()
    # The losses look at the modules, not at the compiled wrapper around them.
    losses: list[Callable[[torch.Tensor], torch.Tensor]] = []
    extra: list[nn.Module] = []
    if "loss" in arm:
        kernel = bonn_qat.KernelLoss(model)
        extra.append(kernel)
        losses.append(lambda targets: kernel())
    if "both" in arm:
        feature = bonn_qat.FeatureLoss(model)
        extra.append(feature)
        losses.append(feature)
    parameters = [p for module in (model, *extra) for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    network: Callable[[torch.Tensor], torch.Tensor] = torch.compile(model) if args.compile else model
    images = torch.randn(batch, 3, args.size, args.size, device=args.device)
    targets = torch.randint(args.classes, (batch,), device=args.device)

    def step() -> None:
        loss = nn.functional.cross_entropy(network(images), targets)
        for term in losses:
            loss = loss + term(targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _network(arm: str, args: argparse.Namespace) -> nn.Module:
    model: nn.Module = timm.create_model(args.model, num_classes=args.classes)
    if arm == BASE:
        return model
    model = bonn_qat.binarize(model, args.scheme)
    return _brevitas_form(model, arm) if arm.startswith("brevitas") else model


def _brevitas_form(model: nn.Module, arm: str) -> nn.Module:
    """The binarized model with Brevitas' layers in place of ours: the norm, a QuantIdentity and a QuantConv2d."""
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


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn22_16", help="a timm model (default: %(default)s)")
    parser.add_argument("--scheme", default="bonn")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help=f"of {ARMS}")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 4])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=1, help="steps in one timing")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each arm before the first round")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "process"], help="process: CPU time, for a machine with other work"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every arm's network")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args(argv)
    if BASE in args.arms:
        args.arms.remove(BASE)
    args.arms = [BASE, *args.arms]
    return args


if __name__ == "__main__":
    main()
