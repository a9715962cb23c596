"""train(model, recipe, data): one run of a recipe."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import nn

from bonn_qat import distributed, plugins
from bonn_qat.training.checkpoint import Keeper
from bonn_qat.training.data import Data
from bonn_qat.training.interrupts import held
from bonn_qat.training.network import float_network, load_file
from bonn_qat.training.precision import products
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RunResult
from bonn_qat.training.trainer import Trainer, lay_out

CHECKPOINT_SECONDS = 600.0


def train(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    *,
    device: str | torch.device | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    tick: Callable[[], None] = lambda: None,
    pm: pluggy.PluginManager | None = None,
) -> RunResult:
    """Train a binarized model in place and return what came out.

    ``device`` defaults to a GPU where there is one. ``tick`` is called after each step, ``steps(recipe, data)`` times
    in all. Everything random is drawn from the recipe's seed: the global generators of torch are seeded with it.

    ``checkpoint`` is written at the start, after each epoch, after ``checkpoint_seconds`` within one, and when the run
    is stopped, with all that the rest of the run depends on. Where it exists the run goes on from it, on a CPU to the
    very weights that it would have had without the interruption. Ctrl-C and SIGTERM stop the run after the step that
    it is at; a second one does not wait.

    In a process group (``torchrun``, ``accelerate launch``) each process takes its part of every batch, ``batch_size``
    is that of all together, gradients, class centres and the statistics of batch norms are those of the whole batch,
    and the first process alone writes and calls hooks. A run may go on with another number of processes.

    Raises TrainingDiverged when a loss term becomes NaN or infinite (on a GPU up to 50 steps later),
    InvalidData for labels that the model has no class for or a checkpoint of another run, InvalidModel for a model
    that is not binarized, OSError where the checkpoint cannot be written; the one from before is there then still.
    """
    device = torch.device(device) if device else distributed.device()
    task = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    teacher = _teacher(model, task, recipe, data, device) if recipe.teacher else None
    torch.manual_seed(recipe.seed + distributed.rank())
    run = Trainer(model, recipe, data, device, task=task, distillation=teacher, pm=pm)
    done = run.resume(checkpoint) if checkpoint and checkpoint.exists() else 0
    for _ in range(done * run.steps_in_epoch + run.done):
        tick()
    hook = plugins.Observers(pm)
    if distributed.rank():
        hook = plugins.Observers(plugins.create_manager(entry_points=False))  # the first process reports
    with held() as interrupts:
        run.keeper = Keeper(run.state, checkpoint, seconds=checkpoint_seconds, interrupts=interrupts, tick=tick)
        # Before anybody hears of the run, for its number is in there; and a disk that is full is told at once.
        run.keeper.save()
        hook.bonn_qat_before_run(recipe=recipe, model=model, run_id=run.run_id)
        report: dict[str, Any] | None = None
        try:
            with products(recipe.precision), run.norms.on():
                for metrics in run.epochs:
                    hook.bonn_qat_after_epoch(recipe=recipe, epoch=int(metrics["epoch"]), metrics=metrics)
                for epoch in range(done + 1, recipe.epochs + 1):
                    metrics = run.epoch(epoch)
                    run.keeper.save()
                    hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics=metrics)
            result = run.result()
            report = asdict(result)
        finally:
            lay_out(model, torch.contiguous_format)  # as safetensors wants it
            hook.bonn_qat_after_run(recipe=recipe, result=report)
    return result


def steps(recipe: Recipe, data: Data) -> int:
    """Optimizer steps of a run, within one in an epoch."""
    return recipe.epochs * math.ceil(data.train_size / recipe.batch_size)


def _teacher(model: nn.Module, task: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> nn.Module:
    from timm.task import DistillationTeacher, LogitDistillationTask

    with torch.random.fork_rng():  # a teacher must not change the run's random numbers
        teacher = float_network(recipe, data.classes, data.image[0])
    load_file(teacher, Path(recipe.teacher))
    distillation: nn.Module = LogitDistillationTask(
        model,
        DistillationTeacher(teacher.to(device).requires_grad_(False), device=device),
        criterion=task,
        task_loss_weight=1 - recipe.distillation,
        temperature=recipe.temperature,
        device=device,
        verbose=False,
    )
    return distillation
