"""Binarize every model family of timm: does it run, are its layers alive, can it be saved, compiled and exported?

A family is a module file of timm. One member of each is built with random weights, for 64 pixels if it accepts them,
and examined with crops of the two photographs of scikit-learn; members that are too large are built with fewer blocks.
Families that the JSON file already has are skipped. Example::

    python benchmarks/backbones.py --workers 2 --output results/coverage.json --page docs/coverage.md
"""

import argparse
import copy
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat.binarization import policy
from bonn_qat.binarization.binarize import BypassedLayers, binary_layers
from bonn_qat.bonn import BONN
from bonn_qat.environment import environment
from bonn_qat.files.atomic import write_bytes

SIDE, IMAGES = 64, 4
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"depth": 4}),
    "byoanet": ("eca_botnext26ts_256", {}),
    "byobnet": ("repvgg_a0", {}),
    "cait": ("cait_xxs24_224", {"depth": 6}),
    "coat": ("coat_lite_tiny", {}),
    "convit": ("convit_tiny", {}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("convnext_atto", {}),
    "cpubone": ("cpubone_b0_bfrobust", {}),
    "crossvit": ("crossvit_9_240", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", {}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", {}),
    "densenet": ("densenet121", {}),
    "dla": ("dla46x_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientnet": ("tf_efficientnet_b0", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m_enc", {"depth": 2}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {}),
    "hieradet_sam2": ("sam2_hiera_tiny", {}),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_m", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("mambaout_femto", {}),
    "maxxvit": ("coatnet_0_224", {}),
    "metaformer": ("caformer_s18", {}),
    "mlp_mixer": ("mixer_s32_224", {}),
    "mobilenetv3": ("tf_mobilenetv3_small_100", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 4}),
    "nasnet": ("nasnetalarge", {}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("nfnet_l0", {}),
    "pit": ("pit_ti_224", {}),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 4}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {}),
    "res2net": ("res2net50_14w_8s", {}),
    "resnest": ("resnest14d", {}),
    "resnet": ("resnet18", {}),
    "resnetv2": ("resnetv2_50x1_bit", {}),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_legacy_patch16_224", {}),
    "tresnet": ("tresnet_m", {}),
    "twins": ("twins_svt_small", {}),
    "vgg": ("vgg11", {}),
    "visformer": ("visformer_tiny", {}),
    "vision_transformer": ("vit_tiny_patch16_224", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {}),
    "vision_transformer_relpos": ("vit_relpos_small_patch16_224", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {"depth": 4}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41p", {}),
    "xcit": ("xcit_tiny_12_p16_224", {}),
}


# Why layers are dead, as far as the network's code explains it.
CAUSES = {
    "csatv2": "a transformer with one channel, whose LayerNorm gives the same value for every image",
    "volo": "the query of a class token that is the same for every image at initialization",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result for one family.

    ``without_gradient``: binary layers whose weights get no gradient at the first step, though the float network's do.
    ``state``: the float and the binary state dict load strictly and give the same outputs.
    """

    family: str
    model: str
    options: Mapping[str, Any]
    side: int = 0
    parameters: int = 0
    binary_layers: int = 0
    parameters_binary: float = 0.0
    macs_binary: float = 0.0
    finite: bool = False
    dead_before: int = 0
    dead: Mapping[str, float] = field(default_factory=dict)
    unreached: int = 0
    without_gradient: tuple[str, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    state: bool = False
    compiles: str = ""
    exports: str = ""
    error: str = ""


def families() -> dict[str, list[str]]:
    """The names of timm's models, by the module file that defines them."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        package, _, family = timm.models.model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models":
            found.setdefault(family, []).append(name)
    return found


def examine(family: str, *, quick: bool = False) -> Row:
    """Build the member of ``family``, binarize and examine it; ``quick`` skips naive replacement, compile, export."""
    name, options = MODELS[family]
    row = Row(family=family, model=name, options=options)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    start_zero_heads(model)
    images, row = images_for(model, row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bypassed and dead layers, which the row has
        binary = bonn_qat.binarize(model)
        diagnosis = bonn_qat.diagnose(binary, images)
        naive = None if quick else bonn_qat.binarize(model, replace(BONN, norm=None, nonlinearity=None))
        dead_before = len(bonn_qat.diagnose(naive, images).dead) if naive else 0
    record: Any = binary.binarization
    row = replace(
        row,
        dead={name: diagnosis.shares[name] for name in diagnosis.dead},
        unreached=len(diagnosis.unreached),
        dead_before=dead_before,
        kept=dict(Counter(_short(reason) for reason in record.kept.values())),
    )
    del naive
    row = _trained(model, binary, images, row)
    row = replace(row, state=_round_trip(model, binary, images))
    report = bonn_qat.summary(binary, images.shape[1:])
    row = replace(row, macs_binary=report.binary_macs / report.macs)
    if not quick:
        row = replace(row, compiles=_outcome(_compile, model, binary, images[:1]))
        row = replace(row, exports=_outcome(_export, model, binary, images[:1]))
    return row


def images_for(model: nn.Module, row: Row) -> tuple[Tensor, Row]:
    """Photographs of 64 pixels, or of the size that the model was made for if it takes no others."""
    own: tuple[int, ...] = model.pretrained_cfg["input_size"]  # type: ignore[index,assignment]
    for size in ((own[0], SIDE, SIDE), own):
        images = photographs(size[1])
        try:
            with torch.no_grad():
                model.eval()(images[:1])
            break
        except (AssertionError, RuntimeError, ValueError):
            if size == own:
                raise
    return images, replace(row, side=size[1], parameters=sum(p.numel() for p in model.train().parameters()))


@torch.no_grad()
def start_zero_heads(model: nn.Module) -> None:
    """Some classifiers start at zero, which would make all outputs equal."""
    for name in policy.decide(model).kept:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.02)


def photographs(side: int) -> Tensor:
    """Crops ``(IMAGES, 3, side, side)`` of scikit-learn's two photographs, with mean about 0 and variance about 1."""
    from sklearn.datasets import load_sample_images

    whole = [torch.tensor(x).permute(2, 0, 1).float() / 255 for x in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(IMAGES):
        image = whole[i % len(whole)]
        part = int(torch.randint(200, min(image.shape[1:]), (), generator=generator))
        top, left = (int(torch.randint(0, n - part + 1, (), generator=generator)) for n in image.shape[1:])
        crop = image[None, :, top : top + part, left : left + part]
        crops.append(nn.functional.interpolate(crop, size=(side, side), mode="bilinear", antialias=True))
    return (torch.cat(crops) - 0.45) / 0.25


def _short(reason: str) -> str:
    return "bypassed" if reason.endswith("reads its weight itself") else reason.split(" is neither")[0]


def _logits(output: Any) -> Tensor:
    logits: Tensor = output[0] if isinstance(output, tuple | list) else output  # in training some return two heads
    return logits.mean(1) if logits.ndim == 3 else logits  # and some a vector per token


def _trained(model: nn.Module, binary: nn.Module, images: Tensor, row: Row) -> Row:
    """The forward and backward pass of one step in training mode."""
    logits, gradients = _step(binary, images)
    _, float_gradients = _step(model, images)
    layers = [f"{name}.weight" for name, _ in binary_layers(binary)]
    return replace(
        row,
        binary_layers=len(layers),
        parameters_binary=sum(layer.weight.numel() for _, layer in binary_layers(binary)) / row.parameters,
        finite=bool(logits.isfinite().all()) and all(bool(g.isfinite().all()) for g in gradients.values()),
        without_gradient=tuple(n for n in layers if not _any(gradients, n) and _any(float_gradients, n)),
    )


def _step(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model).train()
    logits = _logits(model(images))
    nn.functional.cross_entropy(logits, torch.arange(len(images))).backward()  # type: ignore[no-untyped-call]
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _any(gradients: Mapping[str, Tensor], name: str) -> bool:
    return name in gradients and bool(gradients[name].any())


@torch.no_grad()
def _round_trip(model: nn.Module, binary: nn.Module, images: Tensor) -> bool:
    moved = copy.deepcopy(model)
    for parameter in moved.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BypassedLayers)
        other = bonn_qat.binarize(moved)
    loaded = copy.deepcopy(binary)
    loaded.load_state_dict(moved.state_dict())
    expected = other.eval()(images)
    from_float = torch.equal(_logits(loaded.eval()(images)), _logits(expected))
    again = copy.deepcopy(binary)
    again.load_state_dict(other.state_dict())
    return from_float and torch.equal(_logits(again.eval()(images)), _logits(expected))


def _compile(model: nn.Module, images: Tensor) -> Tensor:
    torch._dynamo.reset()
    return _logits(torch.compile(model, backend="eager", fullgraph=True)(images))


def _export(model: nn.Module, images: Tensor) -> Tensor:
    return _logits(torch.export.export(model, (images,)).module()(images))


@torch.no_grad()
def _outcome(tool: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, binary: nn.Module, images: Tensor) -> str:
    """``yes``, or why not, and whether the float model fails too."""
    expected = _logits(binary.eval()(images))
    try:
        found = tool(binary, images)
    except Exception as error:
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
        try:
            tool(model.eval(), images)
        except Exception:
            return f"no, nor does the float model ({cause})"
        return f"no ({cause})"
    difference = float((found - expected).abs().max() / expected.abs().max())
    return "yes" if difference < 1e-5 else f"differs by {difference:.1g}"


def _examine(family: str) -> Row:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return examine(family)
    except Exception as error:
        name, options = MODELS[family]
        return Row(family=family, model=name, options=options, error=f"{type(error).__name__}: {error}"[:300])


def page(rows: list[Row], settings: Mapping[str, str]) -> str:
    """The table as Markdown, with the totals above it and the exceptions below."""
    rows = sorted(rows, key=lambda row: row.family)
    layers = sum(row.binary_layers for row in rows)
    dead = sum(len(row.dead) for row in rows)
    running = sum(row.finite and not row.error for row in rows)
    lines = [
        "# Coverage of timm",
        "",
        "One member of every model family of timm (a family is a module file), binarized with the scheme `bonn`. "
        "This page is written by",
        "",
        "```sh",
        "python benchmarks/backbones.py --workers 2 --output coverage.json --page docs/coverage.md",
        "```",
        "",
        f"timm {settings['timm']}, torch {settings['torch']}, bonn-qat {settings['commit']}. Random weights, {IMAGES} "
        "crops of scikit-learn's two photographs. A layer is dead if fewer than 5% or more than 95% of its inputs are "
        "+1 at initialization; *naive* replaces only the layers, without norms and nonlinearities.",
        "",
        f"- **{running} of {len(rows)} families** run forward and backward with finite values.",
        f"- **{layers - dead:,} of {layers:,} binary layers are alive** ({1 - dead / max(1, layers):.2%}); "
        f"naive: {sum(row.dead_before for row in rows):,} dead.",
        f"- {sum(row.state for row in rows)} load a float and a binary state dict strictly and give equal outputs; "
        f"{sum(row.compiles == 'yes' for row in rows)} compile as one graph (`fullgraph=True`), "
        f"{sum(row.exports == 'yes' for row in rows)} export (`torch.export`).",
        "",
        "| family | model | px | M params | binary layers | binary params | binary MACs | finite | dead, naive | dead "
        "| state dicts | compiles | exports |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rows]
    lines += ["", "## Exceptions", ""]
    lines += [f"- {row.family}: **{row.error}**" for row in rows if row.error]
    for row in rows:
        if row.dead:
            name, share = next(iter(row.dead.items()))
            cause = f": {CAUSES[row.family]}" if row.family in CAUSES else ""
            lines.append(
                f"- {row.family}, dead: {len(row.dead)}, for example `{name}` ({share:.1%} of its inputs are +1){cause}"
            )
        if row.without_gradient:
            some = ", ".join(f"`{name}`" for name in row.without_gradient[:3])
            lines.append(
                f"- {row.family}: {len(row.without_gradient)} layers get no gradient at first, for example {some}"
            )
        if row.unreached:
            lines.append(f"- {row.family}: {row.unreached} binary layers are not reached in evaluation mode")
        for what, outcome in (("compile", row.compiles), ("export", row.exports)):
            if outcome not in ("yes", ""):
                lines.append(f"- {row.family}, {what}: {outcome}".replace("|", "\\|"))
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row.kept)
    lines += ["", "## What stays float", "", "| reason | layers |", "|---|---|"]
    lines += [f"| {reason} | {count:,} |" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    options = "".join(f", {key} {value}" for key, value in row.options.items())
    marks = [f"{row.parameters_binary:.1%}", f"{row.macs_binary:.1%}", "yes" if row.finite else "**no**"]
    counts = [str(row.dead_before), str(len(row.dead)), "yes" if row.state else "**no**"]
    tools = ["yes" if x == "yes" else "no" if x else "" for x in (row.compiles, row.exports)]
    size = [str(row.side), f"{row.parameters / 1e6:.1f}", str(row.binary_layers)]
    return f"| {' | '.join([row.family, row.model + options, *size, *marks, *counts, *tools])} |"


def main() -> None:
    """Examine the families that the JSON file lacks, write it after each one, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=sorted(MODELS), choices=sorted(MODELS), metavar="FAMILY")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file, read and completed")
    parser.add_argument("--page", type=Path, help="the Markdown page")
    args = parser.parse_args()
    missing = families().keys() - MODELS.keys()
    if missing:
        print(f"families of this timm version without a member here: {', '.join(sorted(missing))}")
    settings = dict(environment(torch.device("cpu")))
    rows = _read(args.output)
    todo = [family for family in args.families if family not in rows]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_examine, family) for family in todo]):
            row = done.result()
            rows[row.family] = row
            print(f"{row.family:26} {row.model:32} {row.error or _line(row)}", flush=True)
            document = {"environment": settings, "rows": {name: asdict(row) for name, row in sorted(rows.items())}}
            write_bytes(args.output, (json.dumps(document, indent=1) + "\n").encode())
    if args.page:
        write_bytes(args.page, page(list(rows.values()), settings).encode())


def _read(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    return {name: Row(**row) for name, row in json.loads(path.read_text())["rows"].items()}


if __name__ == "__main__":
    main()
