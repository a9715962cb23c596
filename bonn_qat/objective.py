"""Objective: the task's loss and the regularizers as one module; and parameter groups for the optimizer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pluggy
import torch
from torch import Tensor, nn

from bonn_qat import plugins
from bonn_qat.errors import BonnQatError, InvalidRecipe
from bonn_qat.quantizers import ParameterRule, Quantizer, WeightQuantizer
from bonn_qat.regularizers import Regularizer, check_targets, tensor_quant
from bonn_qat.scheme import Scheme


class Losses(NamedTuple):
    """The result of a step: the sum to minimise, the logits ``(B, classes)``, and the weighted terms by name."""

    total: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class Objective(nn.Module):
    """Model, task loss and regularizers in one forward pass: ``objective(images, targets).total.backward()``.

    ``task`` maps (logits, targets) to a scalar, by default cross entropy. ``regularizers`` maps names to
    weights, by default those of the model's scheme; ``options`` maps names to further keyword arguments, such as
    ``{"kernel": {"nu": 1e-3}}``. Since the regularizers run inside ``forward``, wrapping the Objective in
    DistributedDataParallel synchronises their parameters too.

    ``distillation`` is a task of timm for this model, such as ``timm.task.LogitDistillationTask(model, teacher)``: it
    runs the model and computes the task's loss, and ``task`` is not used. It is not a submodule: the teacher's
    parameters are not the Objective's, and you move it to its device yourself.

    Raises UnknownName for an unknown regularizer and InvalidRecipe for options that it does not take. A call raises
    InvalidData for targets beyond the model's classes.

    >>> from bonn_qat import binarize
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    >>> sorted(Objective(binarize(net))(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).terms)
    ['feature', 'kernel', 'task']
    """

    def __init__(
        self,
        model: nn.Module,
        task: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        regularizers: Mapping[str, float] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        distillation: nn.Module | None = None,
        pm: pluggy.PluginManager | None = None,
    ) -> None:
        super().__init__()
        if regularizers is None:
            scheme = getattr(getattr(model, "binarization", None), "scheme", None)
            regularizers = scheme.regularizers if isinstance(scheme, Scheme) else {}
        self.model = model
        self.task = task or nn.CrossEntropyLoss()
        self._distillation = (distillation,)  # a tuple, because a module would be registered as a submodule
        self.regularizers = nn.ModuleDict()
        for name, weight in regularizers.items():
            make: Callable[..., Regularizer] = plugins.find_regularizer(name, pm)
            try:
                self.regularizers[name] = make(model, weight=weight, **(options or {}).get(name, {}))
            except BonnQatError:
                raise
            except (TypeError, ValueError) as error:
                raise InvalidRecipe(f"the options of the regularizer {name!r} do not fit: {error}") from error

    def forward(self, images: Tensor, targets: Tensor) -> Losses:
        (distillation,) = self._distillation
        if distillation is None:
            logits: Tensor = self.model(images)
            check_targets(targets, logits.shape[1])
            terms = {"task": self.task(logits, targets)}
        else:
            result = distillation(images, targets)
            logits, terms = result["output"], {"task": result["loss"]}
        for name, regularizer in self.regularizers.items():
            if regularizer.weight:
                terms[name] = regularizer(targets)
        return Losses(torch.stack(list(terms.values())).sum(), logits, terms)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weights of the regularizers; those not named, or 0, are off and their parameters frozen."""
        for name, regularizer in self.regularizers.items():
            regularizer.weight = weights.get(name, 0.0)  # type: ignore[assignment]
            regularizer.requires_grad_(bool(regularizer.weight))


def parameter_groups(
    *modules: nn.Module,
    lr: float,
    weight_decay: float,
    modulation_lr_scale: float = 0.1,
    modulation_decay_scale: float = 1.0,
    norm_decay: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for an Objective, or for a model and its regularizers.

    BONN's modulation w and the kernel loss' sigma learn at ``modulation_lr_scale`` times ``lr``, as in the paper's
    ImageNet setting. The latent weights and the float layers decay, w by ``modulation_decay_scale`` times
    ``weight_decay``; mu, sigma and the class spreads do not. The paper says nothing about the other parameters: norms,
    biases, PReLU slopes and scales that schemes learn decay if ``norm_decay`` is true, as in the training code of wide
    residual networks, and by default do not.

    >>> [group["lr"] for group in parameter_groups(nn.Linear(2, 2), lr=0.1, weight_decay=1e-4)]
    [0.1, 0.1]
    """
    groups: dict[ParameterRule, list[nn.Parameter]] = {}
    for rule, parameter in _rules(modules, norm_decay):
        groups.setdefault(rule, []).append(parameter)
    result = []
    for rule, parameters in groups.items():
        rate, decay = (modulation_lr_scale, modulation_decay_scale) if rule.slow else (1.0, 1.0)
        decay = weight_decay * decay if rule.decay else 0.0
        result.append({"params": parameters, "lr": lr * rate, "weight_decay": decay})
    return result


def _rules(modules: Iterable[nn.Module], norm_decay: bool) -> Iterator[tuple[ParameterRule, nn.Parameter]]:
    seen: set[int] = set()
    for root in modules:
        for module in root.modules():
            rules: Mapping[str, ParameterRule] = getattr(type(module), "parameter_rules", {})
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield rules.get(name, ParameterRule(decay=norm_decay or parameter.ndim > 1)), parameter


@torch.no_grad()
def constrain_(model: nn.Module) -> None:
    """Apply the constraints of the schemes to the latent weights, in place; call it after each optimizer step.

    BNN clips them to [-1, 1]; most schemes have no constraint. Works on Brevitas' layers with our quantizers too.
    ``optimizer.register_step_post_hook(lambda *_: bonn_qat.constrain_(model))`` calls it for you.
    """
    for layer in model.modules():
        quantizer = tensor_quant(layer)
        if isinstance(quantizer, WeightQuantizer):
            quantizer.constrain(layer.weight)  # type: ignore[arg-type]


def advance(model: nn.Module, progress: float) -> None:
    """Tell the quantizers of ``model`` which part of the training is done, 0 to 1; call it before each epoch.

    The estimators of IR-Net, ReCU and AdaBin have a schedule; most schemes have none. Raises ValueError for a
    ``progress`` outside 0 to 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is the part of the training that is done, 0 to 1; got {progress}")
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.advance(progress)
