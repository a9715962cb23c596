"""Synchronized batch norms: statistics over all processes of a run, on GPUs and on CPUs."""

import contextlib
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from bonn_qat import distributed


@final
class SynchronizedNorms:
    """Within :meth:`on`, the batch norms of ``model`` compute their statistics over all processes of the group.

    On a GPU each becomes torch's ``SyncBatchNorm``; torch has none for CPUs, so there it becomes our equivalent. Both
    share the parameters and buffers of the original norm, and after the block the model has its own modules again.
    Nothing changes without a process group, with ``wanted=False``, or for a norm class that overrides ``forward``.

    >>> norms = SynchronizedNorms(model := nn.Sequential(nn.BatchNorm2d(3)))
    >>> with norms.on():
    ...     type(model[0]).__name__  # this process is alone
    'BatchNorm2d'
    """

    def __init__(self, model: nn.Module, *, wanted: bool = True) -> None:
        self._pairs: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        if distributed.world() == 1 or not wanted:
            return
        from timm.layers import BatchNormAct2d, convert_sync_batchnorm

        known = _BatchNorm.forward, BatchNormAct2d.forward
        for parent in list(model.modules()):
            for name, norm in parent.named_children():
                if isinstance(norm, _BatchNorm) and type(norm).forward in known:
                    synchronized = convert_sync_batchnorm(norm)
                    if not any(parameter.is_cuda for parameter in model.parameters()):
                        synchronized.__class__ = _OnCPU
                    self._pairs.append((parent, name, norm, synchronized))

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Within the block, statistics are those of all processes; all of them must run the same forward passes."""
        self._put(True)
        try:
            yield
        finally:
            self._put(False)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within a block inside :meth:`on`, each process computes its own statistics again."""
        self._put(False)
        try:
            yield
        finally:
            self._put(True)

    def _put(self, synchronize: bool) -> None:
        for parent, name, norm, synchronized in self._pairs:
            before, after = (norm, synchronized) if synchronize else (synchronized, norm)
            after.train(before.training)
            parent.add_module(name, after)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace the running statistics of the norms by their mean over all processes, weighted by batches seen, in place.

    For norms with cumulative averages, as ``torch.optim.swa_utils.update_bn`` leaves them: the result is then what one
    process would compute from all batches.
    """
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            assert norm.num_batches_tracked is not None
            own = norm.num_batches_tracked.double()
            total = distributed.all_reduce(norm.num_batches_tracked)
            for statistic in (norm.running_mean, norm.running_var):
                # A process that has seen no batch has statistics as after a reset, which get weight 0.
                distributed.all_reduce(statistic.mul_(own / total))


class _Normalized(torch.autograd.Function):
    """Batch normalization over the batch of all processes (Ioffe and Szegedy 2015, algorithm 1).

    Also returns the mean, the biased variance and the number of values per channel. The passes over the values are
    torch's fused ones; there is one collective forward and one backward, as in ``SyncBatchNorm``.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = input.float() if input.element_size() < 4 else input  # half precision under autocast
        mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
        own = torch.stack([mean, variance, torch.full_like(mean, input.numel() // input.shape[1])])
        means, variances, counts = torch.stack(distributed.all_gather(own)).unbind(1)
        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        ctx.save_for_backward(input, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return torch.batch_norm(input, weight, bias, mean, variance, False, 0.0, eps, False), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        input, weight, mean, variance, count = ctx.saved_tensors
        # First with mean and variance held constant, which gives the gradients of weight and bias.
        of_input, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0], input, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
        )
        through_variance, through_mean = distributed.all_reduce(torch.stack([of_weight, of_bias])) / -count
        scale = torch.rsqrt(variance + ctx.eps) * (1 if weight is None else weight)
        of_input += torch.batch_norm(
            input, scale * through_variance, scale * through_mean, mean, variance, False, 0.0, ctx.eps, False
        )
        return (of_input, None, None, None) if weight is None else (of_input, of_weight, of_bias, None)


class _OnCPU(_BatchNorm):
    # Not a subclass of SyncBatchNorm, because DistributedDataParallel refuses that on a CPU.
    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        result = self._normalize(input) if self.training else super().forward(input)
        for name in ("drop", "act"):  # timm's norms have these
            if hasattr(self, name):
                result = getattr(self, name)(result)
        return result

    def _normalize(self, input: Tensor) -> Tensor:
        result: Tensor
        result, mean, variance, count = _Normalized.apply(input, self.weight, self.bias, self.eps)
        self._track(mean, variance * count / (count - 1))
        return result

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
