"""Draw the figures of the documentation from the package's own functions and results: ``python docs/figures.py``."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bonn_qat
from bonn_qat import functional
from bonn_qat.plotting import FLOAT_COLOUR, HERO_COLOUR, PALETTE, canvas, row
from bonn_qat.plugins import find_scheme

FOLDER = Path(__file__).parent / "figures"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CIFAR10 = (
    "2026-11-29-cifar10-24-epochs-bfloat16", "2026-11-30-cifar10-24-epochs-seed1",
    "2026-11-30-cifar10-24-epochs-seed1-float-bireal", "2026-11-30-cifar10-24-epochs-pcnn",
    "2026-11-30-cifar10-24-epochs-reactnet-bireal", "2026-11-30-bonn-plus-50-epochs",
    "2026-11-30-cifar10-100-epochs-bonn", "2026-12-01-cifar10-100-epochs-xnor",
    "2026-12-01-cifar10-100-epochs-bireal", "2026-12-01-cifar10-24-epochs-seed1-reactnet-pcnn",
)  # fmt: skip
ESTIMATORS = {
    "ste_sign: BNN, XNOR-Net, BONN": functional.ste_sign,
    "approx_sign: Bi-Real Net": functional.approx_sign,
    "swish_sign": functional.swish_sign,
    "ede_sign, t = 2: IR-Net": lambda x: functional.ede_sign(x, torch.tensor(2.0)),
}


def estimators() -> str:
    """The sign, and what each estimator takes for its derivative."""
    with canvas("estimators", height=3.4, title="The sign, and the derivatives that estimators take for it") as (
        fig,
        svg,
    ):
        forward, backward = fig.subplots(1, 2, width_ratios=(2, 3))
        grid = torch.linspace(-2, 2, 401)
        forward.step(grid, functional.sign(grid), color=HERO_COLOUR)
        forward.set(title="forward: sign(x)", xlabel="x")
        for colour, (name, estimator) in zip((HERO_COLOUR, *PALETTE), ESTIMATORS.items(), strict=False):
            x = grid.clone().requires_grad_()
            estimator(x).sum().backward()
            backward.plot(grid, x.grad, color=colour, label=name)
        backward.set(title="backward: what stands in for the derivative", xlabel="x")
        backward.legend(fontsize=9)
    return svg()


def kernel_loss() -> str:
    """The kernel loss of one latent weight: its two modes, by nu."""
    with canvas("kernel", height=3.2, title="The kernel loss of one latent weight, with two modes") as (fig, svg):
        grid, mu, sigma, w = torch.linspace(-0.4, 0.4, 401), torch.tensor([0.2]), torch.tensor([0.05]), torch.ones(1, 1)
        weak, strong = row(fig, 2)
        for axis, nu in ((weak, 1e-4), (strong, 1e-2)):
            values = [functional.kernel_loss(x.reshape(1, 1), w, mu, sigma, nu=nu, scale=0.2 * w.mean()) for x in grid]
            axis.plot(grid, torch.stack(values), color=HERO_COLOUR)
            axis.axvline(0.2, color=PALETTE[0], linestyle=":")
            axis.axvline(-0.2, color=PALETTE[0], linestyle=":")
            axis.set(title=f"nu = {nu:g}", xlabel="latent weight")
    return svg()


def latents() -> str:
    """The latent weights of a trained layer, and the values that the network computes with."""
    model = bonn_qat.create_model("wrn22_16.bonn_cifar10", pretrained=True)
    layers = dict(bonn_qat.binary_layers(model))
    chosen = list(layers)[len(layers) // 2], list(layers)[-1]
    with canvas("latents", height=3.2, title="Latent weights of two trained layers, and their binary values") as (
        fig,
        svg,
    ):
        for axis, name in zip(fig.subplots(1, 2), chosen, strict=True):
            layer = layers[name]
            scale = layer.weight_quant.quantize(layer.weight)[1]
            axis.hist(layer.weight.detach().flatten(), bins=80, color=HERO_COLOUR)
            for sign in (-1, 1):
                axis.axvline(sign * float(scale.mean()), color=PALETTE[0])
            axis.set(title=name, xlabel="latent weight")
    return svg()


def deeper() -> str:
    """The accuracies of two depths by epoch, each seed a thin line, the mean over them a thick one."""
    with canvas("deeper", height=3.4, title="Accuracy of ResNet-18 and ResNet-34 over five epochs") as (fig, svg):
        axes = fig.subplots(1, 2, sharey=True)
        for axis, depth in zip(axes, (18, 34), strict=True):
            runs = json.loads((RESULTS / f"2026-11-30-deeper-birealnet{depth}.json").read_text(encoding="utf-8"))[
                "runs"
            ]
            curves = defaultdict(list)
            for run in runs:
                curves[run["recipe"]["scheme"]].append([epoch["test/top1"] for epoch in run["epochs"]])
            for colour, name in zip((FLOAT_COLOUR, PALETTE[0], HERO_COLOUR), ("float", "xnor", "bonn"), strict=True):
                points = torch.tensor(curves[name]).T
                epochs = range(1, len(points) + 1)
                axis.plot(epochs, points, color=colour, linewidth=0.6, alpha=0.6)
                axis.plot(epochs, points.mean(1), color=colour, linewidth=2, label=find_scheme(name).title)
            axis.set(title=f"ResNet-{depth}", xlabel="epoch", xticks=epochs)
        axes[0].set_ylabel("test top-1 (%)")
        axes[0].legend(fontsize=9)
    return svg()


def accuracy() -> str:
    """What each network of CIFAR-10 reaches, with its size: a point for each seed, from the trainings' records."""
    arms = defaultdict[tuple[str, int], list[dict[str, Any]]](list)
    for record in CIFAR10:
        for run in json.loads((RESULTS / f"{record}.json").read_text(encoding="utf-8"))["runs"]:
            arms[run["title"], run["recipe"]["epochs"]].append(run)
    means = {arm: statistics.mean(map(_top1, runs)) for arm, runs in arms.items()}
    order = sorted(means, key=lambda arm: means[arm])
    caption = "Accuracy on CIFAR-10 and size of a float network and of the same network with one bit"
    with canvas("accuracy", height=3.2, title=caption) as (fig, svg):
        axis = fig.subplots()
        for place, arm in enumerate(order):
            points, run = [_top1(run) for run in arms[arm]], arms[arm][0]
            ours = run["scheme"] in ("bonn", "bonn-plus")
            colour = FLOAT_COLOUR if run["scheme"] == "float" else HERO_COLOUR if ours else PALETTE[0]
            axis.plot(points, [place] * len(points), "o", color=colour, markersize=9)
            teacher = ", with the float network as teacher" if run["recipe"]["teacher"] else ""
            noise = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
            facts = f"{means[arm]:.1f}{noise} %, {run['size']['mbit']:.2f} Mbit, {arm[1]} epochs{teacher}"
            axis.text(max(points) + 0.25, place, facts, va="center", fontsize=9)
        axis.set(yticks=range(len(order)), yticklabels=[title for title, _ in order])
        axis.set(xlim=(76, 98), xticks=range(76, 93, 2), xlabel="WRN-22 (16-16-32-64) on CIFAR-10, test top-1 (%)")
        axis.grid(visible=False, axis="y")
        axis.margins(y=0.1)
    return svg()


def _top1(run: Mapping[str, Any]) -> float:
    return float(run["epochs"][-1]["test/top1"])


DRAWINGS = {
    "estimators": estimators, "kernel_loss": kernel_loss, "latents": latents, "deeper": deeper, "accuracy": accuracy,
}  # fmt: skip

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw() + "\n", encoding="utf-8")
