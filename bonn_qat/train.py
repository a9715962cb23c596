"""train(model, recipe, data): one run of a recipe."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from bonn_qat import plugins
from bonn_qat.binarize import NORMS, Binarization, binarize, binary_layers
from bonn_qat.checkpoint import read_tensors, write_tensors
from bonn_qat.data import Data
from bonn_qat.environment import environment
from bonn_qat.errors import InvalidData, InvalidModel, TrainingDiverged, UnknownName
from bonn_qat.metrics import FlipRatio
from bonn_qat.objective import Losses, Objective, advance, parameter_groups
from bonn_qat.recipe import Recipe
from bonn_qat.regularizers import latent_weights
from bonn_qat.results import RunResult
from bonn_qat.scheme import Scheme, Stage
from bonn_qat.summary import summary

_BINS = 61
_CHECK_EVERY = 50  # steps between looks for NaN on a GPU, where each look is a synchronisation


def recipe_scheme(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> Scheme:
    """The recipe's scheme with its options and start of the latents. Raises UnknownName."""
    scheme = plugins.find_scheme(recipe.scheme, pm).configure(recipe.scheme_options)
    return scheme if recipe.latents == "scheme" else replace(scheme, latent_std=recipe.latent_std)


def check(recipe: Recipe, pm: pluggy.PluginManager | None = None) -> None:
    """Raise UnknownName for a model, scheme, option or regularizer of the recipe that nobody offers."""
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)

    if not timm.is_model(recipe.model):
        raise UnknownName("model", recipe.model, timm.list_models())
    for stage in recipe.stages or recipe_scheme(recipe, pm).stages:
        for name in stage.regularizers:
            plugins.find_regularizer(name, pm)


def build(recipe: Recipe, data: Data, pm: pluggy.PluginManager | None = None) -> nn.Module:
    """The recipe's network for ``data``, binarized. The same seed gives every scheme the same float start.

    Raises what :func:`check` and :func:`bonn_qat.binarize` raise, and InvalidData for a checkpoint that is not this
    network's.
    """
    check(recipe, pm)
    torch.manual_seed(recipe.seed)
    model, scheme = _network(recipe, data), recipe_scheme(recipe, pm)
    # A stage with float weights wants them as they are: the latents' scale comes with the first binary stage.
    float_first = (recipe.stages or scheme.stages)[0].weights == "float"
    start = replace(scheme, latent_std=None) if float_first else scheme
    model = binarize(model, start, skip=recipe.skip, include=recipe.include, inplace=True, pm=pm)
    if recipe.checkpoint:
        _load(model, Path(recipe.checkpoint))
    model.binarization = replace(model.binarization, scheme=scheme)  # type: ignore[type-var]
    return model


def _network(recipe: Recipe, data: Data) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(
        recipe.model, num_classes=data.classes, in_chans=data.image[0], **recipe.model_options
    )
    return network


def _load(model: nn.Module, path: Path) -> None:
    tensors, _ = read_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first, *rest = (line.strip() for line in str(error).splitlines() if line.strip())
        raise InvalidData(
            f"{path} is no checkpoint of this {type(model).__name__}: {' '.join(rest) or first}"
        ) from error


def train(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    *,
    device: str | torch.device | None = None,
    checkpoint: Path | None = None,
    tick: Callable[[], None] = lambda: None,
    pm: pluggy.PluginManager | None = None,
) -> RunResult:
    """Train a binarized model in place and return what came out.

    ``device`` defaults to a GPU where there is one. ``checkpoint`` is written after each epoch, with all that the
    rest of the run depends on; where it exists the run goes on from it, on a CPU to the very weights that it would
    have had without the interruption. ``tick`` is called after each step, ``steps(recipe, data)`` times in all.
    The order of the data and its augmentation depend on the recipe's seed alone.

    Raises TrainingDiverged when a loss term becomes NaN or infinite (on a GPU up to 50 steps later),
    InvalidData for labels that the model has no class for or a checkpoint of another run, InvalidModel for a model
    that is not binarized.
    """
    run = _Run(model, recipe, data, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), tick, pm)
    done = run.resume(checkpoint) if checkpoint and checkpoint.exists() else 0
    hook = (pm or plugins.manager()).hook
    hook.bonn_qat_before_run(recipe=recipe, model=model)
    report: dict[str, Any] | None = None
    try:
        for metrics in run.epochs:
            hook.bonn_qat_after_epoch(recipe=recipe, epoch=int(metrics["epoch"]), metrics=metrics)
        for epoch in range(done + 1, recipe.epochs + 1):
            metrics = run.epoch(epoch)
            if checkpoint:
                run.save(checkpoint)
            hook.bonn_qat_after_epoch(recipe=recipe, epoch=epoch, metrics=metrics)
        result = run.result()
        report = asdict(result)
    finally:
        hook.bonn_qat_after_run(recipe=recipe, report=report)
    return result


