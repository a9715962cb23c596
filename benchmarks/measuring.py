"""What the scripts that measure training share: the training of an arm, turns, other checkouts, machine and pages."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn

import bonn_qat
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.environment import environment, processor
from bonn_qat.layers import BinaryConv2d
from bonn_qat.training.network import to_memory_format
from bonn_qat.training.precision import matmul_precision

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "training_speed.md"
NOW, BEFORE = "", "before"
FLOAT, BREVITAS, NO_LOSSES = "float", "brevitas", ", no losses"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # by autocast
PRECISIONS = ("float32", "tf32", *DTYPES)
PATHS = {"against", "data_dir", "input", "output", "page"}  # options that say nothing about a measurement
MODES = ("default", "reduce-overhead", "max-autotune")

Step = Callable[[], object]
Times = dict[str, list[float]]


class Variant(NamedTuple):
    """An arm in one form: ``mode`` of torch.compile or None, and where its package is from, NOW or BEFORE."""

    arm: str
    mode: str | None
    precision: str
    checkout: str = NOW

    @property
    def name(self) -> str:
        """A name for tables."""
        mode = "compiled" if self.mode == "default" else self.mode
        precision = None if self.precision == PRECISIONS[0] else self.precision
        return ", ".join(filter(None, (self.arm, mode, precision, self.checkout)))

    def references(self) -> Iterator[tuple[str, "Variant"]]:
        """What it is compared with, where that is measured, each with the heading of its column."""
        for mode in (None, *MODES):
            form = Variant("", mode or "eager", PRECISIONS[0]).name
            yield f"to float, {form}, of its precision", Variant(FLOAT, mode, self.precision)
        if self.precision != PRECISIONS[0]:
            yield f"to itself in {PRECISIONS[0]}", self._replace(precision=PRECISIONS[0])
        if self.checkout == NOW:
            yield "to itself before", self._replace(checkout=BEFORE)


def variants(args: Namespace) -> list[Variant]:
    """Every variant of the command line; the float network and Brevitas' layers are the same in both checkouts."""
    checkouts = (NOW, BEFORE) if args.against else (NOW,)
    return [
        Variant(arm, mode, precision, checkout)
        for arm in args.arms
        for precision in args.precision
        for mode in (None, *args.compile)
        for checkout in checkouts
        if checkout == NOW or arm not in (FLOAT, BREVITAS)
    ]


