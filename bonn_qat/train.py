"""train(model, recipe, data): one run of a recipe."""

import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import pluggy
import torch
from torch import Tensor, nn

from bonn_qat import plugins
from bonn_qat.binarize import Binarization, binarize, binary_layers
from bonn_qat.data import Data
from bonn_qat.errors import InvalidModel, TrainingDiverged, UnknownName
from bonn_qat.objective import Losses, Objective, parameter_groups
from bonn_qat.recipe import Recipe
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

    Raises what :func:`check` and :func:`bonn_qat.binarize` raise.
    """
    import timm

    check(recipe, pm)
    torch.manual_seed(recipe.seed)
    model: nn.Module = timm.create_model(
        recipe.model, num_classes=data.classes, in_chans=data.image[0], **recipe.model_options
    )
    return binarize(model, recipe_scheme(recipe, pm), skip=recipe.skip, inplace=True, pm=pm)


def train(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    *,
    device: str | torch.device | None = None,
    tick: Callable[[], None] = lambda: None,
    pm: pluggy.PluginManager | None = None,
) -> RunResult:
    """Train a binarized model in place and return what came out.

    ``device`` defaults to a GPU where there is one. ``tick`` is called after each step, ``steps(recipe,
    data)`` times in all. The order of the data and its augmentation depend on the recipe's seed alone.

    Raises TrainingDiverged when a loss term becomes NaN or infinite (on a GPU up to 50 steps later),
    InvalidData for labels that the model has no class for, InvalidModel for one that is not binarized.
    """
    run = _Run(model, recipe, data, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), tick, pm)
    hook = (pm or plugins.manager()).hook
    hook.bonn_qat_before_run(recipe=recipe, model=model)
    report: dict[str, Any] | None = None
    try:
        for epoch in range(1, recipe.epochs + 1):
            metrics = run.epoch(epoch)
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
        self.objective = Objective(model, task, regularizers=names, pm=pm).to(device)
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
        self.stage = -1
        self.epochs: list[dict[str, float]] = []
        self.watched = _watched(model, record)
        self.histograms: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in self.watched}
        self.started = time.perf_counter()
        self._keep_histograms(0)

    def epoch(self, epoch: int) -> dict[str, float]:
        self._enter_stage(epoch)
        metrics = {"epoch": float(epoch), "stage": float(self.stage), **self._train_epoch(epoch), **self._test()}
        with torch.no_grad():
            for name, layer in binary_layers(self.model):
                metrics[f"scale/{name}"] = float(layer.weight_quant.quantize(layer.weight)[1].abs().mean())
        self._keep_histograms(epoch)
        self.epochs.append(metrics)
        return metrics

    def result(self) -> RunResult:
        return RunResult(
            name=self.recipe.name,
            scheme=self.scheme.name,
            title=self.scheme.title,
            bits=scheme_bits(self.scheme),
            latents="float" if self.scheme.latent_std is None else f"{self.scheme.latent_std:g}",
            seed=self.recipe.seed,
            recipe=self.recipe.to_dict(),
            environment=environment(self.device),
            seconds=time.perf_counter() - self.started,
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

    def _enter_stage(self, epoch: int) -> None:
        stage = stage_of(self.stages, epoch, self.recipe.epochs)
        if stage == self.stage:
            return
        before = self.stages[self.stage].regularizers if self.stage >= 0 else {}
        self.stage, weights = stage, self.stages[stage].regularizers
        self.objective.set_weights(weights)
        for name, weight in weights.items():
            if weight and not before.get(name):
                self.objective.regularizers[name].start(self._to_device(self.data.measure_batches()))  # type: ignore[operator]

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
        factor = lr_factor(self.recipe, epoch) * self.stages[self.stage].lr_scale
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
            weights = cast(Tensor, layer.weight).detach().float().cpu().flatten()
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


def environment(device: torch.device) -> Mapping[str, str]:
    """What a result depends on beside its recipe: versions, commit, machine."""
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for package in ("bonn-qat", "torch", "timm", "brevitas"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found["commit"] = _commit()
    return found


def _commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def scheme_bits(scheme: Scheme) -> str:
    """Bits of weights and activations, such as ``"1/1"``; 32 is float."""
    return f"{_bits(scheme.weight)}/{_bits(scheme.activation)}"


def _bits(quantizer: object) -> int:
    return 32 if quantizer is None else getattr(getattr(quantizer, "func", quantizer), "bits", 1)


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _watched(model: nn.Module, record: Binarization) -> dict[str, nn.Module]:
    """First, middle and last of the layers that are binary, or would be in a float network."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n not in record.kept]
    chosen = dict.fromkeys([names[0], names[len(names) // 2], names[-1]] if names else [])
    return {name: model.get_submodule(name) for name in chosen}
