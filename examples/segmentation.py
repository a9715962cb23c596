"""Segment pictures with a small U-Net, float and binary: which pixels are a disc, a square or a triangle?

pip install -e '.[bench]' -e plugins/bonn-qat-baselines -e plugins/bonn-qat-runtime
python examples/segmentation.py
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bonn_qat
from bonn_qat.bench import BACKENDS, bench

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--schemes", nargs="+", default=["float", "xnor", "bonn"])
parser.add_argument("--pictures", type=int, default=512, help="of the training; the test has a quarter as many")
parser.add_argument("--lr", type=float, default=4e-3)
arguments = parser.parse_args()

FASTEST = {name: BACKENDS[name] for name in ("onnxruntime float", "packed")}
SIZE, CLASSES, WIDTH = 48, 4, 48  # background, disc, square, triangle
Y, X = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")


def textures(kind: Tensor, generator: torch.Generator) -> Tensor:
    """One of each ``kind`` ``(count,)``: 0 blends two colours, 1 has stripes, 2 checks, 3 dots."""
    angle, pitch, *phases = torch.rand(4, len(kind), 1, 1, generator=generator)
    u = (X * (3.14 * angle).cos() + Y * (3.14 * angle).sin()) * (0.7 + 0.5 * pitch) + 6.28 * phases[0]
    v = (Y * (3.14 * angle).cos() - X * (3.14 * angle).sin()) * (0.7 + 0.5 * pitch) + 6.28 * phases[1]
    both = u.sin() * v.sin()
    waves = (0.5 + 0.5 * (u / 6).sin(), (u.sin() > 0).float(), (both > 0).float(), (both > 0.4).float())
    share = torch.stack(waves, 1)[torch.arange(len(kind)), kind][:, None]
    first, second = torch.rand(2, len(kind), 3, 1, 1, generator=generator)
    mixed: Tensor = share * first + (1 - share) * second
    return mixed


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures ``(count, 3, SIZE, SIZE)`` of three shapes, some behind others, and the classes of their pixels."""
    targets = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    images = textures(targets[:, 0, 0], generator)
    for _ in range(3):
        kind = torch.randint(1, CLASSES, (count,), generator=generator)
        across, down, radius = torch.rand(3, count, 1, 1, generator=generator)
        u, v = ((place - 6 - (SIZE - 12) * at) / (6 + 6 * radius) for place, at in ((X, across), (Y, down)))
        shapes = (u**2 + v**2 < 1, torch.maximum(u.abs(), v.abs()) < 0.9, (v < 0.8) & (v > 2 * u.abs() - 1))
        inside = torch.stack(shapes, 1)[torch.arange(count), kind - 1]
        images = torch.where(inside[:, None], textures(kind, generator), images)
        targets = torch.where(inside, kind[:, None, None], targets)
    return images + 0.1 * torch.randn(images.shape, generator=generator) - 0.5, targets


class Block(nn.Module):
    """A convolution beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.act(self.norm(self.conv(x)))
        return y


class UNet(nn.Module):
    """Down to an eighth and up again, where each resolution adds what it saw on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 2, 1), nn.BatchNorm2d(WIDTH)), nn.MaxPool2d(2)
        self.down, self.up = (nn.ModuleList(Block() for _ in range(3)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, seen = self.stem(x), []
        for block in self.down:
            x = block(x)
            seen.append(x)
            x = self.pool(x)
        for block in self.up:
            x = block(seen.pop() + F.interpolate(x, scale_factor=2.0))
        return F.interpolate(self.head(self.norm(x)), scale_factor=2.0, mode="bilinear")


def mean_iou(found: Tensor, targets: Tensor) -> float:
    """The intersection over union of each class, over all pixels, and of these the mean, in percent."""
    pairs = torch.bincount((CLASSES * targets + found).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    return 100 * float((pairs.diag() / (pairs.sum(0) + pairs.sum(1) - pairs.diag())).mean())


generator = torch.Generator().manual_seed(arguments.seed)
inputs, targets = pictures(arguments.pictures, generator)
test_inputs, test_targets = pictures(arguments.pictures // 4, generator)
results, outputs = {}, {}
for scheme in arguments.schemes:
    torch.manual_seed(arguments.seed)
    network = UNet()
    model = bonn_qat.binarize(network, scheme, input_size=(3, SIZE, SIZE))
    options = {"feature": {"classifier": "head"}} if scheme == "bonn" else {}
    objective = bonn_qat.Objective(model, options=options)
    optimizer = torch.optim.Adam(bonn_qat.parameter_groups(objective, lr=arguments.lr, weight_decay=0))
    steps = arguments.epochs * -(-len(inputs) // 8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(arguments.epochs):
        objective.train()
        for batch in torch.split(torch.randperm(len(inputs)), 8):
            optimizer.zero_grad()
            objective(inputs[batch], targets[batch]).total.backward()
            optimizer.step()
            schedule.step()
            bonn_qat.constrain_(model)
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x) for x in torch.split(test_inputs, 16)]).argmax(1)
    report = bench(network, model, backends=FASTEST, batches=[1], threads=[1], rounds=9)
    times = {f"{x.backend} ms": x.median_milliseconds for x in report.latencies}
    results[scheme] = {"mean IoU %": mean_iou(found, test_targets), "Mbit": bonn_qat.summary(model).mbit, **times}
    outputs[scheme] = found
    print(f"{scheme}: " + ", ".join(f"{name} {value:.2f}" for name, value in results[scheme].items()), flush=True)
