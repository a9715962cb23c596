"""Train a network on sounds, float and binary: which of six ways does the pitch of a noisy tone go?

pip install -e . -e plugins/bonn-qat-baselines
python examples/signals.py
"""

import argparse

import torch
from torch import Tensor, nn

import bonn_qat

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--sounds", type=int, default=4096, help="of the training; the test has a quarter as many")
arguments = parser.parse_args()

RATE, LENGTH = 8000, 1024  # samples in a second, and in a sound
PITCHES = (
    lambda t: torch.full_like(t, 0.5), lambda t: t, lambda t: 1 - t, lambda t: (2 * t - 1).abs(),
    lambda t: 1 - (2 * t - 1).abs(), lambda t: (t > 0.5).float(),
)  # fmt: skip


def sounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tones of 300 to 2,250 Hz in noise of twice their power ``(count, 1, LENGTH)``, and how their pitches go."""
    targets = torch.randint(len(PITCHES), (count,), generator=generator)
    low, ratio, phase = (torch.rand(count, 1, generator=generator) for _ in range(3))
    low, high = 300 + 600 * low, (300 + 600 * low) * (1.5 + ratio)
    way = torch.stack([pitch(torch.linspace(0, 1, LENGTH)) for pitch in PITCHES])[targets]
    tones = torch.sin(2 * torch.pi * (phase + (low + (high - low) * way).cumsum(1) / RATE))
    return (tones + torch.randn(count, LENGTH, generator=generator))[:, None], targets


class Block(nn.Module):
    """A convolution beside a shortcut, then half as many samples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, width, 9, padding=4, bias=False), nn.BatchNorm1d(width)
        self.act, self.pool = nn.ReLU(), nn.MaxPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pool(x + self.act(self.norm(self.conv(x))))
        return y


generator = torch.Generator().manual_seed(arguments.seed)
inputs, targets = sounds(arguments.sounds, generator)
test_inputs, test_targets = sounds(arguments.sounds // 4, generator)
for scheme in ("float", "xnor", "bonn"):
    torch.manual_seed(arguments.seed)
    network = nn.Sequential(
        nn.Conv1d(1, 64, 16, 4), *(Block(64) for _ in range(4)), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 6)
    )
    model = bonn_qat.binarize(network, scheme, input_size=(1, LENGTH))
    objective = bonn_qat.Objective(model)
    optimizer = torch.optim.SGD(bonn_qat.parameter_groups(objective, lr=0.05, weight_decay=5e-4), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    for _ in range(arguments.epochs):
        objective.train()
        for batch in torch.split(torch.randperm(len(inputs)), 64):
            optimizer.zero_grad()
            objective(inputs[batch], targets[batch]).total.backward()
            optimizer.step()
            bonn_qat.constrain_(model)
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (
            (torch.cat([model(x) for x in torch.split(test_inputs, 64)]).argmax(1) == test_targets).float().mean()
        )
    size = bonn_qat.summary(model).mbit
    print(f"{scheme}: accuracy {100 * accuracy:.2f} % of {len(test_targets)} sounds, {size:.2f} Mbit")
