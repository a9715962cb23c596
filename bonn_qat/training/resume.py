"""Resume: write the state of a run into a checkpoint, and restore it."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bonn_qat import distributed
from bonn_qat.errors import BonnQatError, InvalidData
from bonn_qat.files.plain import shown
from bonn_qat.training.checkpoint import Progress, RunState, mismatch, read_state, write_state
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.schedule import stage_of
from bonn_qat.training.trainer import Trainer

_EVERY_EPOCH = {"epoch", "stage", "lr", "train/loss", "train/task", "train/top1", "test/loss", "test/top1"}
_OPTIMIZER_STATE = {"adam": ("exp_avg", "exp_avg_sq", "step"), "sgd": ("momentum_buffer",)}


def write_checkpoint(run: Trainer, path: str | Path) -> None:
    """Write the state of ``run``; all processes of a group call this together, and rank 0 writes.

    Raises OSError if the file cannot be written, and what :meth:`bonn_qat.Objective.check_finite` raises; the last
    checkpoint stays.
    """
    run.objective.check_finite()
    state = capture(run)
    if distributed.rank() == 0:
        write_state(path, state)


def capture(run: Trainer) -> RunState:
    """Everything that the rest of the run depends on; all processes of a group must call this together."""
    tensors = {f"objective.{name}": tensor for name, tensor in run.objective.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items() if isinstance(t, Tensor)}
    tensors["random.data"] = run.order
    generators = {"torch": torch.get_rng_state()}
    if run.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(run.device)
    for name, own in generators.items():
        for rank, state in enumerate(distributed.all_gather(own.to(run.device))):
            tensors[f"random.{name}.{rank}"] = state.cpu()
    if run.sums is not None:
        tensors["epoch.sums"] = distributed.all_reduce(run.sums.clone())
    if run.done and run.flips is not None:
        tensors |= {f"flips.{name}": signs for name, signs in run.flips.signs.items()}
    progress = Progress(
        run_id=run.run_id,
        recipe=run.recipe.to_dict(),
        data=run.data.describe(),
        fingerprint=run.data.fingerprint,
        stage=run.stage,
        step=run.done,
        epochs=run.epochs,
        started=run.began,
        times=run.times,
        histograms=run.histograms,
        seconds=run.elapsed(),
        scaler=run.scaler.state_dict(),
    )
    return RunState(progress, tensors)


def resume(run: Trainer, path: str | Path) -> int:
    """Resume the run from its checkpoint; returns the number of finished epochs.

    Raises InvalidData naming the file if it is damaged or of another run; ``run`` is unchanged then. Warns of a
    checkpoint of an earlier version, which does not tell other images of the same number apart.
    """
    found = read_state(path)
    if not found.progress.fingerprint and (found.progress.epochs or found.progress.step):
        warnings.warn(
            f"{path} was written by an earlier version, which kept no hash of the data: make sure that these are the "
            "images and labels that the run began with",
            stacklevel=2,
        )
    if wrong := next(_mismatches(run, found), None):
        raise InvalidData(f"{path} is not a checkpoint of this run: {wrong}; delete it, or give another path")
    progress = found.progress
    run.objective.load_state_dict(found.part("objective"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in found.part("optimizer").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
    _match_memory_format(run.optimizer)
    run.scaler.load_state_dict(dict(progress.scaler))
    random = found.part("random")
    run.order = random["data"]
    run.generator.set_state(run.order)
    rank = distributed.rank()
    if f"torch.{rank}" in random:  # absent if the run had fewer processes
        torch.set_rng_state(random[f"torch.{rank}"])
    if f"cuda.{rank}" in random and run.device.type == "cuda":
        torch.cuda.set_rng_state(random[f"cuda.{rank}"], run.device)
    run.run_id, run.epochs, run.histograms = progress.run_id, progress.epochs, progress.histograms
    run.seconds, run.done, run.sums = progress.seconds, progress.step, None
    # A checkpoint of an earlier version has no times.
    run.began = progress.started or run.began
    run.times = list(progress.times) or [run.began] * len(run.epochs)
    if run.done:
        sums = found.tensors["epoch.sums"].to(run.device)
        run.sums = sums if rank == 0 else torch.zeros_like(sums)  # they are added up over the processes later
        if run.flips is not None:
            run.flips.signs = {name: signs.to(run.device) for name, signs in found.part("flips").items()}
    if progress.stage >= 0:
        run.set_stage(progress.stage)
    return len(run.epochs)


def _match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    # Fused optimizers need the memory format of a parameter's state to be the parameter's own.
    for parameter, state in optimizer.state.items():
        for name, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(tensor)


def _mismatches(run: Trainer, found: RunState) -> Iterator[str]:
    """Why ``run`` cannot resume from ``found``; each check relies on those before it."""
    progress = found.progress
    try:
        recipe = Recipe.from_dict(progress.recipe)
    except BonnQatError as error:
        yield f"its recipe is invalid: {error}"
        return
    if recipe != run.recipe:
        yield "it has a different recipe"
    if dict(progress.data) != run.data.describe():
        yield f"it was trained on {shown(dict(progress.data))}, not on {run.data.describe()}"
    elif (progress.epochs or progress.step) and progress.fingerprint not in ("", run.data.fingerprint):
        yield (
            f"it was trained on other images or labels, which also go by the name {run.data.name!r} and have the same "
            "numbers"
        )
    done = len(progress.epochs)
    if len(progress.times) not in (0, done):
        yield f"it has {len(progress.times)} times for {done} epochs"
    if done > recipe.epochs or progress.step > run.steps_in_epoch or (progress.step and done == recipe.epochs):
        yield f"it claims to be at epoch {done}, step {progress.step}"
    for epoch, metrics in enumerate(progress.epochs, 1):
        if metrics.get("epoch") != epoch or not metrics.keys() >= _EVERY_EPOCH:
            yield f"its metrics of epoch {epoch} are incomplete"
    last = done + bool(progress.step)
    stage = stage_of(run.stages, last, recipe.epochs) if last else -1
    if progress.stage != stage:
        yield f"it claims stage {progress.stage} after epoch {done}, step {progress.step}"
    if run.scaler.state_dict().keys() != progress.scaler.keys():
        yield "its loss scaler is different"
    yield from filter(None, [mismatch(found.tensors, _expected_tensors(run, found))])
    for name in found.tensors:
        if name.startswith(("random.data", "random.torch.")):
            try:
                torch.Generator().set_state(found.tensors[name])
            except RuntimeError:
                yield f"{name} is not the state of a random number generator"


def _expected_tensors(run: Trainer, found: RunState) -> dict[str, Tensor]:
    """Tensors with the names, types and shapes that those of a checkpoint at this step must have."""
    expected = {f"objective.{name}": tensor for name, tensor in run.objective.state_dict().items()}
    expected["random.data"] = run.order
    expected |= {
        name: torch.get_rng_state() if name.startswith("random.torch.") else torch.empty(16, dtype=torch.uint8)
        for name in found.tensors
        if name.startswith(("random.torch.", "random.cuda."))
    }
    if found.progress.step:
        terms = run.terms(run.stages[found.progress.stage])
        expected["epoch.sums"] = torch.zeros(len(terms) + 1, dtype=torch.float64)
        signs = run.flips.signs if run.flips is not None else {}
        expected |= {f"flips.{name}": tensor for name, tensor in signs.items()}
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        names = [f"optimizer.{index}.{name}" for name in _OPTIMIZER_STATE[run.recipe.optimizer]]
        if any(name in found.tensors for name in names):
            scalar = torch.zeros((), dtype=torch.float32)
            expected |= {name: scalar if name.endswith(".step") else parameter for name in names}
    return expected
