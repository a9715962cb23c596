"""Trainer: the epochs of one run: training steps, tests, stages, and what is measured on the way."""

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pluggy
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from bonn_qat import distributed
from bonn_qat.binarization.binarize import NORMS, Binarization, binary_layers
from bonn_qat.conv_types import CONVOLUTIONS
from bonn_qat.environment import environment
from bonn_qat.errors import InvalidData, InvalidModel, InvalidRecipe, TrainingDiverged
from bonn_qat.inspection.diagnose import first_non_finite
from bonn_qat.inspection.flips import FlipRatio
from bonn_qat.inspection.summary import summary
from bonn_qat.objective import Losses, Objective, advance, non_finite, parameter_groups
from bonn_qat.regularizers import latent_weights
from bonn_qat.scheme import Stage, reweighed
from bonn_qat.training.checkpoint import Checkpointer
from bonn_qat.training.data import Batch, Data
from bonn_qat.training.evaluate import TOP, tally
from bonn_qat.training.network import to_memory_format
from bonn_qat.training.precision import autocast
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import SIZES, RunResult
from bonn_qat.training.schedule import lr_factor, stage_of
from bonn_qat.training.sync_norms import SynchronizedNorms, average_statistics

_BINS = 61
_CHECK_EVERY = 50  # steps between checks for NaN on a GPU, each of which synchronizes


