"""Where the time of a training step goes: measured with torch.profiler, and again by leaving each part out.

The modules of the network are ranges of the profile, and autograd's sequence numbers assign backward operations to
forward ones, so that every part has both. Shares are relative to the profiled step; milliseconds are these shares of a
step without the profiler. On a GPU, kernels are counted, and the rest of the step is ``waiting`` for the host. As a
check, the step runs without each part, in turns with the whole one, and the convolutions run alone. Examples::

    python benchmarks/profile_step.py --batch 128 --clock process --output profile.json --page
    python benchmarks/profile_step.py --device cuda --batch 128 1024 --output profile-cuda.json
    python benchmarks/profile_step.py --input profile.json --page

The file is JSON: ``options``, ``environment``, ``machine``, ``before`` (the environment of the other checkout that
``--against`` names, or null), and ``results``, one for each net and batch size: ``net``, ``batch``, ``step_ms``,
``profiled_step_ms`` and ``parts``; each part has ``forward_ms``, ``backward_ms``, ``share`` and ``check_ms``, its cost
by the second method, or null if it has none.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import (
    BEFORE,
    PAGE,
    Child,
    alternate,
    heading,
    plain,
    report,
    serve,
    subtitle,
    synchronize,
    thread_count,
    timer,
)
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity, profile, record_function

import bonn_qat
from bonn_qat import functional
from bonn_qat.engine import operators
from bonn_qat.engine.functions import Estimator, Norm, sign_product
from bonn_qat.layers import BinaryConv2d
from bonn_qat.regularizers import FeatureLoss, KernelLoss
from bonn_qat.training.data import TensorData
from bonn_qat.training.network import to_memory_format

NETS = {"float": None, "BONN": {"kernel": 1e-4, "feature": 1e-3}}
FLOAT_CONVOLUTION, BINARY_CONVOLUTION = "float convolutions", "binary convolutions"
QUANTIZERS, NORM, ACTIVATION, ADDITIONS = "quantizers", "norms", "ReLU, PReLU", "additions"
KERNEL_LOSS, FEATURE_LOSS = "kernel loss", "feature loss"
CLASSIFIER, OPTIMIZER, DATA, OTHER, WAITING = "classifier, task loss", "optimizer", "data", "other", "waiting"
PARTS = (
    FLOAT_CONVOLUTION, BINARY_CONVOLUTION, QUANTIZERS, NORM, ACTIVATION, ADDITIONS,
    KERNEL_LOSS, FEATURE_LOSS, CLASSIFIER, OPTIMIZER, DATA, OTHER, WAITING,
)  # fmt: skip
REMOVABLE = (NORM, ACTIVATION, KERNEL_LOSS, FEATURE_LOSS, OPTIMIZER, DATA)
_RANGE, _BACKWARD = "part: ", "autograd::engine::evaluate_function"
# The first class that matches a module counts; operations in none of them are additions, or other.
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (BinaryConv2d, BINARY_CONVOLUTION), (nn.Conv2d, FLOAT_CONVOLUTION), (nn.BatchNorm2d, NORM),
    (nn.ReLU, ACTIVATION), (nn.PReLU, ACTIVATION), (KernelLoss, KERNEL_LOSS), (FeatureLoss, FEATURE_LOSS),
    (nn.Linear, CLASSIFIER), (nn.AdaptiveAvgPool2d, CLASSIFIER), (nn.CrossEntropyLoss, CLASSIFIER),
)  # fmt: skip


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The document of all measurements."""
    torch.set_num_threads(args.threads)
    document = heading(args)
    other = Child(__file__, args.against) if args.against else None
    results = []
    for batch in args.batch:
        results += [measure(net, batch, args) for net in NETS]
        if other:
            result = other.call("measure", "BONN", batch, plain(args))
            results.append(result | {"net": f"{result['net']}, {BEFORE}"})
    if other:
        other.close()
    return document | {"before": other and other.package, "results": results}


