"""How equal packed networks are to their models: three questions, one command each.

``equality``: logits, predictions and features against those of the binarized model in evaluation mode, on CIFAR-10's
test images. ``families``: the same for one network of each of twenty families of timm, on random images. ``plans``:
which families of timm the runtime in C runs, what stops the others, and how equal its logits are to those of
``PackedModel`` node by node; packed files are kept in ``--files``. Each prints a table and, with ``--output``, writes
JSON. Examples::

    python benchmarks/packed_runtime.py plans --files FOLDER --output plans.json --page docs/plans.md
    python benchmarks/packed_runtime.py equality --data FOLDER --model wrn22_16 --size 32 --weights WEIGHTS.safetensors
"""

import argparse
import json
import os
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import backbones
import bonn_qat_runtime
import numpy as np
import timm
import torch
from bonn_qat_runtime import library
from torch import Tensor, nn

import bonn_qat
from bonn_qat.environment import environment, processor
from bonn_qat.files.tensors import read_tensors
from bonn_qat.training.data import load

# Small members, with images that they take.
FAMILIES: Mapping[str, int] = {
    "resnet18": 64, "mobilenetv2_100": 64, "efficientnet_b0": 64, "densenet121": 64, "vgg11_bn": 64, "regnety_002": 64,
    "convnext_atto": 64, "vit_tiny_patch16_224": 224, "deit_tiny_patch16_224": 224, "mixer_s32_224": 224,
    "swin_tiny_patch4_window7_224": 224, "resnest14d": 64, "ghostnet_100": 64, "mobilenetv3_small_100": 64,
    "inception_v3": 96, "dla34": 64, "nf_regnet_b0": 64, "cspresnet50": 64, "xception41": 96, "res2net50_14w_8s": 64,
}  # fmt: skip


def main() -> None:
    """Answer one question."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # Names instead of paths, which belong to this machine.
    options = {key: value.name if isinstance(value, Path) else value for key, value in vars(args).items()}
    found = {"environment": dict(environment(torch.device("cpu"))), "machine": processor(), "options": options}
    result = {"equality": equality, "families": families, "plans": plans}[args.question](args)
    if args.output:
        args.output.write_text(json.dumps(found | {"results": result}, indent=1))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("equality", "families", "plans"))
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--scheme", default="bonn")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, help="a run's weights; by default the norms are random")
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--files", type=Path, help="the folder of the packed families, which are made if not there")
    parser.add_argument("--page", type=Path, help="the Markdown page of the plans")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def made(name: str, scheme: str, size: int, weights: Path | None = None, **options: Any) -> nn.Module:
    """A binarized network with a run's weights, or with random norms, slopes and biases as after a training."""
    network = timm.create_model(name, **options)
    model = bonn_qat.binarize(network, scheme, input_size=(3, size, size)).eval().requires_grad_(False)
    if weights:
        model.load_state_dict(read_tensors(weights)[0])
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, mean in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0)):
                getattr(module, name).normal_(mean, 0.3)
            cast(Tensor, module.running_var).uniform_(0.5, 2)
    return model


class Features(nn.Module):
    """The features of a timm network before its last pooling."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(x)
        return features


@torch.no_grad()
def compared(model: Any, size: int, batches: Sequence[Tensor]) -> dict[str, Any]:
    """How far a packed network is from its model in both memory formats of the images, which affect float rounding."""
    packed = bonn_qat.pack(model, (3, size, size))
    features = bonn_qat.pack(Features(model), (3, size, size))
    found: dict[str, Any] = defaultdict(float)
    found |= {"kinds": sorted({layer.kind for layer in packed.layers}), "layers": len(packed.layers)}
    for x in batches:
        ours, ours_features = packed(x), features(x)
        for name, kind in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
            laid = x.contiguous(memory_format=kind)
            theirs = model(laid)
            apart = (ours - theirs).abs().amax(1)
            found[f"difference, {name}"] = max(found[f"difference, {name}"], apart.max().item())
            found[f"beyond 1e-4, {name}"] += (apart > 1e-4).sum().item()
            found[f"other predictions, {name}"] += (ours.argmax(1) != theirs.argmax(1)).sum().item()
            same = (ours_features == model.forward_features(laid)).flatten(1).all(1)
            found[f"other features, {name}"] += (~same).sum().item()
        found["largest logit"] = max(found["largest logit"], ours.abs().max().item())
        found["images"] += len(x)
    return dict(found)


def told(name: str, found: Mapping[str, Any]) -> None:
    """Print a row."""
    print(f"{name}: {int(found['images'])} images, {found['layers']} binary layers ({', '.join(found['kinds'])})")
    for kind in ("channels_last", "contiguous"):
        print(
            f"  {kind:14} largest difference {found[f'difference, {kind}']:.1e} "
            f"(largest logit {found['largest logit']:.2f}), "
            f"{int(found[f'beyond 1e-4, {kind}'])} beyond 1e-4, "
            f"{int(found[f'other predictions, {kind}'])} predictions and the features of "
            f"{int(found[f'other features, {kind}'])} images differ"
        )


def equality(args: argparse.Namespace) -> dict[str, Any]:
    """A network on CIFAR-10's test images, enlarged to the size that it takes."""
    data = load("cifar10", directory=args.data, test_images=args.images)
    images = torch.cat([x for x, _ in data.test_batches(100)])
    if args.size != images.shape[-1]:
        images = nn.functional.interpolate(images, (args.size, args.size), mode="bilinear")
    model = made(args.model, args.scheme, args.size, args.weights, num_classes=10)
    found = compared(model, args.size, torch.split(images, 100))
    told(f"{args.model}, {args.size} px, {args.scheme}", found)
    return found


