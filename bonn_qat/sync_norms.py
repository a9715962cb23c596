"""Synchronised norms: batch statistics over all processes of a run, on GPUs and on CPUs."""

import contextlib
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bonn_qat import distributed


@final
class SynchronisedNorms:
    """Within :meth:`on` the batch norms of ``model`` take their statistics over all processes of the group.

    On a GPU they are torch's ``SyncBatchNorm``, on a CPU, for which torch has none, the same in plain operations. The
    parameters and buffers stay the same objects, and after the block the model has its own modules again. Without a
    group, without ``wanted``, and for a norm whose class has a forward pass of its own, nothing changes.
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
                    synchronised = convert_sync_batchnorm(norm)
                    if not next(model.parameters()).is_cuda:
                        synchronised.__class__ = _OnCPU
                    self._pairs.append((parent, name, norm, synchronised))

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The block in which statistics are those of all processes, which must then all run it alike."""
        self._put(True)
        try:
            yield
        finally:
            self._put(False)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """A block within :meth:`on` in which each process has its own statistics."""
        self._put(False)
        try:
            yield
        finally:
            self._put(True)

    def _put(self, synchronise: bool) -> None:
        for parent, name, norm, synchronised in self._pairs:
            before, after = (norm, synchronised) if synchronise else (synchronised, norm)
            after.train(before.training)
            parent.add_module(name, after)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """The statistics of all processes' norms, weighted by the batches that each has seen, in place of its own.

    For norms with cumulative averages, as ``torch.optim.swa_utils.update_bn`` leaves them: then it is what one process
    gets from all batches.
    """
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            assert norm.num_batches_tracked is not None
            own = norm.num_batches_tracked.double()
            total = distributed.add_up(norm.num_batches_tracked)
            for statistic in (norm.running_mean, norm.running_var):
                # A process without batches has reset its own, to a variance of 1.
                distributed.add_up(statistic.mul_(own / total))


class _Total(torch.autograd.Function):
    """The sum over all processes; what it is in each of them has the same gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return distributed.add_up(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return distributed.add_up(grads[0].clone())


def _total(tensor: Tensor) -> Tensor:
    total: Tensor = _Total.apply(tensor)
    return total


class _OnCPU(_BatchNorm):
    # Not a SyncBatchNorm, which DistributedDataParallel refuses on a CPU.
    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        result = self._normalise(input) if self.training else super().forward(input)
        for name in ("drop", "act"):  # of timm's norms
            if hasattr(self, name):
                result = getattr(self, name)(result)
        return result

    def _normalise(self, input: Tensor) -> Tensor:
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(input.ndim)]
        count = distributed.add_up(input.new_tensor(input.numel() / input.shape[1]))
        mean = _total(input.sum(axes)) / count
        centred = input - mean.view(shape)
        # In two passes: the difference of two large sums would have no digits left.
        variance = _total(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * count / (count - 1))
        result = centred * torch.rsqrt(variance + self.eps).view(shape)
        return torch.addcmul(self.bias.view(shape), result, self.weight.view(shape)) if self.affine else result

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
