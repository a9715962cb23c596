"""A training task for timm: the scheme's losses in ``train.py`` and in every loop that speaks ``timm.task``.

>>> task = BonnTask(bonn_qat.binarize(model), criterion)
>>> optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=5e-4)
>>> result = task(images, targets)
>>> result["loss"].backward()

The task trains a :class:`bonn_qat.Objective`: the model and the regularizers' own parameters. What timm evaluates,
averages and saves as ``state_dict`` is the model; the regularizers go to the checkpoint's ``task_state``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bonn_qat.objective import Objective

try:
    from timm.task import TrainingTask
except ImportError as error:
    raise ImportError(
        f"timm {timm.__version__} has no training tasks, they came with 1.0.23: pip install 'timm>=1.0.23', "
        "or use bonn_qat.Objective in a loop of your own"
    ) from error

__all__ = ["BonnTask"]


class _Trainable(Objective):
    def no_weight_decay(self) -> set[str]:
        """Names without weight decay for timm's optimizer factory: the model's own, and mu, sigma and their like."""
        names = {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}
        for prefix, module in self.named_modules():
            rules = getattr(type(module), "parameter_rules", {})
            names.update(f"{prefix}.{name}" for name, rule in rules.items() if not rule.decay)
        return names


class BonnTask(TrainingTask):  # type: ignore[misc]
    """A ``timm.task.TrainingTask`` that adds a scheme's regularizers to ``criterion``, cross entropy by default.

    A call gives ``loss`` to minimise, ``output``, the logits ``(B, classes)``, and each term, weighted, for logging:
    ``task_loss``, ``kernel_loss``, ``feature_loss``. ``regularizers`` maps names to weights, by default those of the
    model's scheme; :attr:`objective` changes them later. The moving average is one of the model alone.

    Raises UnknownName for a regularizer that nobody offers; a call raises InvalidData for targets out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        regularizers: Mapping[str, float] | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if isinstance(criterion, nn.Module):
            criterion = criterion.to(device=self.device)
        self.trainable_module: nn.Module = _Trainable(model, criterion, regularizers=regularizers)

    @property
    def objective(self) -> Objective:
        """Model, criterion and regularizers, without what distributed training puts around them."""
        objective: Objective = unwrap_model(self.trainable_module)
        return objective

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        losses = self.trainable_module(input, target)
        return {
            "loss": losses.total,
            "output": losses.logits,
            **{f"{name}_loss": term.detach() for name, term in losses.terms.items()},
        }

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> "BonnTask":
        """Wrap model and regularizers together, so that the parameters of both are synchronised; returns itself."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the model in place, which leaves the names in its state dict as they are; returns the model."""
        self.objective.model.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.objective.model

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        """What the optimizer is made for: the :class:`bonn_qat.Objective`; or the moving average of the model."""
        return getattr(self, "trainable_module_ema", None) if ema else self.trainable_module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The model, or its moving average: what is validated and exported."""
        if module is not None:
            inner = unwrap_model(module)
            return inner.model if isinstance(inner, Objective) else module
        if ema:
            return getattr(self, "eval_model_ema", None) or self.get_trainable_module(ema=True)
        return self.objective.model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that learns; with ``exclude_head`` without the model's last two parameters, as everywhere in timm."""
        head = list(self.objective.model.parameters())[-2:] if exclude_head else []
        return [p for p in self.objective.parameters() if not any(p is other for other in head)]

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """Start a moving average of the model; the regularizers are of no use after the training."""
        average: nn.Module = ModelEmaV3(
            self.objective.model, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        self.trainable_module_ema = average
        return average

    def update_ema(self, step: int | None = None) -> None:
        """Move the average towards the model, if there is one."""
        average: Any = self.get_trainable_module(ema=True)
        if average is not None:
            average.update(self.objective.model, step=step)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The regularizers' parameters and buffers; nothing for the moving average."""
        return {} if ema else dict(self.objective.regularizers.state_dict())

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take over what :meth:`get_task_state` gave; a checkpoint without it, such as a float one, changes nothing."""
        if state and not ema:
            self.objective.regularizers.load_state_dict(state, strict=strict)