class Training:
    """The training of a variant: network, losses, optimizer.

    Its arm is ``float``, the name of a scheme, with its own losses or as "SCHEME, no losses", or ``brevitas``, its
    stock binary quantizers. ``model`` is a network of timm, ``image`` is ``(C, H, W)``; ``options`` has
    ``channels_last`` and ``device``. Raises UnknownName for another arm.
    """

    def __init__(
        self, variant: Variant, model: str, image: Sequence[int], classes: int, options: Namespace, *, lr: float = 1e-3
    ) -> None:
        torch.manual_seed(0)
        self.device, self.mode, self.precision = options.device, variant.mode, variant.precision
        self._image, self._classes = tuple(image), classes
        scheme = variant.arm.removesuffix(NO_LOSSES)
        network: nn.Module = timm.create_model(model, num_classes=classes, in_chans=image[0])
        if scheme != FLOAT:
            network = bonn_qat.binarize(network, "bonn" if scheme == BREVITAS else scheme, input_size=self._image)
        if scheme == BREVITAS:
            _to_brevitas(network)
        self.macs = bonn_qat.summary(network, self._image).macs
        losses: dict[str, float] | None = {} if scheme == BREVITAS or scheme != variant.arm else None
        self.objective = bonn_qat.Objective(network, regularizers=losses).to(self.device).train()
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        to_memory_format(network, self.layout)
        groups = bonn_qat.parameter_groups(self.objective, lr=lr, weight_decay=1e-4)
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)
        self._forward: Callable[..., Any] = self.objective
        if self.mode is not None:
            self._forward = torch.compile(self.objective, mode=self.mode)
        self._network: Callable[..., Any] = network if self.mode is None else torch.compile(network, mode=self.mode)
        self._scaler = torch.amp.GradScaler(self.device, enabled=self.precision == "float16")

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Noise as images ``(count, C, H, W)``, and as their classes."""
        images = torch.randn(count, *self._image, device=self.device).contiguous(memory_format=self.layout)
        return images, torch.randint(self._classes, (count,), device=self.device)

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses; gradients of the step before are dropped first."""
        if self.mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # Before the forward pass, because the next CUDA graph overwrites the memory of the gradients.
        self.optimizer.zero_grad()
        with torch.autocast(self.device, DTYPES.get(self.precision), enabled=self.precision in DTYPES):
            loss: Tensor = self._forward(images, targets).total
        return loss

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the training; returns its loss, detached."""
        with matmul_precision(self.precision):
            loss = self.loss(images, targets)
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            self._scaler.step(self.optimizer)
            self._scaler.update()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, images: Tensor, targets: Tensor) -> Tensor:
        """The logits of a batch in evaluation mode."""
        self.objective.eval()
        autocast = torch.autocast(self.device, DTYPES.get(self.precision), enabled=self.precision in DTYPES)
        with matmul_precision(self.precision), autocast:
            logits: Tensor = self._network(images)
        return logits


def _to_brevitas(model: nn.Module) -> None:
    """Replace our binary convolutions by the norm, Brevitas' QuantIdentity and its QuantConv2d."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import brevitas.nn as qnn
        from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst
    for name, layer in list(binary_layers(model)):
        if not isinstance(layer, BinaryConv2d):
            raise ValueError(
                f"the arm {BREVITAS} is for convolutions; {name} is a {type(layer).__name__}: leave it out"
            )
        conv = qnn.QuantConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias=layer.bias is not None, weight_quant=SignedBinaryWeightPerTensorConst,
        )  # fmt: skip
        conv.load_state_dict(dict(layer.named_parameters(recurse=False)))
        quantizer = qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst)
        model.set_submodule(name, nn.Sequential(layer.norm, quantizer, conv))


def prepare_torch(threads: int) -> None:
    """Configure torch for arms that take turns in one process, each with ``threads`` threads."""
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    torch._inductor.config.cpp.threads = threads  # compiled code is for a number of threads, and kept on disk
    # The search for the fastest convolution happens in the warm-up steps.
    torch.backends.cudnn.benchmark = True
    # To the compiler, all arms are one function with several compiled versions. Without hooks in the guards, the arm
    # that taps the features would run the version of an arm of the same shape that does not.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def timer(step: Step, options: Namespace) -> Callable[[], float]:
    """A function that measures the seconds of a step; ``options`` has ``clock``, ``repeat`` and ``device``."""
    clock = time.process_time if options.clock == "process" else time.perf_counter

    def measure() -> float:
        synchronize(options.device)
        start = clock()
        for _ in range(options.repeat):
            step()
        synchronize(options.device)
        return (clock() - start) / int(options.repeat)

    return measure


