"""Find discs, squares and triangles with an FCOS-like detector of one stage, float and binary; mAP by torchmetrics.

pip install -e '.[bench,examples]' -e plugins/bonn-qat-baselines -e plugins/bonn-qat-runtime
python examples/detection.py
"""

import argparse

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, generalized_box_iou_loss, sigmoid_focal_loss

import bonn_qat
from bonn_qat.bench import BACKENDS, bench

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--schemes", nargs="+", default=["float", "xnor", "bonn"])
parser.add_argument("--scenes", type=int, default=512, help="of the training; the test has a quarter as many")
parser.add_argument("--lr", type=float, default=2e-3)
arguments = parser.parse_args()

FASTEST = {name: BACKENDS[name] for name in ("onnxruntime float", "packed")}
SIZE, CLASSES, OBJECTS, WIDTH, STRIDE = 64, 3, 2, 64, 4


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Scenes ``(count, 3, SIZE, SIZE)``, and of their objects the boxes ``(count, OBJECTS, 4)`` and the classes."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    colours, coarse = (torch.rand(count, 3, n, n, generator=generator) for n in (1, 8))
    images = colours + 0.3 * nn.functional.interpolate(coarse, SIZE, mode="bilinear")
    classes = torch.randint(CLASSES, (count, OBJECTS), generator=generator)
    radius = 7 + 7 * torch.rand(count, OBJECTS, generator=generator)
    centre = radius[..., None] + (SIZE - 2 * radius[..., None]) * torch.rand(count, OBJECTS, 2, generator=generator)
    for i in range(OBJECTS):
        u, v = ((place - centre[:, i, axis, None, None]) / radius[:, i, None, None] for axis, place in ((0, x), (1, y)))
        shapes = (u**2 + v**2 < 1, torch.maximum(u.abs(), v.abs()) < 1, (v < 1) & (v > 2 * u.abs() - 1))
        inside = torch.stack(shapes, 1)[torch.arange(count), classes[:, i]]
        images = torch.where(inside[:, None], torch.rand(count, 3, 1, 1, generator=generator), images)
    boxes = torch.cat([centre - radius[..., None], centre + radius[..., None]], 2)
    return images + 0.05 * torch.randn(images.shape, generator=generator) - 0.5, boxes, classes


class Block(nn.Module):
    """A convolution beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.act(self.norm(self.conv(x)))
        return y


class Detector(nn.Module):
    """For each cell of a grid the logits of the classes, and the sides of a box in cells, as logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 6, STRIDE, 1), nn.BatchNorm2d(WIDTH))
        self.backbone = nn.Sequential(*(Block() for _ in range(5)), nn.BatchNorm2d(WIDTH))
        self.classes, self.sides = nn.Conv2d(WIDTH, CLASSES, 1), nn.Conv2d(WIDTH, 4, 1)
        nn.init.constant_(self.classes.get_parameter("bias"), -3.0)  # most cells are empty
        nn.init.constant_(self.sides.get_parameter("bias"), 0.9)  # a box of 20 pixels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.backbone(self.stem(x))
        return self.classes(x), self.sides(x)


ROW = (torch.arange(SIZE // STRIDE) + 0.5) * STRIDE
CELLS = torch.stack(torch.meshgrid(ROW, ROW, indexing="xy"), -1).flatten(0, 1)  # the middle (x, y) of each


def decoded(sides: Tensor) -> Tensor:
    """The boxes ``(B, cells, 4)``."""
    sides = STRIDE * sides.flatten(2).transpose(1, 2).clamp(max=3).exp()
    return torch.cat([CELLS - sides[..., :2], CELLS + sides[..., 2:]], 2)


def loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Focal loss of all cells, and generalized IoU of those near the middle of an object."""
    (logits, sides), (boxes, classes) = outputs, targets
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    distance = (CELLS[:, None] - middle[:, None]).abs().amax(-1)  # (B, cells, OBJECTS)
    nearest, owner = distance.min(2)
    is_object = nearest < 1.5 * STRIDE
    wanted = nn.functional.one_hot(classes.gather(1, owner), CLASSES) * is_object[..., None]
    count = is_object.sum()
    focal = sigmoid_focal_loss(logits.flatten(2).transpose(1, 2), wanted.float(), reduction="sum") / count
    truth = boxes.gather(1, owner[..., None].expand(-1, -1, 4))
    overlap = generalized_box_iou_loss(decoded(sides)[is_object], truth[is_object], reduction="sum") / count
    total: Tensor = focal + overlap
    return total


@torch.no_grad()
def detected(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    """For each picture the ``boxes``, ``scores`` and ``labels`` that remain after non-maximum suppression."""
    logits, sides = model(images)
    scores, boxes = logits.sigmoid().flatten(2).amax(1), decoded(sides)
    labels, results = logits.flatten(2).argmax(1), []
    for box, score, label in zip(boxes, scores, labels, strict=True):
        keep = batched_nms(box, score, label, 0.5)[:20]
        results.append({"boxes": box[keep], "scores": score[keep], "labels": label[keep]})
    return results


generator = torch.Generator().manual_seed(arguments.seed)
images, boxes, classes = scenes(arguments.scenes, generator)
test_images, test_boxes, test_classes = scenes(arguments.scenes // 4, generator)
truth = [{"boxes": b, "labels": c} for b, c in zip(test_boxes, test_classes, strict=True)]
results, outputs = {}, {}
for scheme in arguments.schemes:
    torch.manual_seed(arguments.seed)
    network = Detector()
    model = bonn_qat.binarize(network, scheme, input_size=(3, SIZE, SIZE))
    regularizers = {"kernel": 1e-4} if scheme == "bonn" else {}
    objective = bonn_qat.Objective(model, loss, regularizers=regularizers)
    optimizer = torch.optim.Adam(bonn_qat.parameter_groups(objective, lr=arguments.lr, weight_decay=0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs)
    for _ in range(arguments.epochs):
        objective.train()
        for batch in torch.split(torch.randperm(len(images)), 8):
            optimizer.zero_grad()
            objective(images[batch], (boxes[batch], classes[batch])).total.backward()
            optimizer.step()
            bonn_qat.constrain_(model)
        schedule.step()
    model.eval()
    metric = MeanAveragePrecision()
    outputs[scheme] = [found for part in torch.split(test_images, 16) for found in detected(model, part)]
    metric.update(outputs[scheme], truth)
    report = bench(network, model, backends=FASTEST, batches=[1], threads=[1], rounds=9)
    times = {f"{x.backend} ms": x.median_milliseconds for x in report.latencies}
    results[scheme] = {"mAP %": 100 * float(metric.compute()["map"]), "Mbit": bonn_qat.summary(model).mbit, **times}
    print(f"{scheme}: " + ", ".join(f"{name} {value:.2f}" for name, value in results[scheme].items()), flush=True)
