"""train(model, recipe, data): one run of a recipe."""

import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import nn

from bonn_qat import distributed, plugins
from bonn_qat.binarization.binarize import Binarization
from bonn_qat.errors import InvalidData
from bonn_qat.files.preprocessing import preprocessing_of
from bonn_qat.files.tensors import read_tensors
from bonn_qat.objective import CrossEntropy, in_float32
from bonn_qat.training.checkpoint import Checkpointer
from bonn_qat.training.data import Data
from bonn_qat.training.evaluate import restandardize, warn_of_other_labels
from bonn_qat.training.interrupts import deferred_interrupts
from bonn_qat.training.network import float_network, load_file, restore, to_memory_format, weights_file
from bonn_qat.training.precision import matmul_precision, warn_if_slow
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RunResult
from bonn_qat.training.resume import resume, write_checkpoint
from bonn_qat.training.trainer import Trainer

CHECKPOINT_SECONDS = 600.0


def train(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    *,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    tick: Callable[[], None] = lambda: None,
    pm: pluggy.PluginManager | None = None,
) -> RunResult:
    """Train a binarized model in place and return its result.

    Of the recipe it uses what concerns the training. ``model``, ``model_options``, ``scheme``, ``scheme_options``,
    ``latents``, ``skip`` and ``include`` only describe the network, which is as you made it: the result has the model's
    own scheme. Afterwards ``model.preprocessing`` is that of the data. Installed observers, such as those for MLflow
    and TensorBoard, are called.

    ``device`` defaults to a GPU if there is one. ``tick`` is called after each step. Everything random follows from the
    recipe's seed, which torch's global generators are seeded with.

    ``checkpoint`` is a file that is written at the start, after each epoch, every ``checkpoint_seconds`` and when the
    run is stopped. If it exists the run resumes from it, on a CPU to exactly the weights of an uninterrupted run.
    Ctrl-C and SIGTERM stop the run after the current step; a second one stops it at once.

    In a process group (``torchrun``, ``accelerate launch``) each process takes a shard of every batch; ``batch_size``
    is that of all processes together, and so are gradients, class centres and batch norm statistics. Only rank 0 writes
    and calls hooks. A run may resume with another number of processes.

    Raises TrainingDiverged when a loss term, a parameter, a buffer or the input of a binary layer becomes NaN or
    infinite: with the step, on a GPU up to 50 steps later, and before weights, results or a checkpoint are written.
    Raises InvalidData for images that hold NaN, labels that the model has no class for or a checkpoint of another run,
    InvalidModel for a model that is not binarized, InvalidRecipe for a batch that is too small for the model's norms
    and for a ``checkpoint`` of the recipe that the model was not built from, OSError where the checkpoint cannot be
    written; the last checkpoint stays.
    """
    recipe = _with_scheme_of(model, recipe)
    device = torch.device(device) if device else distributed.device()
    if distributed.rank() == 0:
        warn_if_slow(recipe.precision, device)
    task = CrossEntropy(label_smoothing=recipe.label_smoothing)
    teacher = _teacher(model, task, recipe, data, device, pm) if recipe.teacher else None
    torch.manual_seed(recipe.seed + distributed.rank())
    run = Trainer(model, recipe, data, device, task=task, distillation=teacher, pm=pm)
    done = resume(run, checkpoint) if checkpoint and Path(checkpoint).exists() else 0
    for _ in range(done * run.steps_in_epoch + run.done):
        tick()
    hook = plugins.Observers(pm)
    if distributed.rank():
        hook = plugins.Observers(plugins.create_manager(entry_points=False))  # only rank 0 reports
    with deferred_interrupts() as interrupts:
        write = functools.partial(write_checkpoint, run, checkpoint) if checkpoint else None
        run.checkpointer = Checkpointer(write, seconds=checkpoint_seconds, interrupts=interrupts, tick=tick)
        run.checkpointer.save()  # before the run id is given to plugins, and to fail early if the disk is full
        hook.bonn_qat_before_run(recipe=recipe, model=model, run_id=run.run_id)
        outcome: dict[str, Any] | None = None
        try:
            with matmul_precision(recipe.precision), run.norms.on():
                for metrics, ended in zip(run.epochs, run.times, strict=True):
                    hook.bonn_qat_after_epoch(recipe=recipe, epoch=int(metrics["epoch"]), metrics=metrics, time=ended)
                for epoch in range(done + 1, recipe.epochs + 1):
                    metrics = run.epoch(epoch)
                    run.checkpointer.save()
                    hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics=metrics, time=run.times[-1])
            result = run.result()
            outcome = asdict(result)
        finally:
            to_memory_format(model, torch.contiguous_format)  # as safetensors needs it
            hook.bonn_qat_after_run(recipe=recipe, result=outcome)
    return result


def _with_scheme_of(model: nn.Module, recipe: Recipe) -> Recipe:
    record, own = getattr(model, "binarization", None), getattr(model, "recipe", None)
    if not isinstance(record, Binarization) or record.scheme.name == recipe.scheme:
        return recipe
    scheme = record.scheme
    options = own.scheme_options if isinstance(own, Recipe) and own.scheme == scheme.name else {}
    return replace(recipe, scheme=scheme.name, scheme_options=options, latents=scheme.start)


def _teacher(
    model: nn.Module, task: nn.Module, recipe: Recipe, data: Data, device: torch.device, pm: pluggy.PluginManager | None
) -> nn.Module:
    from timm.task import DistillationTeacher, LogitDistillationTask

    path = weights_file(recipe.teacher, pm)
    tensors, header = read_tensors(path)
    with torch.random.fork_rng():  # the teacher must not change the run's random numbers
        if "recipe" in header:
            teacher = restore(tensors, header, path, pm=pm)
        else:
            teacher = float_network(recipe, data.classes, data.image[0])
            load_file(teacher, path)
    if header.get("classes", data.classes) != data.classes or header.get("image", data.image)[0] != data.image[0]:
        raise InvalidData(
            f"the teacher {recipe.teacher} sorts images of {header['image'][0]} channels into {header['classes']} "
            f"classes; these data have {data.image[0]} and {data.classes}"
        )
    known = preprocessing_of(teacher)
    warn_of_other_labels(known, data, f"the teacher {recipe.teacher} teaches the numbers of classes, not their names")
    adapt = restandardize(data.preprocessing, known, device)
    teacher.register_forward_pre_hook(lambda module, inputs: (adapt(inputs[0]),))
    teacher.register_forward_hook(lambda module, inputs, output: in_float32(output))
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
