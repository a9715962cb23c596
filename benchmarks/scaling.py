"""How training scales with processes: measured on this machine, and on paper for clusters of GPUs.

The script measures steps of the trainer, float and BONN, in processes that it starts itself. The ways of sharing the
work take turns, each round in another order, so that noise of the machine affects all alike:

- ``alone``: one process with the whole batch;
- ``side by side``: N processes that do not communicate, each with a whole batch: the cost of sharing the machine;
- ``strong``: N processes that share one batch;
- ``weak``: N processes with a whole batch each;
- ``strong, not reduced`` and ``weak, not reduced``: the same without reducing gradients (DDP's ``no_sync``); norms are
  still synchronized.

On a machine with GPUs, each process gets one and NCCL replaces gloo, with the same command. Examples::

    python benchmarks/scaling.py --processes 1,2 --batch 64 --output scaling.json --page
    python benchmarks/scaling.py --processes 1,2,4,8 --model resnet50 --size 224 --classes 1000 --precision float16
    python benchmarks/scaling.py --input scaling.json --page
    python benchmarks/scaling.py --paper --page
    python benchmarks/scaling.py --paper --step-ms resnet50=55

``--paper`` measures nothing: it counts the networks' bytes and collectives and computes their times from the
assumptions in :class:`Cluster` and :data:`PEAK_SHARES`. ``--page`` writes either table into docs/scaling.md.

The file of ``--output`` is JSON: ``options``, ``environment``, ``machine``, and ``results``, one for each number of
processes above 1 and each network: ``processes``, ``net``, ``ways`` (the summary of each, see :func:`summarize`),
``seconds`` (of one step, a list with one entry for each round, by way), and ``traffic`` (see :func:`_traffic`).
"""

import argparse
import collections
import contextlib
import json
import math
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from measuring import machine, synchronize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import bonn_qat
from bonn_qat import distributed
from bonn_qat.environment import environment
from bonn_qat.scheme import Stage
from bonn_qat.training.data import TensorData
from bonn_qat.training.precision import matmul_precision
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.trainer import Trainer

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MARKS = ("<!-- {}, made by benchmarks/scaling.py -->\n", "<!-- end -->\n")
NETS = {"float": ("float", {}), "BONN": ("bonn", {"kernel": 1e-4, "feature": 1e-3})}
ALONE, BESIDE = "alone", "side by side"
SHARED = ("strong", "weak")
NOT_REDUCED = "{}, not reduced"
WAYS = (ALONE, BESIDE, *(way for shared in SHARED for way in (shared, NOT_REDUCED.format(shared))))