def families(args: argparse.Namespace) -> dict[str, Any]:
    """A network of each family, on eight random images."""
    results = {}
    for name, size in FAMILIES.items():
        if args.only and name not in args.only:
            continue
        model = made(name, args.scheme, size, num_classes=10)
        try:
            results[name] = compared(model, size, torch.split(torch.randn(8, 3, size, size), 4))
        except bonn_qat.BonnQatError as error:
            results[name] = {"failure": str(error)}
            print(f"{name}, {size} px: {error}")
        else:
            told(f"{name}, {size} px", results[name])
    return results


def packed_family(family: str, scheme: str, path: Path) -> None:
    """Pack the member of a family, with random statistics of its batch norms, unless the file is there."""
    if path.exists():
        return
    name, options = backbones.MODELS[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).eval()
    backbones.start_zero_heads(model)
    images, _ = backbones.images_for(model, backbones.Row(family=family, model=name, options=options))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            cast(Tensor, module.running_mean).normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    size = tuple(images.shape[1:])
    bonn_qat.pack(bonn_qat.binarize(model.eval(), scheme, input_size=size).eval(), size).save(path)


@torch.no_grad()
def planned(path: Path, count: int) -> dict[str, Any]:
    """How far a file's logits in C are from ``PackedModel``'s, as a share of the largest, or what stops it."""
    try:
        network = bonn_qat_runtime.Network(path)
    except bonn_qat_runtime.UnsupportedOperator as error:
        return {"stopped": str(error).split("cannot run ")[-1].partition("; use")[0]}
    images = backbones.photographs(network.input_size[1])[:count]
    packed = bonn_qat.PackedModel.load(path)
    theirs = packed.node_by_node(images).numpy()
    ours = np.asarray(network(images.numpy()))
    apart = np.abs(ours - theirs).reshape(count, -1).max(1) / np.abs(theirs).reshape(count, -1).max(1)
    return {"differences": apart.tolist(), "same_predictions": bool((ours.argmax(-1) == theirs.argmax(-1)).all())}


def plans(args: argparse.Namespace) -> dict[str, Any]:
    """Every family of timm in the runtime in C."""
    found = {}
    args.files.mkdir(exist_ok=True)
    for family in sorted(backbones.MODELS):
        if args.only and family not in args.only:
            continue
        path = args.files / f"{family}.safetensors"
        try:
            packed_family(family, args.scheme, path)
            found[family] = planned(path, min(args.images, backbones.IMAGES))
        except bonn_qat.BonnQatError as error:
            found[family] = {"stopped": f"bonn-qat refuses it: {error}"}
        print(f"{family:28}{plan_line(found[family])}", flush=True)
    if args.page:
        args.page.write_text(plans_page(found))
    return found


def plan_line(row: Mapping[str, Any]) -> str:
    """Words for a row."""
    if "stopped" in row:
        return f"no: {row['stopped']}"
    close = sum(apart <= 1e-5 for apart in row["differences"])
    return f"yes; {close} of {len(row['differences'])} images within 1e-5, the farthest {max(row['differences']):.0e}"


def plans_page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    running = {family: row["differences"] for family, row in found.items() if "stopped" not in row}
    images = [apart for row in running.values() for apart in row]
    settings = environment(torch.device("cpu"))
    lines = [
        "# Families of timm in the runtime in C",
        "",
        "One member of every model family of timm, as in [coverage.md](coverage.md), packed and run by "
        "[bonn-qat-runtime](../plugins/bonn-qat-runtime). This page is written by",
        "",
        "```sh",
        "python benchmarks/packed_runtime.py plans --files FOLDER --page docs/plans.md",
        "```",
        "",
        *textwrap.wrap(
            f"timm {settings['timm']}, torch {settings['torch']}, instruction set `{library.chosen_cpu()}`. Random "
            "weights, crops of scikit-learn's two photographs. The difference is that of an image's logits from "
            "`PackedModel`'s node by node, as a share of the largest: floats are added in another order, and where a "
            "value lies within rounding of a sign's threshold, one sign changes and the logits move. Most of these are "
            "sums of signs that equal a norm's mean, exactly or nearly, or cancel in attention: there rounding "
            "decides, here and in torch. That was checked on November 29, 2026: with the signs computed here, "
            "`PackedModel` agreed within 2e-6 on every image that was farther apart; 1 to 200 of up to 15 million "
            "signs differed, whose numbers were no farther from the threshold than about a unit in the last place of "
            "their pixel's largest.",
            120,
        ),
        "",
        f"- **{len(running)} of {len(found)} families** run wholly in a plan.",
        f"- {sum(apart <= 1e-5 for apart in images)} of {len(images)} images are within 1e-5 of `PackedModel`.",
        "",
        "| family | model | in a plan | images within 1e-5 | median difference | largest |",
        "|---|---|---|---|---|---|",
    ]
    for family, row in found.items():
        cells = [family, backbones.MODELS[family][0]]
        if "stopped" in row:
            cells += [f"no: {row['stopped']}".replace("|", "\\|"), "", "", ""]
        else:
            apart = row["differences"]
            close = sum(value <= 1e-5 for value in apart)
            cells += ["yes", f"{close} of {len(apart)}", f"{statistics.median(apart):.0e}", f"{max(apart):.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
