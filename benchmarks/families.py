"""Twelve model families of timm, binary and float, on a part of CIFAR-10: does every kind of network learn with bits?

Each family has a small member, cut down to 32x32 pixels: a stem with small strides, few and narrow blocks. Both arms
have the same float initialization, data order, optimizer and budget. Runs that the JSON file already has are skipped,
so the same command continues after an interruption. Example::

    python benchmarks/families.py --data FOLDER --images 4000 --epochs 6 --out benchmarks/results/families.json --page
"""

import argparse
import datetime
import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import GroupNormAct, StdConv2d
from timm.models import build_model_with_cfg
from timm.models.byobnet import ByoBlockCfg
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import ResNetV2
from timm.models.vgg import VGG
from torch import nn

import bonn_qat
from bonn_qat.environment import environment
from bonn_qat.files.atomic import write_bytes
from bonn_qat.inspection.diagnose import DeadLayers
from bonn_qat.training.data import Data, load

RESULTS = Path(__file__).parent / "results"
ARMS = ("float", "bonn")
SETTINGS = ("images", "test_images", "epochs", "batch_size")  # equal for all runs of a file


@dataclass(frozen=True, kw_only=True)
class Family:
    """A member of a family: a timm name, or the class if timm's function does not accept the options.

    ``unstrided`` names the convolutions and poolings of the stem whose stride becomes 1.
    """

    member: str
    options: Mapping[str, Any]
    cls: type[nn.Module] | None = None
    unstrided: Sequence[str] = ()
    lr: float = 2e-3

    def build(self, classes: int) -> nn.Module:
        """The float network."""
        model: nn.Module
        if self.cls is None:
            model = timm.create_model(self.member, num_classes=classes, **self.options)
        else:
            model = build_model_with_cfg(self.cls, self.member, False, num_classes=classes, **self.options)
        for name in self.unstrided:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
            else:
                model.set_submodule(name, nn.Identity())
        return model


_PATCHES = {"img_size": 32, "patch_size": 4}

