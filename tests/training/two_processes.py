"""Compare a run of two processes with a run of one, in float64; started by torchrun."""

import copy
import dataclasses
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from bonn_qat import Objective, binarize, distributed, parameter_groups, plugins
from bonn_qat.environment import environment, processor
from bonn_qat.errors import InvalidData
from bonn_qat.scheme import Stage
from bonn_qat.training import data
from bonn_qat.training.network import build
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RunResult
from bonn_qat.training.sync_norms import SynchronizedNorms
from bonn_qat.training.train import train

IMAGES, BATCH = 32, 16


def recipe(variant: str, **changes: Any) -> Recipe:
    base = Recipe(epochs=2, batch_size=BATCH, lr=0.05, train_images=IMAGES, test_images=33).with_scheme(variant)
    epochs = max(2, len(plugins.find_scheme(base.scheme).stages))
    return dataclasses.replace(base, **{"epochs": epochs, **changes})


def images(train_images: int = IMAGES) -> data.Data:
    digits = data.load("digits", train_images=train_images, test_images=33)
    standardize = digits._standardize  # type: ignore[attr-defined]
    digits._standardize = lambda images: standardize(images).double()  # type: ignore[attr-defined]
    return digits


def trained(recipe: Recipe, digits: data.Data, **options: Any) -> tuple[dict[str, Tensor], RunResult]:
    model = build(recipe, digits)
    result = train(model, recipe, digits, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, result


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def compared(alone: tuple[dict[str, Tensor], RunResult], together: tuple[dict[str, Tensor], RunResult]) -> dict:
    pairs = [
        (one[name], two[name])
        for one, two in zip(alone[1].epochs, together[1].epochs, strict=True)
        for name in one
        if name.startswith(("train/", "test/loss", "scale/", "flips"))
    ]
    return {
        "state": difference(alone[0], together[0]),
        "metrics": max(abs(one - two) / max(abs(one), 1.0) for one, two in pairs),
        "top1": max(
            abs(one["test/top1"] - two["test/top1"])
            for one, two in zip(alone[1].epochs, together[1].epochs, strict=True)
        ),
    }


class Stop(Exception):
    pass


def stop_at(step: int, what: Callable[[], None]) -> Callable[[], None]:
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == step:
            what()

    return tick


def raise_stop() -> None:
    raise Stop


def resumed(folder: Path, digits: data.Data, whole: dict[str, Tensor]) -> dict[str, Any]:
    """A run of two processes that stops in the second epoch, resumed by both, and by each alone."""
    path, own = folder / "run.safetensors", folder / f"alone{distributed.rank()}.safetensors"
    try:
        trained(recipe("bonn"), digits, checkpoint=path, checkpoint_seconds=0.0, tick=stop_at(4, raise_stop))
    except Stop:
        distributed.barrier()
    own.write_bytes(path.read_bytes())
    distributed.barrier()
    from bonn_qat.training.checkpoint import read_state

    progress = read_state(own).progress
    by_two, _ = trained(recipe("bonn"), digits, checkpoint=path)
    with distributed.alone():
        by_one, _ = trained(recipe("bonn"), digits, checkpoint=own)
    return {
        "at": [len(progress.epochs), progress.step],
        "by_two": difference(whole, by_two),
        "by_one": difference(whole, by_one),
    }


def batch_norm(norm: nn.Module, size: tuple[int, ...]) -> float:
    """The largest difference between a norm on 3 and 5 images in two processes, and the same norm on all 8."""
    torch.manual_seed(0)
    images, grad = torch.randn(8, *size) * 3 + 2, torch.randn(8, *size)
    model = nn.Sequential(norm)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    found = []
    for one, part in (
        (copy.deepcopy(model), slice(None)), (model, slice(3) if distributed.rank() == 0 else slice(3, None))
    ):  # fmt: skip
        own = images[part].requires_grad_()
        with SynchronizedNorms(one, wanted=one is model).on():
            output = one(own)
        of_images, *rest = torch.autograd.grad(output, [own, *one.parameters()], grad[part])
        rest = [distributed.all_reduce(gradient) if one is model else gradient for gradient in rest]
        found.append(
            {"output": output.detach(), "images": of_images, **dict(enumerate(rest)), **dict(one.named_buffers())}
        )
    whole, mine = found
    whole |= {key: whole[key][part] for key in ("output", "images")}
    return difference(whole, mine)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "2d": (lambda: nn.BatchNorm2d(5), (5, 6, 7)),
    "3d": (lambda: nn.BatchNorm3d(5, momentum=None), (5, 2, 3, 4)),
    "without weights": (lambda: nn.BatchNorm2d(5, affine=False), (5, 6, 7)),
    "without a memory": (lambda: nn.BatchNorm2d(5, track_running_stats=False), (5, 6, 7)),
    "of timm": (lambda: BatchNormAct2d(5), (5, 6, 7)),
}


def norms(digits: data.Data, statistics: dict[str, Tensor] | None) -> dict[str, Any]:
    """The statistics of three batches, divided between two processes."""
    stages = (Stage(recompute_norms=True),)
    state, _ = trained(recipe("bonn", epochs=1, stages=stages), digits)
    found = {name: tensor for name, tensor in state.items() if "running" in name or "tracked" in name}
    return {"found": found} if statistics is None else {"difference": difference(statistics, found)}