def alternate(timers: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Seconds of one step, by name, in rounds that each start with another one."""
    times: Times = {name: [] for name in timers}
    order = list(timers)
    for _ in range(rounds):
        order.append(order.pop(0))
        for name in order:
            time.sleep(0.02)  # idle threads of the one before may go on spinning for some milliseconds
            times[name].append(timers[name]())
    return times


def quartiles(values: Iterable[float]) -> list[float]:
    """The first quartile, the median and the third quartile."""
    values = list(values)
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values


def synchronize(device: str) -> None:
    """Wait until the device is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    """The machine of the measurement."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "platform": platform.system(),
        "libc": " ".join(platform.libc_ver()),
    }


def plain(args: Namespace) -> dict[str, Any]:
    """The options as JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def heading(args: Namespace) -> dict[str, Any]:
    """What every document begins with: options without paths, environment and machine."""
    options = {name: value for name, value in plain(args).items() if name not in PATHS}
    found = dict(environment(torch.device(args.device)))
    return {"options": options, "environment": found, "machine": machine(args.device)}


def subtitle(document: dict[str, Any]) -> str:
    """Machine, versions and commits of a document, as a sentence."""
    layout = "channels_last" if document["options"]["channels_last"] else "NCHW"
    found, before = document["environment"], document.get("before")
    compared = f"; before: commit {before['commit']}" if before else ""
    processor = document["machine"]["processor"]
    return f"{layout}, {processor}, torch {found['torch']}, commit {found['commit']}{compared}."


def thread_count(count: int) -> str:
    """The number of threads in words."""
    return f"{count} thread{'' if count == 1 else 's'}"


def parse(parser: argparse.ArgumentParser, arms: Sequence[str], argv: Sequence[str] | None) -> Namespace:
    """Parse the command line, with the options that several scripts have; the float arm comes first."""
    parser.add_argument(
        "--arms", nargs="+", default=arms, metavar="ARM",
        help=f'any scheme, "SCHEME{NO_LOSSES}", or {BREVITAS}, its stock quantizers (default: {"; ".join(arms)})',
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="*", metavar="MODE", choices=MODES,
        help="add a compiled form of each arm, for each of these modes of torch.compile (without a value: default)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", nargs="+", default=[PRECISIONS[0]], choices=PRECISIONS,
        help="tf32 is for GPUs; bfloat16 and float16 are autocast, the latter with loss scaling",
    )  # fmt: skip
    parser.add_argument("--nchw", dest="channels_last", action="store_false", help="not channels_last")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="a checkout to compare with")
    parser.add_argument("--input", type=Path, help="read the file of an earlier run instead of measuring")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--page", action="store_true", help=f"write the tables into docs/{PAGE.name}")
    args = parser.parse_args(argv)
    args.arms = [FLOAT, *(arm for arm in args.arms if arm != FLOAT)]
    args.compile = [] if args.compile is None else args.compile or [MODES[0]]
    if args.against and args.against.resolve() == ROOT:
        parser.error(f"--against {args.against} is this checkout; give another one")
    return args


def report(
    script: str,
    args: Namespace,
    measure: Callable[[Namespace], dict[str, Any]],
    tables: Callable[[dict[str, Any]], str],
) -> None:
    """Measure or read, print the tables, and write the requested files."""
    if args.input:
        document = json.loads(args.input.read_text())
    else:
        document = measure(args)
        if args.output:
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    print(tables(document))
    if args.page:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(section(text, Path(script).name, tables(document)), encoding="utf-8")


def section(text: str, script: str, content: str) -> str:
    """The page ``text`` with ``content`` between the markers of ``script``. Raises ValueError if it has none."""
    start, end = f"<!-- made by benchmarks/{script} -->\n", "<!-- end -->\n"
    before, found, rest = text.partition(start)
    if not found or end not in rest:
        raise ValueError(f"the page has no place for {script}: a line {start.strip()}, and below it {end.strip()}")
    return before + start + content + end + rest.partition(end)[2]


class Child:
    """A process that runs a script with the package and the plugins of a checkout, and does one call at a time.

    The script calls :func:`serve` where its arguments are ``--serve``. ``package`` is the package's environment there;
    ``variables`` are added to those of this process. Raises RuntimeError if it uses another package, or ends.
    """

    def __init__(self, script: str, checkout: Path, variables: Mapping[str, str] | None = None) -> None:
        paths = [checkout, *sorted(checkout.glob("plugins/*"))]
        path = {"PYTHONPATH": os.pathsep.join(str(path.absolute()) for path in paths)}
        self._checkout = checkout
        self._process = subprocess.Popen(
            [sys.executable, script, "--serve"], env=os.environ | path | dict(variables or {}), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.package: dict[str, str] = self._receive()
        used = Path(self.package.pop("path"))
        if used.parent.resolve() != checkout.resolve():
            self.close()
            raise RuntimeError(f"the package of {checkout} was not used, but {used}")

    def call(self, function: str, *arguments: Any) -> Any:
        """The result of ``function`` there; arguments and result are JSON."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps([function, arguments]) + "\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _receive(self) -> Any:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        self.close()
        raise RuntimeError(f"the process with the package of {self._checkout} ended: code {self._process.returncode}")


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answer the calls of a :class:`Child` until it closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    result: Any = {"path": str(Path(bonn_qat.__file__).parent), **environment(torch.device("cpu"))}
    while True:
        print(json.dumps(result), file=answers, flush=True)
        if not (line := sys.stdin.readline()):
            return
        function, arguments = json.loads(line)
        result = functions[function](*arguments)
