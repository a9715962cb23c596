"""What `binarize` adds to replacing convolutions: timm's ResNet-18 on CIFAR-10, against naive replacement.

Naive means that convolutions become binary and everything else stays, including the ReLUs before the signs and the
norms that are initialized with zeros. Both networks start from the same float weights and see the same images in the
same order. Example::

    python benchmarks/naive_replacement.py --data-dir data --train-images 10000 --seeds 2 --output naive.json
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import bonn_qat
from bonn_qat import plugins
from bonn_qat.environment import environment
from bonn_qat.inspection.diagnose import DeadLayers
from bonn_qat.training.data import Data, load


def main() -> None:
    """Train both, print accuracy and dead layers, and write them to ``--output``."""
    args = _arguments()
    data = load("cifar10", directory=args.data_dir, train_images=args.train_images, test_images=args.test_images)
    recipe = bonn_qat.Recipe(
        model="resnet18", data="cifar10", epochs=args.epochs, batch_size=64, lr=args.lr, latents="scheme"
    )
    arms: dict[str, list[dict[str, Any]]] = {"binarize": [], "naive": []}
    for seed in range(args.seeds):
        for arm, runs in arms.items():
            runs.append(_run(arm, replace(recipe, seed=seed), data))
            told = runs[-1].get("failed") or f"{runs[-1]['top1']:.2f} %"
            print(f"{arm:9} seed {seed}: {told}, {runs[-1]['dead']} dead layers", flush=True)
    for arm, runs in arms.items():
        found = [run["top1"] for run in runs if "top1" in run]
        if not found:
            print(f"{arm:9} no run finished")
            continue
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        print(f"{arm:9} {statistics.mean(found):.2f}{spread} % (n = {len(found)})")
    if args.output:
        where = dict(environment(torch.device("cpu")))
        options = {key: value for key, value in vars(args).items() if key not in ("output", "data_dir")}
        args.output.write_text(json.dumps({"options": options, "environment": where, "arms": arms}, indent=1) + "\n")


def _run(arm: str, recipe: bonn_qat.Recipe, data: Data) -> dict[str, Any]:
    torch.manual_seed(recipe.seed)
    network: nn.Module = timm.create_model("resnet18", num_classes=data.classes)
    scheme = plugins.find_scheme("bonn")
    if arm == "naive":
        scheme = replace(scheme, norm=None, nonlinearity=None)
    model = bonn_qat.binarize(network, scheme)
    if arm == "naive":
        for name in model.binarization.revived:  # type: ignore[union-attr]
            nn.init.zeros_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    images, _ = next(iter(data.test_batches(64)))
    dead = _dead(model, images)
    try:
        result = bonn_qat.train(model, recipe, data)
    except bonn_qat.BonnQatError as error:
        return {"dead": dead, "failed": str(error)}
    return {"top1": result.top1, "dead": dead, "train_loss": result.epochs[-1]["train/task"]}


def _dead(model: nn.Module, images: torch.Tensor) -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadLayers)
        return len(bonn_qat.diagnose(model, images).dead)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="the folder of CIFAR-10; it is downloaded there if missing")
    parser.add_argument("--train-images", type=int, default=10000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