def tables(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    options = document["options"]
    lines = [
        f"{options['model']}, {options['size']}x{options['size']}, float32, {thread_count(options['threads'])}, "
        f"{subtitle(document)}"
    ]
    for result in document["results"]:
        lines += [
            "",
            f"**{result['net']}**, batch {result['batch']}: {result['step_ms']:.0f} ms",
            "",
            "| part | forward, ms | backward, ms | share (%) | left out or alone, ms |",
            "|---|---|---|---|---|",
        ]
        for name, part in result["parts"].items():
            check = "" if part["check_ms"] is None else f"{part['check_ms']:.1f}"
            forward, backward = (f"{part[key]:.1f}" for key in ("forward_ms", "backward_ms"))
            lines.append(f"| {name} | {forward} | {backward} | {100 * part['share']:.1f} | {check} |")
    return "\n".join(lines) + "\n"


def measure(net: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Profile a step of ``net``, and time it as a whole and without each part."""
    parts, profiled = profiled_parts(_Training(net, batch, args, ranges=True), args)
    has = [part for part in REMOVABLE if part in parts]
    trainings = {"": _Training(net, batch, args)} | {part: _Training(net, batch, args, without=part) for part in has}
    convolutions = _convolutions(trainings[""])
    steps: dict[str, Callable[[], None]] = {part: training.step for part, training in trainings.items()} | convolutions
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    times = alternate({name: timer(step, args) for name, step in steps.items()}, args.rounds)
    whole = statistics.median(times[""])
    checks = {part: statistics.median(a - b for a, b in zip(times[""], times[part], strict=True)) for part in has}
    checks |= {part: statistics.median(times[part]) for part in convolutions}
    if args.device == "cuda":
        parts[WAITING] = [max(0.0, whole - sum(map(sum, parts.values()))), 0.0]
    total = sum(map(sum, parts.values()))
    return {
        "net": net,
        "batch": batch,
        "step_ms": 1e3 * whole,
        "profiled_step_ms": 1e3 * profiled,
        "parts": {
            name: {
                "forward_ms": 1e3 * whole * parts[name][0] / total,
                "backward_ms": 1e3 * whole * parts[name][1] / total,
                "share": sum(parts[name]) / total,
                "check_ms": 1e3 * checks[name] if name in checks else None,
            }
            for name in PARTS
            if name in parts
        },
    }


def profiled_parts(training: "_Training", args: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Seconds of each part of a step, forward and backward, and of the whole profiled step."""
    for _ in range(args.warmup):
        training.step()
    synchronize(args.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=activities, acc_events=True) as recorded:
        for _ in range(args.profiled):
            with record_function("step"):
                training.step()
                synchronize(args.device)
    events = [event for event in recorded.events() or [] if event.device_type == DeviceType.CPU]
    parts = _by_part(events, on_gpu=args.device == "cuda")
    whole = sum(event.cpu_time_total for event in events if event.name == "step")
    scale = 1e6 * args.profiled
    return {name: [x / scale for x in seconds] for name, seconds in parts.items()}, whole / scale


def _by_part(events: Sequence[Any], *, on_gpu: bool) -> dict[str, list[float]]:
    steps = [event for event in events if event.name == "step"]
    if not steps:
        raise RuntimeError("the profile contains no step")
    known: dict[int, tuple[str, bool]] = {}
    forward: dict[tuple[int, int], str] = {}

    def place(event: Any) -> tuple[str, bool]:
        """The part that an event belongs to, and whether it is in the backward pass."""
        if id(event) not in known:
            known[id(event)] = find(event)
        return known[id(event)]

    def find(event: Any) -> tuple[str, bool]:
        if event.name.startswith(_RANGE):
            return event.name.removeprefix(_RANGE), False
        if event.name.startswith(_BACKWARD):
            return forward.get((period(event), event.sequence_nr), OTHER), True
        parent = event.cpu_parent
        if event.name in ("aten::add", "aten::add_") and parent is not None:
            # Directly below a node the engine sums gradients; outside of all ranges, those of a shortcut.
            if parent.name.startswith(_BACKWARD):
                return ADDITIONS, True
            if place(parent)[0] == OTHER:
                return ADDITIONS, place(parent)[1]
        return (OTHER, False) if parent is None else place(parent)

    def period(event: Any) -> int:
        """The step that an event belongs to; sequence numbers restart when all graphs are gone."""
        return sum(step.time_range.start <= event.time_range.start for step in steps)

    # The operation that creates a node is the last one that starts with the node's number.
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and event.scope == 0 and not event.name.startswith(_BACKWARD):
            forward[period(event), event.sequence_nr] = place(event)[0]
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if period(event):
            part, is_backward = place(event)
            found[part][is_backward] += _gpu_time(event) if on_gpu else event.self_cpu_time_total
    return dict(found)


def _gpu_time(event: Any) -> float:
    # A range may have a copy of itself on the GPU, which is not a kernel.
    return float(sum(kernel.duration for kernel in event.kernels if kernel.name != event.name))


class _Training:
    """A net and what its step needs; ``without`` leaves one part out, ``ranges`` marks the parts for the profiler."""

    def __init__(
        self, net: str, batch: int, args: argparse.Namespace, *, without: str = "", ranges: bool = False
    ) -> None:
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(args.model, num_classes=10)
        weights = NETS[net]
        if weights is not None:
            model = bonn_qat.binarize(model, "bonn", input_size=(3, args.size, args.size))
        self.device, self.without, self.ranges = args.device, without, ranges
        losses = {KERNEL_LOSS: "kernel", FEATURE_LOSS: "feature"}
        kept = {name: weight for name, weight in (weights or {}).items() if name != losses.get(without)}
        self.model = model.to(args.device)
        self.objective = bonn_qat.Objective(self.model, regularizers=kept).to(args.device).train()
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        to_memory_format(self.model, self.layout)
        self._leave_out()
        # At a rate of 0, a net without norms does not change, and a step costs the same.
        groups = bonn_qat.parameter_groups(self.objective, lr=0.0, weight_decay=1e-4)
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=True)
        self.batches = self._batches(batch, args.size)
        self.batch = next(self.batches)
        if ranges:
            self._mark()

    def step(self) -> None:
        """Data, forward, losses, backward, optimizer."""
        with self._range(DATA):
            images, targets = self.batch if self.without == DATA else next(self.batches)
            images = images.contiguous(memory_format=self.layout)
        with self._range(OPTIMIZER):
            self.optimizer.zero_grad()
        self.objective(images, targets).total.backward()
        if self.without != OPTIMIZER:
            with self._range(OPTIMIZER):
                self.optimizer.step()

    def _range(self, part: str) -> record_function:
        return record_function(_RANGE + part)

    def _batches(self, batch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        images = torch.randint(256, (64 * batch, 3, size, size), dtype=torch.uint8)
        targets = torch.randint(10, (64 * batch,))
        few = images[:batch], targets[:batch]
        data = TensorData("noise", (images, targets), few, classes=10, pad=4, flip=True).to(torch.device(self.device))
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from data.train_batches(batch, generator, augment=True)

    def _leave_out(self) -> None:
        kinds = tuple(kind for kind, part in _KINDS if part == self.without and part in (NORM, ACTIVATION))
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, kinds):
                    setattr(module, name, nn.Identity())

    def _mark(self) -> None:
        for module in self.objective.modules():
            part = next((part for kind, part in _KINDS if isinstance(module, kind)), None)
            if part is not None:
                module.forward = _ranged(module.forward, part)
            if isinstance(module, BinaryConv2d):
                for quantizer in (module.weight_quant, module.input_quant):
                    if quantizer is not None:
                        quantizer.quantize = _ranged(quantizer.quantize, QUANTIZERS)  # type: ignore[method-assign]


def _ranged(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(_RANGE + part):
            return function(*args, **kwargs)

    return ranged


def _convolutions(training: _Training) -> dict[str, Callable[[], None]]:
    """Per kind, all convolutions of a step alone, forward and backward, on noise in the shapes of their inputs."""
    seen: list[tuple[nn.Conv2d, Tensor]] = []
    layers = [module for module in training.model.modules() if isinstance(module, nn.Conv2d)]
    handles = [
        layer.register_forward_hook(lambda layer, inputs, output: seen.append((layer, inputs[0]))) for layer in layers
    ]
    training.model(training.batch[0].contiguous(memory_format=training.layout))
    for handle in handles:
        handle.remove()
    runs: dict[str, list[Callable[[], None]]] = {}
    for layer, inputs in seen:
        is_binary = isinstance(layer, BinaryConv2d)
        part = BINARY_CONVOLUTION if is_binary else FLOAT_CONVOLUTION
        runs.setdefault(part, []).append(_convolution(layer, inputs, is_first=layer is seen[0][0]))

    def all_of(kind: list[Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            for one in kind:
                one()

        return run

    return {part: all_of(kind) for part, kind in runs.items()}


def _convolution(layer: nn.Conv2d, inputs: Tensor, *, is_first: bool) -> Callable[[], None]:
    x = functional.sign(torch.randn_like(inputs)).requires_grad_(not is_first)
    weight = layer.weight.detach().clone().requires_grad_()
    value = (0.01 * functional.sign(weight.detach())).requires_grad_()
    scale = value.detach().abs().mean()
    stride, padding = layer.stride, layer.padding

    def forward() -> Tensor:
        if isinstance(layer, BinaryConv2d):
            if operators.takes(x):
                geometry, norm = layer.geometry(x)[0], Norm.of(None, x)
                return sign_product(
                    x, norm, Estimator(), value, scale, None, None, geometry, x.dtype, torch.channels_last
                )
            return functional.binary_conv2d(x, value, scale, stride, padding)  # type: ignore[arg-type]
        return torch.conv2d(x, weight, None, stride, padding)

    grad = torch.randn_like(forward())
    leaves = [leaf for leaf in (x, value if isinstance(layer, BinaryConv2d) else weight) if leaf.requires_grad]

    def run() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    return run


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn22_16", help="a timm model of plain convolutions (default: %(default)s)")
    parser.add_argument("--batch", nargs="+", type=int, default=[128])
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11, help="rounds of the check")
    parser.add_argument("--repeat", type=int, help="steps in one timing (default: 1, on a GPU 10)")
    parser.add_argument("--profiled", type=int, default=5, help="steps in the profile")
    parser.add_argument("--warmup", type=int, default=3, help="steps before each measurement")
    parser.add_argument("--clock", default="wall", choices=["wall", "process"], help="for the check; process: CPU time")
    parser.add_argument("--nchw", dest="channels_last", action="store_false", help="not channels_last")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="profile BONN there as well")
    parser.add_argument("--input", type=Path, help="read the file of an earlier run instead of measuring")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--page", action="store_true", help=f"write the tables into docs/{PAGE.name}")
    args = parser.parse_args(argv)
    args.repeat = args.repeat or (10 if args.device == "cuda" else 1)
    return args


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve({"measure": lambda net, batch, options: measure(net, batch, argparse.Namespace(**options))})
    else:
        report(__file__, _arguments(), measure_all, tables)
