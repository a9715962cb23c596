"""Small binary networks drawn at random, worn as after a training, and images with numbers that are none."""

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import Stage, plugins
from bonn_qat.binarization.binarize import binary_layers

SIZE = (3, 12, 11)
SCHEMES = sorted(set(plugins.schemes()) - {"float"})
ODD = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-41, -1e-41, -0.0)


class Net(nn.Module):
    """A float stem, some binary layers with or without norms, activations, shortcuts and pools, and a head or none."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        width = draw.choice([5, 8, 33, 40])
        self.stem = [nn.Conv2d(3, width, draw.choice([1, 3, 5]), padding=draw.choice([0, 1]))]
        self.stem += draw.choice([[], [nn.BatchNorm2d(width)], [nn.BatchNorm2d(width), nn.ReLU()], [nn.ReLU()]])
        self.stem += draw.choice([[], [nn.MaxPool2d(3, 2, 1)], [nn.MaxPool2d(2)]])
        self.stem, self.blocks = nn.Sequential(*self.stem), nn.ModuleList()
        self.shortcuts = []
        for _ in range(draw.randint(1, 3)):
            out, kernel = draw.choice([width, width, 16]), draw.choice([1, 3])
            is_alike = out == width
            groups = draw.choice([1, 1, 4 if width % 4 == 0 and out % 4 == 0 else 1])
            mode = draw.choice(["zeros", "zeros", "reflect", "circular"]) if kernel == 3 else "zeros"
            parts: list[nn.Module] = [
                nn.Conv2d(
                    width, out, kernel, padding=kernel // 2, groups=groups, padding_mode=mode, bias=draw.random() < 0.5
                )
            ]
            parts += [nn.BatchNorm2d(out)] if draw.random() < 0.7 else []
            parts += draw.choice([[], [nn.ReLU()], [nn.Hardtanh()], [nn.PReLU(out)]])
            parts += [nn.MaxPool2d(2, 1)] if draw.random() < 0.2 else []
            self.shortcuts.append(is_alike and not isinstance(parts[-1], nn.MaxPool2d) and draw.random() < 0.6)
            self.blocks.append(nn.Sequential(*parts))
            width = out
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 4)]
        self.head = draw.choice([nn.Identity(), nn.Sequential(*head)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, has_shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = block(x) + x if has_shortcut else block(x)
        return self.head(x)


def network(seed: int, scheme: Any = None) -> tuple[nn.Module, str]:
    """A binary network in evaluation mode, and its scheme: drawn, if none is given."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    net = Net(draw)
    chosen = scheme or draw.choice(SCHEMES)
    include = ["blocks"] + (["head.2"] if isinstance(net.head, nn.Sequential) else [])
    model = bonn_qat.binarize(net, chosen, include=include, input_size=SIZE)
    for _, layer in binary_layers(model):
        layer.enter(Stage())
    return worn(model), str(chosen)


@torch.no_grad()
def worn(model: nn.Module) -> nn.Module:
    """As after a training; norms rise, fall, and are constant in some channels."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.weight.normal_(0.3, 1)
            module.weight[torch.rand_like(module.weight) < 0.15] = 0
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("threshold", "gamma", "zeta", "slope", "bias") or "act" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
        elif name.endswith("beta"):
            parameter.mul_(-1)
    return model.eval().requires_grad_(False)


def odd_images(count: int, seed: int, size: tuple[int, ...] = SIZE) -> Tensor:
    """Images with single numbers and whole pixels of ``ODD``; the first is an ordinary one."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *size, generator=source)
    for image in range(1, count):
        for _ in range(3):
            value = ODD[int(torch.randint(len(ODD), (), generator=source))]
            channel, row, column = (int(torch.randint(n, (), generator=source)) for n in size)
            x[image, slice(None) if channel else 0, row, column] = value
    return x.contiguous(memory_format=torch.channels_last)


def same(ours: Tensor, theirs: Tensor, tolerance: float = 0.0) -> bool:
    """Whether NaN and infinities are in the same places, and all else is equal, or equal up to rounding."""
    places = all(torch.equal(f(ours), f(theirs)) for f in (torch.isnan, torch.isposinf, torch.isneginf))
    kept = theirs.isfinite() & ours.isfinite()
    allowed = tolerance * theirs[kept].abs().amax() if tolerance and kept.any() else 0
    return places and bool(((ours[kept] - theirs[kept]).abs() <= allowed).all())