class Trainer:
    """One run of a recipe on a binarized model; :func:`bonn_qat.train` drives it.

    ``distillation`` is that of :class:`bonn_qat.Objective`. In a process group each process has a shard of each batch;
    gradients are averaged over the processes, and within ``norms.on()`` so are the statistics of batch norms.
    ``checkpointer`` is called wherever a checkpoint may be written.

    Raises InvalidModel for a model that is not binarized or holds NaN, InvalidRecipe for a batch of fewer images than
    processes.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Data,
        device: torch.device,
        *,
        task: nn.Module,
        distillation: nn.Module | None = None,
        pm: pluggy.PluginManager | None = None,
    ) -> None:
        record = getattr(model, "binarization", None)
        if not isinstance(record, Binarization):
            raise InvalidModel(
                f"{type(model).__name__} is not binarized; train(binarize(model), ...), or for a float network "
                "binarize(model, 'float')"
            )
        if recipe.checkpoint and getattr(getattr(model, "recipe", None), "checkpoint", "") != recipe.checkpoint:
            raise InvalidRecipe(
                f"train trains the model that it is given, and does not load checkpoint = {recipe.checkpoint!r}; load "
                "it before, for example with bonn_qat.create_model(NAME, pretrained=True) or bonn_qat.load(PATH)"
            )
        if tensor := non_finite(model):
            raise InvalidModel(f"{tensor} holds NaN or infinity before the first step; load finite weights")
        self.size = summary(model, data.image)
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(device=device)
        to_memory_format(self.model, self.layout)
        self.recipe, self.data, self.device = recipe, data.to(device), device
        model.preprocessing = data.preprocessing  # type: ignore[assignment]
        self.scheme = record.scheme
        own = tuple(reweighed(stage, recipe.scheme_options) for stage in recipe.stages)
        self.stages = own or self.scheme.stages
        names = {name: 0.0 for stage in self.stages for name in stage.regularizers}
        self.objective = Objective(
            model, task, regularizers=names, options=recipe.regularizer_options, distillation=distillation, pm=pm
        ).to(device)
        self.forward: Callable[[Tensor, Tensor], Losses] = self.objective
        groups = parameter_groups(
            self.objective,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            modulation_lr_scale=recipe.modulation_lr_scale,
            modulation_decay_scale=recipe.modulation_decay_scale,
            norm_decay=recipe.norm_decay,
        )
        self.optimizer = _optimizer(recipe, groups, device)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.run_id = distributed.broadcast(uuid.uuid4().hex)
        self.norms = SynchronizedNorms(self.model, wanted=recipe.sync_norms)
        self.checkpointer = Checkpointer()
        self.shard = distributed.rank(), distributed.world()
        if min(recipe.batch_size, data.train_size) < self.shard[1]:
            raise InvalidRecipe(
                f"batch_size is {recipe.batch_size} for {data.train_size} training images and {self.shard[1]} "
                "processes; each process needs an image of every batch"
            )
        self.steps_in_epoch = math.ceil(data.train_size / recipe.batch_size)
        self.layers = dict(binary_layers(model))
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.stage = -1
        self.epochs: list[dict[str, float]] = []
        self.began = time.time()
        self.times: list[float] = []  # when each of the epochs ended
        # Of the current epoch: steps done, the sums of their terms, the generator's state before it shuffled the
        # images, and the weights' signs at the start.
        self.done = 0
        self.sums: Tensor | None = None
        self.order = self.generator.get_state()
        self.flips = FlipRatio(model) if self.layers else None
        self.watched = _watched(model, record)
        self.histograms: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in self.watched}
        self.seconds, self.started = 0.0, time.perf_counter()
        self._keep_histograms(0)

    def epoch(self, epoch: int) -> dict[str, float]:
        """Train for an epoch, counted from 1, or for the rest of a resumed one, then test; returns its metrics."""
        if not self.done:
            self._enter_stage(epoch)
            self.flips = FlipRatio(self.model) if self.layers else None
        advance(self.model, (epoch - 1) / self.recipe.epochs)
        metrics = {"epoch": float(epoch), "stage": float(self.stage), **self._train_epoch(epoch)}
        if self._stage.recompute_norms and (
            epoch == self.recipe.epochs or stage_of(self.stages, epoch + 1, self.recipe.epochs) != self.stage
        ):
            self._recompute_norms()
        with self._named(epoch):
            self.objective.check_finite()
        metrics |= self._test()
        if self.flips is not None:
            self.flips.update()
            metrics |= {f"flips/{name}" if name else "flips": share for name, share in self.flips.compute().items()}
        with torch.no_grad():
            for name, layer in self.layers.items():
                metrics[f"scale/{name}"] = float(layer.weight_quant.quantize(layer.latent())[1].abs().mean())
        self._keep_histograms(epoch)
        self.epochs.append(metrics)
        self.times.append(time.time())
        self.done, self.sums, self.order = 0, None, self.generator.get_state()
        return metrics

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.objective.train()
        batches = self.data.train_batches(
            self.recipe.batch_size, self.generator, augment=self.recipe.augment,
            augmentation=self.recipe.augmentation, shard=self.shard, start=self.done,
        )  # fmt: skip
        if self.done:
            self._set_lr((epoch - 1) + (self.done - 1) / self.steps_in_epoch)  # no step may be left to set it
        self.objective.steps.fill_(self.done)
        for images, targets in self._on_device(batches):
            self._set_lr((epoch - 1) + self.done / self.steps_in_epoch)
            may_wait = self.device.type == "cpu" or self.done % _CHECK_EVERY == 0
            with self._named(epoch, images):
                losses = self.step(images, targets)
                if may_wait:
                    # All processes must stop together: one that went on would wait for the others forever.
                    self.objective.check_finite(tensors=False)
            with torch.no_grad():
                hits = (losses.logits.argmax(1) == targets).double().mean()
                values = [losses.total, *losses.terms.values(), hits, torch.ones_like(hits)]
                weighted = torch.stack([value.double() for value in values]) * len(targets)
                self.sums = weighted if self.sums is None else self.sums.add_(weighted)
            self.done += 1
            self.checkpointer.after_step(self.device, may_wait=may_wait)
        assert self.sums is not None, "an epoch has at least one batch"
        *means, count = distributed.all_reduce(self.sums.clone()).tolist()
        terms = self.terms(self._stage)
        metrics = {f"train/{name}": total / count for name, total in zip(terms, means, strict=True)}
        metrics["train/top1"] *= 100
        return {"lr": self.optimizer.param_groups[0]["lr"], **metrics}

    def step(self, images: Tensor, targets: Tensor) -> Losses:
        """Forward, backward and update, without waiting for a GPU."""
        with autocast(self.recipe.precision, self.device):
            losses = self.forward(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for layer in self.layers.values():
            layer.weight_quant.constrain(layer.weight)
        return losses

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        self.objective.eval()
        batches = self._on_device(self.data.test_batches(shard=self.shard), resumable=True)
        sums = tally(self.model, batches)
        top1, top5, loss, spoilt = (distributed.all_reduce(sums) / self.data.test_size).tolist()
        if spoilt:  # the signs hide it
            raise InvalidData(f"epoch {len(self.epochs) + 1}: {self._spoilt()}; remove such images")
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"epoch {len(self.epochs) + 1}: the loss of the test set is {loss}; try a lower learning rate than "
                f"{self.recipe.lr:g}"
            )
        metrics = {"test/loss": loss, "test/top1": 100 * top1}
        return metrics | ({"test/top5": 100 * top5} if self.data.classes > TOP else {})

    def _spoilt(self) -> str:
        """The first image of the test set that is not finite, in words."""
        first = 0
        with distributed.alone():
            for images, _ in self.data.test_batches():
                wrong = (~images.flatten(1).isfinite().all(1)).nonzero()
                if len(wrong):
                    return f"image {first + int(wrong[0])} of the test set, counted from 0, holds NaN or infinity"
                first += len(images)
        return "an image of the test set holds NaN or infinity"

    def result(self) -> RunResult:
        """The result of the run, after its last epoch."""
        return RunResult(
            name=self.recipe.name,
            scheme=self.recipe.scheme_spec,
            title=" ".join(filter(None, (self.scheme.title, self.recipe.scheme_spec.partition(":")[2]))),
            bits=self.scheme.bits,
            latents=self.scheme.start,
            seed=self.recipe.seed,
            recipe=self.recipe.to_dict(),
            environment=environment(self.device),
            seconds=self.elapsed(),
            epochs=self.epochs,
            size={name: getattr(self.size, name) for name in SIZES},
            histograms=self.histograms,
            run_id=self.run_id,
            started=self.began,
            times=self.times,
        )

    def elapsed(self) -> float:
        """Seconds that the run has taken, including those before it was resumed."""
        return self.seconds + time.perf_counter() - self.started

    @property
    def _stage(self) -> Stage:
        return self.stages[self.stage]

    def _enter_stage(self, epoch: int) -> None:
        stage = stage_of(self.stages, epoch, self.recipe.epochs)
        if stage == self.stage:
            return
        before = self._stage if self.stage >= 0 else None
        self.set_stage(stage)
        if before and before.weights == "float" and self._stage.weights == "binary":
            for layer in self.layers.values():
                layer.adopt()
            self.optimizer.state.clear()  # the weights had another scale
        for name, weight in self._stage.regularizers.items():
            if weight and not (before and before.regularizers.get(name)):
                batches = self._on_device(self.data.measure_batches(shard=self.shard), resumable=False)
                self.objective.regularizers[name].start(batches)  # type: ignore[operator]

    def set_stage(self, stage: int) -> None:
        """Set layers, loss weights and trainable parameters as the stage of this index says."""
        self.stage = stage
        norms = {id(p) for m in self.model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        for parameter in self.trainable:
            parameter.requires_grad_(self._stage.trains == "all" or id(parameter) in norms)
        self.objective.set_weights(self._stage.regularizers)
        for layer in self.layers.values():
            layer.enter(self._stage)
        self.forward = self._make_forward()

    def _make_forward(self) -> Callable[[Tensor, Tensor], Losses]:
        """Network and losses in one call, distributed and compiled as the recipe says; made anew for each stage."""
        forward: nn.Module = self.objective
        if self.shard[1] > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, devices)
            # Synchronized norms keep all buffers equal. Set here because torch 2.15 renames the argument and warns.
            forward.broadcast_buffers = not self.recipe.sync_norms
        return torch.compile(forward, mode=self.recipe.compile) if self.recipe.compile else forward

    def _recompute_norms(self) -> None:
        self.checkpointer.save()  # the state in the middle of this is not one to resume from
        batches = self._on_device(self.data.measure_batches(shard=self.shard), resumable=False)
        # A last batch of one image may have no statistics, as in training.
        batches = (batch for batch in batches if len(batch[1]) > 1 or self.data.train_size == 1)
        with self.norms.off(), distributed.alone():  # processes have different numbers of batches
            update_bn(batches, self.model)
        average_statistics(self.model)

    def terms(self, stage: Stage) -> list[str]:
        """Names of the values that are averaged over an epoch's images."""
        return ["loss", "task", *(name for name in self.objective.regularizers if stage.regularizers.get(name)), "top1"]

    def _set_lr(self, epoch: float) -> None:
        factor = lr_factor(self.recipe, epoch) * self._stage.lr_scale
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _on_device(self, batches: Iterator[Batch], *, resumable: bool | None = None) -> Iterator[Batch]:
        """Move batches to the device. ``resumable`` says whether to write a checkpoint when a run stops between two.

        None for the batches of training steps, after which :meth:`Checkpointer.after_step` handles interrupts.
        """
        for images, targets in batches:
            images, targets = (part.to(self.device, non_blocking=True) for part in (images, targets))
            yield (images.contiguous(memory_format=self.layout) if images.ndim == 4 else images), targets
            if resumable is not None:
                self.checkpointer.between_batches(resumable=resumable)

    @contextlib.contextmanager
    def _named(self, epoch: int, images: Tensor | None = None) -> Iterator[None]:
        """Add what is known here to the errors of steps that are not finite, and of batches that are too small."""
        try:
            yield
        except TrainingDiverged as error:
            where = "" if self.layers or images is None else f"; {first_non_finite(self.model, images)}"
            raise TrainingDiverged(f"epoch {epoch}: {error} than {self.recipe.lr:g}{where}") from error
        except InvalidData as error:
            raise InvalidData(f"epoch {epoch}: {error}") from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InvalidRecipe(
                f"batch_size is {self.recipe.batch_size}, which leaves a norm of {type(self.model).__name__} one value "
                f"per channel, of which there are no statistics ({error}); allowed: at least {2 * self.shard[1]}"
            ) from error

    @torch.no_grad()
    def _keep_histograms(self, epoch: int) -> None:
        total = self.recipe.epochs
        if epoch not in {0, 1, 2, total // 4, total // 2, total}:
            return
        for name, layer in self.watched.items():
            weights = latent_weights(layer).detach().float().cpu().flatten()
            bound = float(weights.abs().max().clamp(min=1e-12))
            counts = torch.histc(weights, _BINS, -bound, bound)
            edges = torch.linspace(-bound, bound, _BINS + 1)
            self.histograms[name][str(epoch)] = {"edges": edges.tolist(), "counts": counts.tolist()}


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    fused = device.type == "cuda"  # handles the scaled loss as well; no faster on a CPU
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=fused)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)


def _watched(model: nn.Module, record: Binarization) -> dict[str, nn.Module]:
    """The first, middle and last layer that is binary, or would be in a float network."""
    names = [n for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS) and n not in record.kept]
    chosen = dict.fromkeys([names[0], names[len(names) // 2], names[-1]] if names else [])
    return {name: model.get_submodule(name) for name in chosen}