FLOAT_BYTES = 4
BUCKET, FIRST_BUCKET = 25 * 2**20, 2**20  # bytes, of DistributedDataParallel
BACKWARD = 2 / 3  # of a step: two products for each of the forward pass
PAPER_MODELS = ("resnet18", "resnet50", "vit_base_patch16_224")
PAPER_BATCH = 128  # images for each GPU
BF16_TFLOPS = 989.0  # H100 SXM, dense, by NVIDIA's data sheet
PEAK_SHARES = (0.05, 0.20)  # of it, the step times on paper


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster as assumed by ``--paper``; latencies in microseconds, bandwidths in GB/s in one direction.

    The latencies are those by which NCCL chooses its algorithms (``src/graph/tuning.cc``, ``baseLat`` and ``hwLat``):
    a base and a term per hop, of the protocol LL for small messages and LL128 for large ones. A ring has one hop fewer
    than GPUs, twice for all-reduce; a tree passes the GPUs of a node and the logarithm of the nodes, twice.
    """

    name: str
    nodes: int
    gpus_per_node: int = 8
    nvlink: float = 360.0  # 80% of NVLink 4's 450
    network: float = 45.0  # 90% of 400 Gb/s, which the GPUs of a node share

    @property
    def gpus(self) -> int:
        """The number of all GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """The bandwidth of the narrowest link of a ring through all GPUs."""
        return self.nvlink if self.nodes == 1 else self.network

    def ring_ms(self, size: float) -> float:
        """All-reduce of ``size`` bytes on a ring: 2 (N - 1) / N of them cross each link."""
        between = 2 * self.nodes if self.nodes > 1 else 0
        latency = 14.0 + (2 * (self.gpus - 1) - between) * 1.9 + between * 4.0
        return 2 * (self.gpus - 1) / self.gpus * size / (self.bandwidth * 1e6) + latency / 1e3

    def tree_ms(self, size: float) -> float:
        """All-reduce of ``size`` bytes on two trees, each with half of them: twice the size crosses a link."""
        latency = 14.0 + 2 * ((self.gpus_per_node - 1) * 1.25 + math.log2(self.nodes) * 8.5)
        return 2 * size / (self.bandwidth * 1e6) + latency / 1e3

    def small_reduce_us(self) -> float:
        """All-reduce of a few KiB, on trees."""
        return 6.8 + 2 * ((self.gpus_per_node - 1) * 0.6 + math.log2(self.nodes) * 5.0)

    def small_gather_us(self) -> float:
        """All-gather of a few KiB, for which NCCL has rings only."""
        between = self.nodes - 1
        return 6.6 + (self.gpus - 1 - between) * (0.6 if self.nodes == 1 else 1.0) + between * 2.7


CLUSTERS = (
    Cluster(name="one node, NVLink", nodes=1),
    Cluster(name="8 nodes, 400 Gb/s each", nodes=8),
)


Times = dict[str, list[float]]


class Gradient(NamedTuple):
    """A gradient to reduce: its bytes, and the part of the backward pass that is done when it is ready."""

    size: int
    ready: float


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The bytes and collectives of a step, counted on the network itself."""

    model: str
    float_parameters: int
    macs: int  # per image
    gradients: Sequence[Gradient]  # in the order of the backward pass
    norms: Sequence[int]  # channels of each

    @property
    def gradient_bytes(self) -> int:
        """The bytes of all gradients, which are float32 whatever the bits of the weights."""
        return sum(gradient.size for gradient in self.gradients)

    @property
    def norm_bytes(self) -> int:
        """The bytes that SyncBatchNorm sends: mean, inverse deviation and count forward, two sums backward."""
        return sum(FLOAT_BYTES * (2 * channels + 1 + 2 * channels) for channels in self.norms)

    @property
    def norm_collectives(self) -> int:
        """The number of collectives: an all-gather forward and an all-reduce backward per norm."""
        return 2 * len(self.norms)

    def buckets(self) -> list[Gradient]:
        """The gradients in DistributedDataParallel's buckets; the first one is small, so that it is sent early."""
        joined: list[Gradient] = []
        size, limit = 0, FIRST_BUCKET
        for gradient in self.gradients:
            size += gradient.size
            if size >= limit:
                joined.append(Gradient(size, gradient.ready))
                size, limit = 0, BUCKET
        return [*joined, Gradient(size, 1.0)] if size else joined

    def exposed_ms(self, cluster: Cluster, step_ms: float) -> float:
        """The time of the reduction after the backward pass; buckets are sent one by one, each when it is full."""
        backward, end = BACKWARD * step_ms, 0.0
        for bucket in self.buckets():
            end = max(end, bucket.ready * backward) + min(cluster.ring_ms(bucket.size), cluster.tree_ms(bucket.size))
        return max(0.0, end - backward)

    def norms_ms(self, cluster: Cluster) -> float:
        """The time that synchronized norms wait, during which nothing else can run."""
        return len(self.norms) * (cluster.small_gather_us() + cluster.small_reduce_us()) / 1e3

    def step_ms(self, share: float) -> float:
        """The time of a step, at 6 FLOPs per MAC (two forward, four backward) and ``share`` of the peak."""
        return 6 * self.macs * PAPER_BATCH / (share * BF16_TFLOPS * 1e9)