def steps(recipe: Recipe, data: Data) -> int:
    """Optimizer steps of a run, within one in an epoch."""
    return recipe.epochs * math.ceil(data.train_size / recipe.batch_size)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Data,
        device: torch.device,
        tick: Callable[[], None],
        pm: pluggy.PluginManager | None,
    ) -> None:
        record = getattr(model, "binarization", None)
        if not isinstance(record, Binarization):
            raise InvalidModel(
                f"{type(model).__name__} is not binarized; train(binarize(model), ...), or for a float network "
                "binarize(model, 'float')"
            )
        self.model, self.recipe, self.data, self.device, self.tick = model.to(device), recipe, data, device, tick
        self.scheme = record.scheme
        self.stages = recipe.stages or self.scheme.stages
        self.size = summary(model, data.image)
        names = {name: 0.0 for stage in self.stages for name in stage.regularizers}
        task = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        teacher = _teacher(model, task, recipe, data, device) if recipe.teacher else None
        self.objective = Objective(model, task, regularizers=names, distillation=teacher, pm=pm).to(device)
        groups = parameter_groups(
            self.objective,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            modulation_lr_scale=recipe.modulation_lr_scale,
        )
        self.optimizer = _optimizer(recipe, groups)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.steps_in_epoch = math.ceil(data.train_size / recipe.batch_size)
        self.layers = dict(binary_layers(model))
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.stage = -1
        self.epochs: list[dict[str, float]] = []
        self.watched = _watched(model, record)
        self.histograms: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in self.watched}
        self.seconds, self.started = 0.0, time.perf_counter()
        self._keep_histograms(0)

    def epoch(self, epoch: int) -> dict[str, float]:
        self._enter_stage(epoch)
        advance(self.model, (epoch - 1) / self.recipe.epochs)
        flips = FlipRatio(self.model) if self.layers else None
        metrics = {"epoch": float(epoch), "stage": float(self.stage), **self._train_epoch(epoch)}
        if self._stage.recompute_norms and (
            epoch == self.recipe.epochs or stage_of(self.stages, epoch + 1, self.recipe.epochs) != self.stage
        ):
            update_bn(self._to_device(self.data.measure_batches()), self.model)
        metrics |= self._test()
        if flips is not None:
            flips.update()
            metrics |= {f"flips/{name}" if name else "flips": share for name, share in flips.compute().items()}
        with torch.no_grad():
            for name, layer in self.layers.items():
                metrics[f"scale/{name}"] = float(layer.weight_quant.quantize(layer.latent())[1].abs().mean())
        self._keep_histograms(epoch)
        self.epochs.append(metrics)
        return metrics

    def save(self, path: Path) -> None:
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items() if isinstance(t, Tensor)}
        tensors |= {"random.data": self.generator.get_state(), "random.torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        header = {
            "recipe": self.recipe.to_dict(),
            "stage": self.stage,
            "epochs": self.epochs,
            "histograms": self.histograms,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }
        write_tensors(path, tensors, header)

    def resume(self, path: Path) -> int:
        """Take up the run where ``path`` left it; returns the number of epochs that are done."""
        tensors, header = read_tensors(path)
        if header.get("recipe") != self.recipe.to_dict():
            raise InvalidData(f"{path} is not a checkpoint of this recipe; delete it, or give another path")
        parts: dict[str, dict[str, Tensor]] = {"objective": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.objective.load_state_dict(parts["objective"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.generator.set_state(parts["random"]["data"])
        torch.set_rng_state(parts["random"]["torch"])
        if "cuda" in parts["random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        self.epochs, self.histograms, self.seconds = header["epochs"], header["histograms"], header["seconds"]
        self._set_stage(header["stage"])
        for _ in range(len(self.epochs) * self.steps_in_epoch):
            self.tick()
        return len(self.epochs)

    def result(self) -> RunResult:
        return RunResult(
            name=self.recipe.name,
            scheme=self.recipe.variant,
            title=" ".join(filter(None, (self.scheme.title, self.recipe.variant.partition(":")[2]))),
            bits=self.scheme.bits,
            latents="float" if self.scheme.latent_std is None else f"{self.scheme.latent_std:g}",
            seed=self.recipe.seed,
            recipe=self.recipe.to_dict(),
            environment=environment(self.device),
            seconds=self.seconds + time.perf_counter() - self.started,
            epochs=self.epochs,
            size={
                "parameters": self.size.parameters,
                "mbit": self.size.mbit,
                "float_mbit": self.size.float_mbit,
                "compression": self.size.compression,
                "macs": self.size.macs,
                "binary_macs": self.size.binary_macs,
            },
            histograms=self.histograms,
        )

    @property
    def _stage(self) -> Stage:
        return self.stages[self.stage]

    def _enter_stage(self, epoch: int) -> None:
        stage = stage_of(self.stages, epoch, self.recipe.epochs)
        if stage == self.stage:
            return
        before = self._stage if self.stage >= 0 else None
        self._set_stage(stage)
        if before and before.weights == "float" and self._stage.weights == "binary":
            for layer in self.layers.values():
                layer.adopt(self.scheme.latent_std)
            self.optimizer.state.clear()  # the momentum of weights that had another scale
        for name, weight in self._stage.regularizers.items():
            if weight and not (before and before.regularizers.get(name)):
                self.objective.regularizers[name].start(self._to_device(self.data.measure_batches()))  # type: ignore[operator]

    def _set_stage(self, stage: int) -> None:
        self.stage = stage
        norms = {id(p) for m in self.model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
        for parameter in self.trainable:
            parameter.requires_grad_(self._stage.trains == "all" or id(parameter) in norms)
        self.objective.set_weights(self._stage.regularizers)
        for layer in self.layers.values():
            layer.enter(self._stage)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        self.objective.train()
        sums: dict[str, Tensor] = {}
        seen = 0
        batches = self.data.train_batches(self.recipe.batch_size, self.generator, augment=self.recipe.augment)
        for step, (images, targets) in enumerate(self._to_device(batches)):
            self._set_lr((epoch - 1) + step / self.steps_in_epoch)
            losses: Losses = self.objective(images, targets)
            self.optimizer.zero_grad(set_to_none=True)
            losses.total.backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cpu" or step % _CHECK_EVERY == 0:
                self._check(losses, images, epoch, step)
            self.optimizer.step()
            for layer in self.layers.values():
                layer.weight_quant.constrain(layer.weight)
            hits = (losses.logits.detach().argmax(1) == targets).sum() * 100
            for name, value in {"loss": losses.total, **losses.terms}.items():
                sums[name] = sums.get(name, 0) + value.detach() * len(targets)
            sums["top1"] = sums.get("top1", 0) + hits
            seen += len(targets)
            self.tick()
        self._check(losses, images, epoch, step)
        lr = self.optimizer.param_groups[0]["lr"]
        return {"lr": lr, **{f"train/{name}": float(value) / seen for name, value in sums.items()}}

    def _set_lr(self, epoch: float) -> None:
        factor = lr_factor(self.recipe, epoch) * self._stage.lr_scale
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        self.objective.eval()
        hits = loss = torch.zeros((), device=self.device)
        for images, targets in self._to_device(self.data.test_batches()):
            logits = self.model(images)
            hits = hits + (logits.argmax(1) == targets).sum()
            loss = loss + nn.functional.cross_entropy(logits, targets, reduction="sum")
        count = self.data.test_size
        return {"test/loss": float(loss) / count, "test/top1": 100 * float(hits) / count}

    def _to_device(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in batches:
            yield images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _check(self, losses: Losses, images: Tensor, epoch: int, step: int) -> None:
        if bool(torch.isfinite(losses.total)):
            return
        term = next((name for name, value in losses.terms.items() if not bool(torch.isfinite(value))), "the sum")
        where = first_non_finite(self.model, images)
        raise TrainingDiverged(
            f"the loss term {term!r} is {losses.terms.get(term, losses.total).item()} at epoch "
            f"{epoch}, step {step + 1}; {where}; try a lower lr than {self.recipe.lr:g}"
        )

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


def lr_factor(recipe: Recipe, epoch: float) -> float:
    """What the learning rate is multiplied by, ``epoch`` epochs (a fraction too) after the start."""
    done = epoch / recipe.epochs
    if recipe.schedule == "step":
        return recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    if recipe.schedule == "one_cycle" and done < recipe.warmup:
        return max(done / recipe.warmup, 1e-2)
    if recipe.schedule == "one_cycle":
        return 0.5 + 0.5 * math.cos(math.pi * (done - recipe.warmup) / (1 - recipe.warmup))
    return 0.5 + 0.5 * math.cos(math.pi * done) if recipe.schedule == "cosine" else 1.0


def stage_of(stages: tuple[Stage, ...], epoch: int, epochs: int) -> int:
    """Index of the stage that ``epoch`` (from 1) of ``epochs`` belongs to, by the stages' shares."""
    ends, total = [], 0.0
    for stage in stages:
        total += stage.share
        ends.append(round(total * epochs))
    return next((index for index, end in enumerate(ends) if epoch <= end), len(stages) - 1)


def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Where NaN or infinity first shows: in a parameter, else in the output of a layer, named in words."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name} is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
                found.append(f"the first layer whose output is not finite is {name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "no layer's output is" if bool(torch.isfinite(images).all()) else "the images hold NaN or infinity"


def _teacher(model: nn.Module, task: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> nn.Module:
    from timm.task import DistillationTeacher, LogitDistillationTask

    with torch.random.fork_rng():  # a teacher must not change the run's random numbers
        teacher = _network(recipe, data)
    _load(teacher, Path(recipe.teacher))
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


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _watched(model: nn.Module, record: Binarization) -> dict[str, nn.Module]:
    """First, middle and last of the layers that are binary, or would be in a float network."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in record.kept]
    chosen = dict.fromkeys([names[0], names[len(names) // 2], names[-1]] if names else [])
    return {name: model.get_submodule(name) for name in chosen}
