"""Double the resolution of photographs with an EDSR-like network, float and binary, beside bicubic interpolation.

pip install -e '.[bench,examples]' -e plugins/bonn-qat-baselines -e plugins/bonn-qat-runtime
python examples/super_resolution.py
"""

import argparse

import skimage.data
import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bonn_qat
from bonn_qat.bench import BACKENDS, bench

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--schemes", nargs="+", default=["float", "xnor", "bonn"])
parser.add_argument("--validate", action="store_true", help="on a photograph beside the training and the test")
parser.add_argument("--lr", type=float, default=4e-3)
arguments = parser.parse_args()

FASTEST = {name: BACKENDS[name] for name in ("onnxruntime float", "packed")}
BATCH, PATCH, WIDTH, BLOCKS = 16, 24, 48, 5  # PATCH: pixels along a side of what the network reads


def as_tensor(photograph: object) -> Tensor:
    """``(1, 3, H, W)`` from 0 to 1, with an even height and width."""
    image = torch.tensor(photograph).permute(2, 0, 1)[None] / 255
    return image[..., : image.shape[2] // 2 * 2, : image.shape[3] // 2 * 2]


def halved(images: Tensor) -> Tensor:
    """Half as high and wide."""
    return F.interpolate(images, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)


def mean_psnr(found: list[Tensor], truth: list[Tensor]) -> float:
    """The mean of the photographs' peak signal-to-noise ratios in dB, without the outermost pixels."""
    errors = [(x.clamp(0, 1) - y)[..., 4:-4, 4:-4].square().mean() for x, y in zip(found, truth, strict=True)]
    return -10 * float(torch.stack(errors).log10().mean())


class Block(nn.Module):
    """A convolution beside a shortcut; as in EDSR without a norm, which a binary one adds before its sign."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.act(self.conv(x))
        return y


class EDSR(nn.Module):
    """Blocks at the low resolution, whose result corrects the bicubic interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.tail, self.shuffle = nn.Conv2d(WIDTH, 12, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        detail: Tensor = self.shuffle(self.tail(self.body(self.head(x))))
        return F.interpolate(x, scale_factor=2.0, mode="bicubic") + detail


data = skimage.data
training = [data.astronaut(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0], data.immunohistochemistry()]
test = [data.chelsea()] if arguments.validate else sklearn.datasets.load_sample_images().images
training, test = ([as_tensor(photograph) for photograph in part] for part in (training, test))
low = [halved(truth) for truth in test]


def patches(generator: torch.Generator) -> Tensor:
    """Random parts of the training's photographs, some mirrored ``(BATCH, 3, 2 * PATCH, 2 * PATCH)``."""
    found = []
    for _ in range(BATCH):
        photograph = training[int(torch.randint(len(training), (), generator=generator))]
        top, left = (int(torch.randint(n - 2 * PATCH, (), generator=generator)) for n in photograph.shape[2:])
        patch = photograph[..., top : top + 2 * PATCH, left : left + 2 * PATCH]
        found.append(patch.flip(3) if torch.rand((), generator=generator) < 0.5 else patch)
    return torch.cat(found)


outputs = {"bicubic": [F.interpolate(x, scale_factor=2.0, mode="bicubic") for x in low]}
results = {"bicubic": {"PSNR dB": mean_psnr(outputs["bicubic"], test)}}
print(f"bicubic: PSNR dB {results['bicubic']['PSNR dB']:.2f}")
for scheme in arguments.schemes:
    torch.manual_seed(arguments.seed)
    network = EDSR()
    nn.init.zeros_(network.tail.weight)
    model = bonn_qat.binarize(network, scheme, input_size=(3, PATCH, PATCH))
    regularizers = {"kernel": 1e-4} if scheme == "bonn" else {}
    objective = bonn_qat.Objective(model, F.l1_loss, regularizers=regularizers)
    optimizer = torch.optim.Adam(bonn_qat.parameter_groups(objective, lr=arguments.lr, weight_decay=0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    generator = torch.Generator().manual_seed(arguments.seed)
    objective.train()
    for _ in range(arguments.steps):
        truth = patches(generator)
        optimizer.zero_grad()
        objective(halved(truth), truth).total.backward()
        optimizer.step()
        schedule.step()
        bonn_qat.constrain_(model)
    model.eval()
    with torch.no_grad():
        outputs[scheme] = [model(x) for x in low]
    report = bench(network, model, (3, 128, 128), backends=FASTEST, batches=[1], threads=[1], rounds=9)
    times = {f"{x.backend} ms": x.median_milliseconds for x in report.latencies}
    results[scheme] = {"PSNR dB": mean_psnr(outputs[scheme], test), "Mbit": bonn_qat.summary(model).mbit, **times}
    print(f"{scheme}: " + ", ".join(f"{name} {value:.2f}" for name, value in results[scheme].items()), flush=True)