FAMILIES = {
    "resnet": Family(
        member="resnet10t",
        options={"channels": (16, 32, 64, 128), "stem_width": 16},
        unstrided=("maxpool",),
    ),
    "resnetv2": Family(
        member="resnetv2_50x1_bit",
        cls=ResNetV2,
        options={
            "layers": (1, 1, 1, 1),
            "channels": (64, 128, 256, 512),
            "stem_chs": 32,
            "stem_type": "fixed",
            "norm_layer": partial(GroupNormAct, num_groups=8),
            "conv_layer": partial(StdConv2d, eps=1e-8),
        },
        unstrided=("stem.pad", "stem.pool"),
    ),
    "densenet": Family(
        member="densenet121",
        options={"growth_rate": 12, "block_config": (3, 3, 3, 3)},
        unstrided=("features.conv0",),
    ),
    "vgg": Family(
        member="vgg11_bn",
        cls=VGG,
        options={
            "cfg": [32, "M", 64, "M", 128, 128, "M", 128, 128, "M"],
            "mlp_ratio": 1 / 32,
            "norm_layer": nn.BatchNorm2d,
        },
    ),
    "mobilenet": Family(member="mobilenetv3_small_050", options={}, unstrided=("conv_stem",)),
    "efficientnet": Family(member="test_efficientnet", options={}, unstrided=("conv_stem",)),
    "regnet": Family(
        member="regnetx_002",
        options={"depth": 6, "w0": 24, "wa": 24.0, "wm": 2.0},
        unstrided=("stem.conv",),
    ),
    "convnext": Family(
        member="convnext_atto",
        options={"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128), "patch_size": 1, "ls_init_value": None},
    ),
    "repvgg": Family(
        member="repvgg_a0",
        options={
            "blocks": tuple(ByoBlockCfg(type="rep", d=1, c=width, s=2, gs=0, br=1.0) for width in (32, 64, 128, 256)),
            "stem_chs": 32,
        },
        unstrided=("stem.conv_kxk.conv", "stem.conv_1x1.conv"),
    ),
    "nfnet": Family(
        member="nfnet_f0",
        options={
            "depths": (1, 1, 1, 1),
            "channels": (32, 64, 128, 128),
            "group_size": 16,
            "num_features": 256,
            "stem_chs": 32,
        },
        unstrided=("stem.conv1",),
    ),
    "vit": Family(
        member="vit_tiny_patch16_224",
        options={**_PATCHES, "depth": 3, "embed_dim": 96, "num_heads": 3},
    ),
    "mixer": Family(
        member="mixer_s16_224",
        cls=MlpMixer,
        options={**_PATCHES, "num_blocks": 4, "embed_dim": 96},
    ),
}


def main() -> None:
    """Train what is missing in ``--out``, and write the page if ``--page`` is given."""
    args = _arguments()
    document = _document(args)
    data = load("cifar10", directory=args.data, train_images=args.images, test_images=args.test_images)
    for seed in range(args.seeds):
        for name in args.models:
            for arm in ARMS:
                key = f"{name}/{arm}/{seed}"
                if "top1" in document["runs"].get(key, {}):
                    continue
                run = document["runs"][key] = _run(FAMILIES[name], arm, seed, data, args)
                write_bytes(args.out, (json.dumps(document, indent=1) + "\n").encode())
                told = run.get("failed") or f"{run['top1']:.2f} % in {run['seconds']:.0f} s"
                print(f"{key:24} {told}", flush=True)
    if args.page:
        print(f"wrote {write_bytes(args.page, page(document).encode())}")


def _run(family: Family, arm: str, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    lr = args.lr or family.lr
    recipe = bonn_qat.Recipe(
        model=family.member, scheme=arm, data="cifar10", seed=seed, epochs=args.epochs, batch_size=args.batch_size,
        optimizer="adam", lr=lr, weight_decay=args.weight_decay,
    )  # fmt: skip
    torch.manual_seed(seed)
    run: dict[str, Any] = {"lr": lr}
    try:
        model = bonn_qat.binarize(family.build(data.classes), arm, input_size=data.image)
        size = bonn_qat.summary(model, data.image)
        run |= {"parameters": size.parameters, "binary_parameters": size.binary_weights}
        run |= {"macs": size.macs, "binary_macs": size.binary_macs, "mbit": size.mbit}
        if size.binary_weights:
            run["dead"] = _dead(model, data)
        result = bonn_qat.train(model, recipe, data, device=args.device)
    except bonn_qat.BonnQatError as error:
        return run | {"failed": str(error), "environment": dict(environment(torch.device(args.device)))}
    curve = [epoch["test/top1"] for epoch in result.epochs]
    return run | {
        "top1": result.top1, "curve": curve, "train_loss": result.epochs[-1]["train/task"],
        "seconds": result.seconds, "environment": dict(result.environment),
    }  # fmt: skip


def _dead(model: nn.Module, data: Data) -> list[str]:
    images, _ = next(iter(data.test_batches(64)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadLayers)
        return list(bonn_qat.diagnose(model, images).dead)


def _document(args: argparse.Namespace) -> dict[str, Any]:
    settings = {key: getattr(args, key) for key in SETTINGS}
    if not args.out.exists():
        return {"settings": settings, "runs": {}}
    document: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
    if document["settings"] != settings:
        sys.exit(f"{args.out} holds runs with {document['settings']}, not {settings}; give the same, or another --out")
    return document


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown: one row per family, mean ± standard deviation over the seeds."""
    settings, runs = document["settings"], document["runs"]
    keys = [key.split("/") for key in runs]
    seeds = len({seed for _, _, seed in keys})
    rates = ", ".join(sorted({f"{run['lr']:g}" for run in runs.values()}))
    lines = [
        f"# Twelve families on CIFAR-10: {settings['images']} training and {settings['test_images']} test images",
        "",
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, AdamW, learning rate {rates}, one cycle, "
        f"{seeds} seed{'s' if seeds > 1 else ''}; scheme bonn; chance is 10 %",
        "",
        *_machines(runs.values()),
        "",
        "| family | member | parameters | binary parameters (%) | MACs | binary MACs (%) | dead | float top-1 (%) "
        "| binary top-1 (%) | seconds, float / binary |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for name in dict.fromkeys(name for name, _, _ in keys):
        arms = {arm: [run for key, run in runs.items() if key.startswith(f"{name}/{arm}/")] for arm in ARMS}
        failed += [f"- {name}, {arm}: {run['failed']}" for arm in ARMS for run in arms[arm] if "failed" in run]
        if all("top1" in run for arm in ARMS for run in arms[arm]) and all(arms.values()):
            lines.append(_row(name, *arms.values()))
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


def _row(name: str, floats: Sequence[Mapping[str, Any]], binaries: Sequence[Mapping[str, Any]]) -> str:
    size = binaries[0]
    cells = [
        name,
        FAMILIES[name].member,
        f"{size['parameters']:,}",
        f"{100 * size['binary_parameters'] / size['parameters']:.1f}",
        f"{size['macs']:,}",
        f"{100 * size['binary_macs'] / size['macs']:.1f}",
        str(max(len(run["dead"]) for run in binaries)),
        *(_mean([run["top1"] for run in runs]) for runs in (floats, binaries)),
        " / ".join(f"{statistics.mean(run['seconds'] for run in runs):.0f}" for runs in (floats, binaries)),
    ]
    return f"| {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _machines(runs: Any) -> list[str]:
    # Runs that were added later may come from another commit or machine; each is named once.
    told = (", ".join(f"{key} {value}" for key, value in run["environment"].items()) for run in runs)
    return list(dict.fromkeys(told))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10; it is downloaded there if missing")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, help="learning rate, instead of each family's own")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", type=_names, default=list(FAMILIES), help=f"of {','.join(FAMILIES)}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, read and completed")
    today = datetime.date.today().isoformat()
    parser.add_argument("--page", type=Path, nargs="?", const=RESULTS / f"{today}-families.md", help="write the table")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    return names


if __name__ == "__main__":
    main()