def traffic_on_paper(model: str) -> Traffic:
    """Binarize ``model`` and count its bytes and collectives."""
    network = timm.create_model(model)
    float_parameters = sum(parameter.numel() for parameter in network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = bonn_qat.binarize(network, inplace=True)
    report = bonn_qat.summary(network, (3, 224, 224))
    macs = {f"model.{layer.name}": layer.macs for layer in report.layers}
    objective = bonn_qat.Objective(network, regularizers=NETS["BONN"][1])
    found = [(name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad]
    done, ahead, gradients = 0, "", []
    for name, parameter in reversed(found):
        layer = next((prefix for prefix in _prefixes(name) if prefix in macs), ahead)
        if layer != ahead:
            done, ahead = done + macs[layer], layer
        gradients.append(Gradient(FLOAT_BYTES * parameter.numel(), done / report.macs))
    norms = [m.num_features for m in network.modules() if isinstance(m, _BatchNorm)]
    return Traffic(model=model, float_parameters=float_parameters, macs=report.macs, gradients=gradients, norms=norms)


def _prefixes(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def paper(step_ms: dict[str, float]) -> str:
    """Both computed tables, as Markdown; ``step_ms`` replaces the estimate by FLOPs."""
    found = [traffic_on_paper(model) for model in PAPER_MODELS]
    lines = [
        "Counted, for one step and one process:",
        "",
        "| BONN of | parameters, float | parameters, BONN and its losses | gradients, MB | buckets | batch norms "
        "| norms: collectives | norms: KB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for traffic in found:
        lines.append(
            f"| {traffic.model} | {traffic.float_parameters:,} | {traffic.gradient_bytes // FLOAT_BYTES:,} "
            f"| {traffic.gradient_bytes / 1e6:.1f} | {len(traffic.buckets())} | {len(traffic.norms)} "
            f"| {traffic.norm_collectives} | {traffic.norm_bytes / 1e3:.0f} |"
        )
    lines += ["", "Assumed:", "", "| | " + " | ".join(f"{c.gpus} GPUs, {c.name}" for c in CLUSTERS) + " |"]
    lines.append("|---|" + "---|" * len(CLUSTERS))
    for title, cells in (
        ("narrowest link, GB/s", [f"{c.bandwidth:g}" for c in CLUSTERS]),
        ("small all-gather, µs", [f"{c.small_gather_us():.0f}" for c in CLUSTERS]),
        ("small all-reduce, µs", [f"{c.small_reduce_us():.0f}" for c in CLUSTERS]),
        ("all-reduce of 25 MiB, ring, ms", [f"{c.ring_ms(BUCKET):.2f}" for c in CLUSTERS]),
        ("all-reduce of 25 MiB, trees, ms", [f"{c.tree_ms(BUCKET):.2f}" for c in CLUSTERS]),
    ):
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Computed, weak scaling with {PAPER_BATCH} images of 224x224 on each GPU:",
        "",
        "| BONN of | GPUs | step alone, ms | gradients, without overlap, ms | exposed, ms | norms, ms "
        "| efficiency, own statistics | efficiency, synchronized |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for traffic in found:
        steps = [step_ms[traffic.model]] if traffic.model in step_ms else [traffic.step_ms(s) for s in PEAK_SHARES]
        for cluster in CLUSTERS:
            for step in steps:
                whole = min(cluster.ring_ms(traffic.gradient_bytes), cluster.tree_ms(traffic.gradient_bytes))
                exposed, norms = traffic.exposed_ms(cluster, step), traffic.norms_ms(cluster)
                lines.append(
                    f"| {traffic.model} | {cluster.gpus} | {step:.1f} | {whole:.2f} | {exposed:.2f} | {norms:.2f} "
                    f"| {step / (step + exposed):.1%} | {step / (step + exposed + norms):.1%} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, read or compute; print the table and write the requested files."""
    args = arguments()
    if args.paper:
        name, text = "paper", paper(args.step_ms)
    else:
        name = "measured"
        document = json.loads(args.input.read_text()) if args.input else measure(args)
        if args.output and not args.input:
            args.output.write_text(json.dumps(document, indent=1) + "\n")
        text = tables(document)
    print(text)
    if args.page:
        start, end = MARKS[0].format(name), MARKS[1]
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
        PAGE.write_text(before + start + text + end + rest.partition(end)[2], encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start the processes, let the ways take turns, and end the processes."""
    found = dict(environment(torch.device(args.device)))
    counts = [count for count in args.processes if count > 1]
    with contextlib.ExitStack() as stack:
        single = stack.enter_context(_Crew(max(counts), False, args))
        crews = {count: stack.enter_context(_Crew(count, True, args)) for count in counts}
        times = _in_turns(single, crews, args)
        traffic = {(count, net): crews[count].ask((net, "weak", "traffic"))[0] for count in counts for net in NETS}
    return {
        "options": vars(args) | {"output": None, "input": None},
        "environment": found,
        "machine": machine(args.device),
        "results": [
            {
                "processes": count,
                "net": net,
                "ways": summarize(times[count, net], args.batch, count),
                "seconds": times[count, net],
                "traffic": traffic[count, net],
            }
            for count in counts
            for net in NETS
        ],
    }


def _in_turns(single: "_Crew", crews: dict[int, "_Crew"], args: argparse.Namespace) -> dict[tuple[int, str], Times]:
    turns: list[tuple[list[tuple[int, str]], str, _Crew, tuple[Any, ...], int]] = []
    for net in NETS:
        turns.append(([(count, net) for count in crews], ALONE, single, (net, ALONE, args.repeat, True), 1))
        for count, crew in crews.items():
            turns.append(([(count, net)], BESIDE, single, (net, ALONE, args.repeat, True), count))
            for way in SHARED:
                turns.append(([(count, net)], way, crew, (net, way, args.repeat, True), count))
                turns.append(([(count, net)], NOT_REDUCED.format(way), crew, (net, way, args.repeat, False), count))
    times: dict[tuple[int, str], Times] = collections.defaultdict(lambda: collections.defaultdict(list))
    for round_ in range(-args.warmup, args.rounds):
        turns.append(turns.pop(0))
        for keys, way, crew, request, count in turns:
            seconds = max(crew.ask(request, count)) / args.repeat
            for key in keys if round_ >= 0 else []:
                times[key][way].append(seconds)
    return {key: {way: found[way] for way in WAYS} for key, found in times.items()}


def summarize(seconds: Times, batch: int, count: int) -> dict[str, Any]:
    """Per way: ``median_ms``, ``steps_per_second``, ``images_per_second``, and ratios within rounds.

    Each ratio is a list of median, smallest and largest. ``efficiency`` is the time that one process would need for the
    work at ``count`` times its speed, divided by the measured time. ``gradients`` is the share of the step that the
    reduction takes, ``norms`` the share by which the rest exceeds processes side by side (of ``weak`` only, which has
    whole batches too).
    """
    summary: dict[str, Any] = {}
    for way, times in seconds.items():
        median = statistics.median(times)
        images = batch * (1 if way == ALONE or way.startswith("strong") else count)
        work = images / batch / (1 if way == ALONE else count)
        ratios = [work * alone / time for alone, time in zip(seconds[ALONE], times, strict=True)]
        summary[way] = {
            "median_ms": 1e3 * median,
            "steps_per_second": 1 / median,
            "images_per_second": images / median,
            "efficiency": _spread(ratios),
        }
    for way in SHARED:
        whole, rest = seconds[way], seconds[NOT_REDUCED.format(way)]
        summary[way]["gradients"] = _spread([1 - b / a for a, b in zip(whole, rest, strict=True)])
    rest, beside = seconds[NOT_REDUCED.format("weak")], seconds[BESIDE]
    summary["weak"]["norms"] = _spread([(a - b) / c for a, b, c in zip(rest, beside, seconds["weak"], strict=True)])
    return summary


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def tables(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    options, found = document["options"], document["environment"]
    lines = [
        f"{options['model']}, {options['size']}x{options['size']}, batch {options['batch']}, {options['precision']}, "
        f"{document['machine']['processor']}, {options['threads']} thread per process, {options['rounds']} rounds "
        f"of {options['repeat']} steps, torch {found['torch']}, commit {found['commit']}. "
        "Median (smallest to largest).",
    ]
    for result in document["results"]:
        lines += [
            "",
            f"**{result['net']}, {result['processes']} processes**: gradients of "
            f"{result['traffic']['gradient_bytes'] / 1e6:.2f} MB per step, collectives "
            + (", ".join(f"{count} {name}" for name, count in result["traffic"]["collectives"].items()) or "none"),
            "",
            "| way | ms per step | steps/s | images/s | efficiency | in the reduction (%) | in the norms (%) |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, row in result["ways"].items():
            shares = [_cell(row.get(key), 100, 1) for key in ("gradients", "norms")]
            lines.append(
                f"| {way} | {row['median_ms']:.1f} | {row['steps_per_second']:.2f} | {row['images_per_second']:.0f} "
                f"| {_cell(row['efficiency'], 1, 2)} | {shares[0]} | {shares[1]} |"
            )
    return "\n".join(lines) + "\n"


def _cell(spread: Sequence[float] | None, factor: float, digits: int) -> str:
    if spread is None:
        return ""
    median, least, largest = (f"{factor * value:.{digits}f}" for value in spread)
    return f"{median} ({least} to {largest})"


class _Crew:
    """Processes that wait for requests: with a process group, or each for itself."""

    def __init__(self, count: int, grouped: bool, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, count, port if grouped else 0, args), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "_Crew":
        for connection in self._connections:
            connection.recv()
        return self

    def ask(self, request: tuple[Any, ...], count: int | None = None) -> list[Any]:
        """The answers of the first ``count`` processes, by default of all."""
        chosen = self._connections[:count]
        for connection in chosen:
            connection.send(request)
        return [connection.recv() for connection in chosen]

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(connection: Connection, rank: int, count: int, port: int, args: argparse.Namespace) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    if port:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        os.environ.pop("WORLD_SIZE", None)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    with distributed.process_group(), matmul_precision(args.precision):
        ways = SHARED if port else (ALONE,)
        trainings = {(net, way): _Training(net, args, way, count if port else 1) for net in NETS for way in ways}
        connection.send("ready")
        with contextlib.suppress(EOFError):
            while (request := connection.recv()) is not None:
                net, way, *rest = request
                training = trainings[net, way]
                connection.send(_traffic(training) if rest == ["traffic"] else training.seconds(*rest))


class _Training:
    """A trainer that repeats one fixed batch."""

    def __init__(self, net: str, args: argparse.Namespace, way: str, world: int) -> None:
        scheme, regularizers = NETS[net]
        own = args.batch // world if way == "strong" else args.batch
        recipe = Recipe(
            model=args.model, scheme=scheme, epochs=1, batch_size=own * world, lr=1e-3, schedule="constant",
            augment=False, precision=args.precision, stages=(Stage(regularizers=regularizers),),
        )  # fmt: skip
        torch.manual_seed(0)
        model = bonn_qat.binarize(timm.create_model(args.model, num_classes=args.classes), scheme, inplace=True)
        device = distributed.device()
        self.trainer = Trainer(model, recipe, _images(args, own * world), device, task=nn.CrossEntropyLoss())
        with self.trainer.norms.on():
            self.trainer.epoch(1)  # enters the stage, which starts its losses, and ends with a test
        self.trainer.objective.train()
        self.images = torch.randn(own, 3, args.size, args.size, device=device)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.targets = torch.randint(args.classes, (own,), device=device)

    def seconds(self, repeat: int, reduce: bool) -> float:
        """Seconds of ``repeat`` steps, measured from when all processes of the group are ready."""
        forward = self.trainer.forward
        silent = isinstance(forward, DistributedDataParallel) and not reduce
        if isinstance(forward, DistributedDataParallel):
            forward.require_forward_param_sync = True  # also after a turn without reduction
        unreduced = forward.no_sync() if silent else contextlib.nullcontext()  # type: ignore[attr-defined]
        with unreduced, self.trainer.norms.on():
            distributed.barrier()
            synchronize(self.images.device.type)
            start = time.perf_counter()
            for _ in range(repeat):
                self.trainer.step(self.images, self.targets)
            synchronize(self.images.device.type)
            return time.perf_counter() - start


def _images(args: argparse.Namespace, batch: int) -> TensorData:
    count = max(2 * batch, args.classes)
    images = torch.randint(256, (count, 3, args.size, args.size), dtype=torch.uint8)
    targets = torch.arange(count) % args.classes
    part = images, targets
    return TensorData("noise", part, (images[:batch], targets[:batch]), classes=args.classes, pad=0, flip=False)


def _traffic(training: _Training) -> dict[str, Any]:
    """``gradient_bytes`` of a step, ``ring_bytes`` that a ring sends of them, ``collectives`` by name and number."""
    parameters = [p for p in training.trainer.objective.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in parameters)
    world = distributed.world()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        training.seconds(1, True)
    names = (event.name for event in found.events() or () if event.name.startswith("c10d::"))
    counted = collections.Counter(name.removeprefix("c10d::").strip("_") for name in names)
    counted.pop("barrier", None)
    return {"gradient_bytes": size, "ring_bytes": 2 * (world - 1) / world * size, "collectives": dict(counted)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
    return port


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=_counts, default=[1, 2], help="comma-separated, one of them above 1")
    parser.add_argument("--model", default="wrn22_16", help="a timm model (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="batch size of the single process")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeat", type=int, help="steps in one timing (default: 2, on a GPU 10)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--precision", default="float32", choices=["float32", "tf32", "float16"])
    parser.add_argument("--paper", action="store_true", help="measure nothing: count and compute")
    parser.add_argument(
        "--step-ms", type=_steps, default={}, metavar="MODEL=MS,...",
        help=f"measured steps of {PAPER_BATCH} images, instead of the estimate by FLOPs of --paper",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    parser.add_argument("--input", type=Path, help="read a file written by --output instead of measuring")
    parser.add_argument("--page", action="store_true", help=f"write the table into docs/{PAGE.name}")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.repeat = args.repeat or (10 if args.device == "cuda" else 2)
    if not args.paper and not args.input:
        if max(args.processes) < 2:
            parser.error("--processes has no number above 1; write --processes 1,2")
        gpus = torch.cuda.device_count()
        if args.device == "cuda" and max(args.processes) > gpus:
            parser.error(f"--processes {max(args.processes)} needs as many GPUs; there are {gpus}")
        if odd := [count for count in args.processes if args.batch % count or args.batch // count < 2]:
            parser.error(f"--batch {args.batch} cannot be split among {odd[0]} processes with at least two images each")
    if unknown := sorted(set(args.step_ms) - set(PAPER_MODELS)):
        parser.error(f"--step-ms names {unknown[0]!r}; allowed: {', '.join(PAPER_MODELS)}")
    return args


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers above 0; write 1,2")
    return sorted({int(part) for part in parts})


def _steps(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        found = {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        found = {"": 0.0}
    if not all(value > 0 for value in found.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of MODEL=MS above 0; write resnet18=20,resnet50=55")
    return found


if __name__ == "__main__":
    main()