class InThree(data.Data):
    """A data set whose statistics are measured in three batches."""

    def __init__(self, digits: data.Data) -> None:
        self.__dict__.update(digits.__dict__)
        self._digits = digits

    def train_batches(self, *args: Any, **kwargs: Any) -> Any:
        return self._digits.train_batches(*args, **kwargs)

    def test_batches(self, *args: Any, **kwargs: Any) -> Any:
        return self._digits.test_batches(*args, **kwargs)

    def measure_batches(self, batch_size: int = 0, *, shard: data.Shard = data.WHOLE) -> Any:
        self.dealt = list(self._digits.measure_batches(11, shard=shard))
        return iter(self.dealt)


def diverged(digits: data.Data) -> str:
    class Poisoned(InThree):
        def train_batches(self, *args: Any, **kwargs: Any) -> Any:
            for batch, targets in self._digits.train_batches(*args, **kwargs):
                if distributed.rank():
                    batch.view(-1)[7] = float("nan")  # the signs hide it
                yield batch, targets

    try:
        trained(recipe("bonn", sync_norms=False), Poisoned(digits))
    except InvalidData as error:
        return str(error)
    return "none"


def stopped(folder: Path, digits: data.Data, whole: dict[str, Tensor]) -> dict[str, Any]:
    """The second process gets SIGTERM; both stop, and resume."""
    path, code = folder / "stopped.safetensors", 0
    tell = (lambda: os.kill(os.getpid(), signal.SIGTERM)) if distributed.rank() else (lambda: None)
    try:
        trained(recipe("bonn"), digits, checkpoint=path, tick=stop_at(3, tell))
    except SystemExit as stop:
        code = int(stop.code or 0)
    distributed.barrier()
    state, _ = trained(recipe("bonn"), digits, checkpoint=path)
    codes = [int(c) for c in distributed.all_gather(torch.tensor([code]))]
    return {"codes": codes, "difference": difference(whole, state)}


def sharded(over_processes: bool) -> dict[str, Tensor]:
    """The parameters after three steps of a network and its losses, which FSDP2 spreads over the processes."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10, img_size=32)
    objective = Objective(binarize(network), regularizers={"kernel": 1e-2, "feature": 1e-2})
    images, targets = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    if over_processes:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for block in objective.model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        images, targets = (part[distributed.rank() :: 2] for part in (images, targets))
    objective.eval()  # for batch norms would see half of the batch
    optimizer = torch.optim.SGD(parameter_groups(objective, lr=0.01, weight_decay=0.01), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        objective(images, targets).total.backward()
        optimizer.step()
    whole = {name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in objective.named_parameters()}
    return {name: tensor.detach() for name, tensor in whole.items()}


def in_bfloat16() -> dict[str, Any]:
    """A run under autocast: whether the processes agree, and the loss of its first epoch beside one process'."""
    torch.set_default_dtype(torch.float32)
    digits = data.load("digits", train_images=IMAGES, test_images=33)
    state, result = trained(recipe("bonn", precision="bfloat16"), digits)
    torch.set_default_dtype(torch.float64)
    first, second = distributed.all_gather(flat(state))
    with distributed.alone():
        torch.set_default_dtype(torch.float32)
        _, alone = trained(recipe("bonn", precision="bfloat16"), digits)
        torch.set_default_dtype(torch.float64)
    losses = [found.epochs[0]["train/loss"] for found in (result, alone)]
    return {"ranks_agree": torch.equal(first, second), "losses": losses}


def main(found: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"bonn_qat\.")
    warnings.filterwarnings("ignore", "this CPU has no instructions for")
    digits, names = images(), sorted(plugins.schemes())
    with tempfile.TemporaryDirectory() as temporary, distributed.process_group():
        folder = Path(distributed.broadcast(temporary))
        with distributed.alone():
            alone = {name: trained(recipe(name), digits) for name in names} if os.environ["RANK"] == "0" else {}
            statistics = norms(InThree(digits), None)["found"]
        distributed.barrier()
        content: dict[str, Any] = {
            "environment": environment(distributed.device()),
            "machine": processor(),
            "schemes": {},
        }
        for name in names:
            together = trained(recipe(name), digits)
            first, second = distributed.all_gather(flat(together[0]))
            if alone:
                content["schemes"][name] = {
                    "ranks_agree": torch.equal(first, second),
                    **compared(alone[name], together),
                }
            if name == "bonn":
                whole = together[0]
        three = InThree(digits)
        content["norms"] = norms(three, statistics)
        differences = {name: batch_norm(make(), size) for name, (make, size) in NORMS.items()}
        content["batch_norms"] = {
            name: max(map(float, distributed.all_gather(torch.tensor(most)))) for name, most in differences.items()
        }
        content["norms"]["batches"] = [int(n) for n in distributed.all_gather(torch.tensor([len(three.dealt)]))]
        content["resumed"] = resumed(folder, digits, whole)
        words = distributed.all_gather(torch.tensor(list(diverged(digits).encode())))
        content["diverged"] = [bytes(word.tolist()).decode() for word in words]
        content["stopped"] = stopped(folder, digits, whole)
        own, _ = trained(recipe("bonn", sync_norms=False), digits)
        content["own_norms"] = difference(whole, own)
        content["bfloat16"] = in_bfloat16()
        content["sharded"] = difference(sharded(False), sharded(True))
        if distributed.rank() == 0:
            found.write_text(json.dumps(content, indent=1))
        distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
