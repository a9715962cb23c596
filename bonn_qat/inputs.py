"""Inputs: what a network is called with, which is mostly one tensor of images; but also tokens, or several tensors."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from bonn_qat.errors import InvalidModel

_KEPT = 8  # samples of an example
_ALLOWED = "a tensor, a tuple of tensors, or a dict of tensors by the names of forward's arguments, each (B, ...)"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """A batch of a network's inputs: the tensors ``args`` by position, and ``kwargs`` by name.

    >>> ids = torch.tensor([[1, 5, 2]])
    >>> print(Inputs.of({"ids": ids, "mask": ids > 1}), "and", Inputs.images((3, 8, 8)))
    ids int64 (B, 3), mask bool (B, 3) and float32 (B, 3, 8, 8)
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def images(cls, size: Sequence[int]) -> "Inputs":
        """One image of ``size`` ``(C, H, W)``."""
        return cls(args=(torch.zeros(1, *size),))

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """Raises InvalidModel for an ``example`` that is no such tensors, or whose numbers of samples differ."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, Mapping):
            made = cls(kwargs=dict(example))
        else:
            is_one = isinstance(example, str) or not isinstance(example, Sequence)
            made = cls(args=(example,) if is_one else tuple(example))
        tensors = made.tensors
        if not tensors or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in tensors):
            kinds = ", ".join(type(x).__name__ for x in tensors)
            raise InvalidModel(f"example_inputs are {_ALLOWED}; got {kinds or 'nothing'}")
        if odd := [x for x in tensors if x.dtype not in (torch.float32, torch.int64, torch.int32, torch.bool)]:
            raise InvalidModel(f"example_inputs are of float32, int64, int32 or bool; got {odd[0].dtype}")
        if len({len(x) for x in tensors}) > 1:
            counts = ", ".join(str(len(x)) for x in tensors)
            raise InvalidModel(f"example_inputs are of one batch; got {counts} samples")
        return made.map(lambda x: x[:_KEPT].detach().cpu().clone())

    @classmethod
    def batch(cls, images: "Tensor | Inputs") -> "Inputs":
        """A tensor of images as inputs."""
        return images if isinstance(images, Inputs) else cls(args=(images,))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [*self.args, *self.kwargs.values()]

    @property
    def size(self) -> tuple[int, ...]:
        """The size of a sample of the first tensor, ``(C, H, W)`` of images."""
        return tuple(self.tensors[0].shape[1:])

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __str__(self) -> str:
        names = [*("" for _ in self.args), *(f"{name} " for name in self.kwargs)]
        return ", ".join(
            f"{name}{str(x.dtype).removeprefix('torch.')} ({', '.join(map(str, ('B', *x.shape[1:])))})"
            for name, x in zip(names, self.tensors, strict=True)
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """``function`` of each tensor."""
        args, kwargs = map(function, self.args), {name: function(x) for name, x in self.kwargs.items()}
        return Inputs(args=tuple(args), kwargs=kwargs)

    def drawn(self, count: int, seed: int) -> "Inputs":
        """``count`` random samples: normal numbers, and whole ones from those of the example."""
        generator = torch.Generator().manual_seed(seed)

        def draw(x: Tensor) -> Tensor:
            shape = (count, *x.shape[1:])
            if x.is_floating_point() or not x.numel():
                return torch.randn(shape, generator=generator).to(x.dtype)
            return x.flatten()[torch.randint(x.numel(), shape, generator=generator)]

        return self.map(draw)

    def split(self, count: int) -> "list[Inputs]":
        """Parts of ``count`` samples."""
        starts = range(0, len(self), count)
        return [self.map(lambda x, start=start: x[start : start + count]) for start in starts]  # type: ignore[misc]

    def call(self, function: Callable[..., Any]) -> Any:
        """What ``function``, such as a model, gives for them."""
        return function(*self.args, **self.kwargs)

    def dynamic_shapes(self, model: nn.Module, batch: Any) -> Any:
        """For ``torch.export``: the first axis of each tensor is the free ``batch``."""
        free = {0: batch}
        if not self.kwargs:
            return tuple(free for _ in self.args)
        names = [*list(inspect.signature(model.forward).parameters)[: len(self.args)], *self.kwargs]
        return dict.fromkeys(names, free)

    @property
    def is_images(self) -> bool:
        """Whether they are one tensor of floats by position."""
        return not self.kwargs and len(self.args) == 1 and self.args[0].is_floating_point()

    def names(self, places: Sequence[str], spec: Any) -> list[str]:
        """Names for the ``places`` of an exported program, whose inputs have this ``spec``."""
        by_position, by_name = spec.children()
        return ["images"] if self.is_images else [*places[: by_position.num_leaves], *by_name.context]

    def named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors by ``names``, those of a graph, in its order: the ones by position are the first."""
        given = dict(zip((name for name in names if name not in self.kwargs), self.args, strict=True))
        return {name: {**given, **self.kwargs}[name] for name in names}


Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor] | Inputs
