"""A training task for timm: the scheme's losses in ``train.py`` and in every loop that uses ``timm.task``.

>>> task = BonnTask(bonn_qat.binarize(model), criterion)
>>> optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=5e-4)
>>> result = task(images, targets)
>>> result["loss"].backward()

The task trains a :class:`bonn_qat.Objective`: the model and the regularizers' parameters. timm evaluates, averages and
saves (as ``state_dict``) the model alone; the regularizers are saved in the checkpoint's ``task_state``.
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
        f"timm {timm.__version__} has no training tasks: pip install 'timm>=1.0.23', "
        "or use bonn_qat.Objective in your own training loop"
    ) from error

__all__ = ["BonnTask"]


class _Trainable(Objective):
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, for timm's optimizer factory: the model's, and mu, sigma and the like."""
        names = {f"model.{name}" for name in getattr(self.model, "no_weight_decay", set)()}
        for prefix, module in self.named_modules():
            rules = getattr(type(module), "parameter_rules", {})
            names.update(f"{prefix}.{name}" for name, rule in rules.items() if not rule.decay)
        return names


class BonnTask(TrainingTask):  # type: ignore[misc]
    """A ``timm.task.TrainingTask`` that adds a scheme's regularizers to ``criterion``, cross entropy by default.

    A call returns the ``loss`` to minimise, the ``output``, logits ``(B, classes)``, and each weighted term for
    logging: ``task_loss``, ``kernel_loss``, ``feature_loss``. ``regularizers`` maps names to weights, by default those
    of the model's scheme; change them later through :attr:`objective`. The moving average covers the model alone.

    Raises UnknownName for an unknown regularizer; a call raises InvalidData for targets out of range.

    >>> task = BonnTask(timm.create_model("test_resnet", num_classes=10), verbose=False)
    >>> sorted(task(torch.randn(2, 3, 32, 32), torch.tensor([1, 7])))
    ['loss', 'output', 'task_loss']
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
        """Model, criterion and regularizers, without the wrapper of distributed training."""
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
        """Wrap model and regularizers together, so that the parameters of both are synchronized; returns the task."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the model in place, which keeps the names in its state dict; returns the model."""
        self.objective.model.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.objective.model

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        """The module to optimize, the :class:`bonn_qat.Objective`; with ``ema`` the moving average of the model."""
        return getattr(self, "trainable_module_ema", None) if ema else self.trainable_module

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The module to validate and export: the model, or its moving average."""
        if module is not None:
            inner = unwrap_model(module)
            return inner.model if isinstance(inner, Objective) else module
        if ema:
            return getattr(self, "eval_model_ema", None) or self.get_trainable_module(ema=True)
        return self.objective.model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All parameters; with ``exclude_head`` without the model's last two, which is timm's convention."""
        head = list(self.objective.model.parameters())[-2:] if exclude_head else []
        return [p for p in self.objective.parameters() if not any(p is other for other in head)]

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """Start a moving average of the model, without the regularizers, which are not used after training."""
        average: nn.Module = ModelEmaV3(
            self.objective.model, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        self.trainable_module_ema = average
        return average

    def update_ema(self, step: int | None = None) -> None:
        """Update the moving average, if there is one."""
        average: Any = self.get_trainable_module(ema=True)
        if average is not None:
            average.update(self.objective.model, step=step)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The regularizers' parameters and buffers; empty for the moving average."""
        return {} if ema else dict(self.objective.regularizers.state_dict())

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load what :meth:`get_task_state` returned; a checkpoint without it, such as a float one, changes nothing."""
        if state and not ema:
            self.objective.regularizers.load_state_dict(state, strict=strict)
