"""The ends of a network by the flow of data: what reads the input or produces an output stays float, nothing else."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import bonn_qat
from bonn_qat.binarization.binarize import MostlyFloat, UnseenModel
from bonn_qat.binarization.policy import decide
from bonn_qat.errors import InvalidModel
from bonn_qat.heads import classifier

ENDS = ("first layer", "reads the input", "classifier", "produces an output")
C = 6


def ends(model: nn.Module, **options: Any) -> dict[str, str]:
    return {name: why for name, why in decide(model, **options).kept.items() if why in ENDS}


def conv(inputs: int = C, outputs: int = C) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _into(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    out[:, :1] = x[:, :1]
    out[:, 1:].copy_(x[:, 1:])
    return out


@torch.no_grad()
def _normalized(x: Tensor) -> Tensor:
    return (x - 0.5) / 0.25


# Ways for data to go on without a layer; the shape stays.
ON: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda x: x,
    "affine": lambda x: x * 2 - 1,
    "view": lambda x: x.flatten(2).transpose(1, 2).mT.reshape(x.shape),
    "in place": lambda x: x.clone().mul_(0.5).add_(1),
    "parts": lambda x: torch.cat([p.relu() for p in x.chunk(3, 1)], 1),
    "into": _into,
    "out": lambda x: x * 2 if torch.is_grad_enabled() else torch.mul(x, 2, out=torch.empty_like(x)),
    "resized": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "indexed": lambda x: x[:, torch.arange(x.shape[1])],
    "stacked": lambda x: torch.stack([x, x]).sum(0),
    "einsum": lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(x.shape[1], device=x.device, dtype=x.dtype)),
}
# Ways out of the graph that a gradient takes.
DECODED: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: x.detach().sigmoid(),
    "without gradients": lambda x: _normalized(x),
    "best": lambda x: x.argmax(1, keepdim=True).to(x.dtype).expand(x.shape),
    "sorted": lambda x: x.flatten(1).topk(3).indices.to(x.dtype).sum(),
    "threshold": lambda x: (x > 0).to(x.dtype),
}


@dataclass
class Result:
    """What a model of another library returns."""

    main: Any
    rest: Any = None


NESTS: list[Callable[[list[Any]], Any]] = [
    tuple,
    list,
    lambda xs: {str(i): x for i, x in enumerate(xs)},
    lambda xs: Result(xs[0], xs[1:]),
    lambda xs: SimpleNamespace(a={"b": [xs]}),
    lambda xs: [{"boxes": x, "number": 3} for x in xs],
]


class Generated(nn.Module):
    """One to three stems, a trunk of two to four steps, one to three heads; ``ends`` says which layers stay float."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.pick = pick = random.Random(seed)
        self.stems = nn.ModuleList(conv(3) for _ in range(pick.randint(1, 3)))
        self.before = [pick.choice([*ON.values(), _normalized]) for _ in self.stems]
        self.steps = nn.ModuleList()
        self.kinds = [pick.choice(["plain", "residual", "in place", "dense", "two"]) for _ in range(pick.randint(2, 4))]
        for kind in self.kinds:
            self.steps.append(nn.ModuleList([conv(2 * C if kind == "dense" else C), conv()][: 1 + (kind == "two")]))
        self.between = [pick.choice(list(ON.values())) for _ in self.kinds]
        self.heads, self.ends = nn.ModuleList(), {f"stems.{i}": "first layer" for i in range(len(self.stems))}
        self.roles = [
            pick.choice(["dense", "vector", "sum", "skip", "larger", "decoded", "read on"])
            for _ in range(pick.randint(1, 3))
        ]
        for i, role in enumerate(self.roles):
            parts = (
                [conv(), conv()] if role in ("sum", "decoded", "read on") else [conv(C, 4 if role == "larger" else 3)]
            )
            if role == "vector":
                parts = [nn.Linear(C, 5)]
            self.heads.append(nn.ModuleList(parts))
            self.ends |= {f"heads.{i}.{k}": "produces an output" for k in range(len(parts))}
        if self.roles == ["vector"]:
            self.ends["heads.0.0"] = "classifier"
        self.after = [pick.choice(list(ON.values())) for _ in self.roles]
        self.decode = pick.choice(list(DECODED.values()))
        self.nest = pick.choice(NESTS)

    def forward(self, image: Tensor) -> Any:
        x = sum(stem(before(image)) for stem, before in zip(self.stems, self.before, strict=True))
        for step, kind, between in zip(self.steps, self.kinds, self.between, strict=True):
            x = between(x)
            if kind == "two":
                x = step[1](step[0](x).relu())
            elif kind == "residual":
                x = x + step[0](x)
            elif kind == "in place":
                x = x.clone()
                x += step[0](x)
            else:
                x = step[0](torch.cat([x, x.relu()], 1) if kind == "dense" else x)
        outputs = [
            self.head(parts, role, after, x.relu(), image)
            for parts, role, after in zip(self.heads, self.roles, self.after, strict=True)
        ]
        return self.nest(outputs)

    def head(self, parts: Any, role: str, after: Callable[[Tensor], Tensor], x: Tensor, image: Tensor) -> Any:
        if role == "vector":
            return parts[0](x.mean((2, 3)))
        if role == "sum":
            return after(parts[0](x)) + parts[1](x)
        if role == "skip":
            return after(parts[0](x)) + image
        if role == "larger":
            return F.pixel_shuffle(parts[0](x), 2)
        first = parts[0](x)
        if role == "decoded":  # as a detector's proposals
            return parts[1](x * self.decode(first))
        if role == "read on":  # as a pyramid's level
            return first, parts[1](after(first))
        return after(first)


class WithoutGrad(Generated):
    @torch.no_grad()
    def forward(self, image: Tensor) -> Any:
        return super().forward(image)


@pytest.mark.parametrize("seed", range(40))
def test_stems_and_heads_of_a_generated_network_stay_float_and_nothing_else(seed):
    model = Generated(seed)
    trunk = {name for name, m in model.named_modules() if name.startswith("steps") and isinstance(m, nn.Conv2d)}
    decided = decide(model, input_size=(3, 12, 12))
    assert decided.kept == model.ends
    assert set(decided.binary) == trunk
    first = next(iter(model.ends))
    assert first in decide(model, input_size=(3, 12, 12), include=[first]).binary
    without = ends(WithoutGrad(seed), input_size=(3, 12, 12))  # then only what is read says where the ends are
    assert without.keys() <= model.ends.keys()
    assert {name for name in model.ends if name.startswith("stems")} <= without.keys()


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([conv(3), conv(), conv()])
        self.fpn = torchvision.ops.FeaturePyramidNetwork([C, C], 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.body[1](self.body[0](x).relu()).relu()
        b = self.body[2](F.max_pool2d(a, 2)).relu()
        return self.fpn({"a": a, "b": b})


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3), conv(), conv()])
        self.up = nn.ModuleList([conv(2 * C), conv(C + 3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](x).relu()
        b = self.down[2](self.down[1](F.max_pool2d(a, 2)).relu())
        c = self.up[0](torch.cat([F.interpolate(b, scale_factor=2), a], 1)).relu()
        return self.up[1](torch.cat([c, x], 1))  # the image once more


class Residual(nn.Module):
    """No head: only what nobody reads later is an end, not the whole stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3)
        self.blocks = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class Pooled(nn.Module):
    """An encoder that hands its decoder the places of its maxima, which no gradient goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.middle, self.up, self.last = conv(3), conv(), conv(), conv(), conv(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, places = F.max_pool2d(self.down(self.stem(x).relu()), 2, return_indices=True)
        return self.last(self.up(F.max_unpool2d(self.middle(x), places, 2)).relu())


class Frozen(nn.Module):
    """A backbone without gradients and its norm with a weight of four axes, in front of layers that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv())
        self.norm = Scaled()
        self.conv, self.head = conv(), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(self.conv(self.norm(x)).mean((2, 3)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


FIRST, READS, OUTPUT = "first layer", "reads the input", "produces an output"
FOUND = [
    (Pyramid, {"body.0": FIRST, "fpn.layer_blocks.0.0": OUTPUT, "fpn.layer_blocks.1.0": OUTPUT}),
    (UNet, {"down.0": FIRST, "up.1": READS}),
    (Residual, {"stem": FIRST, "blocks.3.2": OUTPUT}),
    (Pooled, {"stem": FIRST, "last": OUTPUT}),
    (Frozen, {"body.0": FIRST, "head": "classifier"}),
    (lambda: nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), conv(C, 3)), {"0": FIRST, "4": OUTPUT}),
    (lambda: nn.Sequential(conv(3), conv(), conv(C, 12), nn.PixelShuffle(2)), {"0": FIRST, "2": OUTPUT}),
]


@pytest.mark.parametrize(("make", "expected"), FOUND, ids=[getattr(make, "__name__", "net") for make, _ in FOUND])
def test_the_ends_of_networks_of_other_shapes(make, expected):
    assert ends(make(), input_size=(3, 16, 16)) == expected


W = {"weights": None, "weights_backbone": None}
DETECTION, SEGMENTATION = torchvision.models.detection, torchvision.models.segmentation


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (
            SEGMENTATION.lraspp_mobilenet_v3_large,
            "backbone.0.0",
            ["classifier.low_classifier", "classifier.high_classifier"],
        ),
        (SEGMENTATION.deeplabv3_mobilenet_v3_large, "backbone.0.0", ["classifier.4"]),
        (
            DETECTION.fasterrcnn_mobilenet_v3_large_320_fpn,
            "backbone.body.0.0",
            [f"rpn.head.{x}" for x in ("cls_logits", "bbox_pred")]
            + [f"roi_heads.box_predictor.{x}" for x in ("cls_score", "bbox_pred")],
        ),
        (
            DETECTION.ssdlite320_mobilenet_v3_large,
            "backbone.features.0.0.0",
            [f"head.{x}_head.module_list.{i}.1" for x in ("classification", "regression") for i in range(6)],
        ),
        (
            DETECTION.retinanet_resnet50_fpn,
            "backbone.body.conv1",
            ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
        ),
    ],
    ids=["lraspp", "deeplab", "faster r-cnn", "ssdlite", "retinanet"],
)  # fmt: skip
def test_the_prediction_layers_of_torchvisions_networks_stay_float(make, first, last):
    with torch.device("meta"):
        model = make(**W)
    assert ends(model, input_size=(3, 64, 64)) == {first: FIRST, **dict.fromkeys(last, OUTPUT)}
    with pytest.raises(InvalidModel, match=r"needs one classifier layer, has .*'classifier': 'NAME'"):
        classifier(model)


def test_the_classifier_is_the_layer_that_gives_logits_not_the_last_one():
    class TwoHeads(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.stem, self.middle = conv(3), conv()
            self.heads = nn.ModuleList(nn.Linear(C, 5) for _ in range(heads))
            self.aux = nn.Linear(C, C)  # the last in the order of registration

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.middle(self.stem(x)).mean((2, 3))
            return [head(self.aux(x)) for head in self.heads]

    for model in (TwoHeads(1), bonn_qat.binarize(TwoHeads(1))):
        assert classifier(model)[0] == "heads.0"
        assert bonn_qat.FeatureLoss(model).centres.shape == (5, C)
    for model in (TwoHeads(2), bonn_qat.binarize(TwoHeads(2))):
        with pytest.raises(InvalidModel, match=r"TwoHeads needs one classifier layer, has 2 \(heads\.0, heads\.1\)"):
            bonn_qat.FeatureLoss(model)
        assert len(bonn_qat.FeatureLoss(model, classifier="heads.1").centres) == 5
    for model in (Residual(), bonn_qat.binarize(UNet())):
        with pytest.raises(InvalidModel, match=r"has none that returns \(B, classes\)"):
            bonn_qat.FeatureLoss(model)


def test_names_that_decide_are_told():
    class Two(nn.Sequential):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    model = Two(conv(3), conv(), nn.Flatten(), nn.Linear(9, 2))
    with pytest.warns(
        UnseenModel, match=r"names and classes decide .* of Two stay float, because it takes no image of"
    ):
        binary = bonn_qat.binarize(model)
    assert binary.binarization.kept == {"0": FIRST, "3": "classifier"}


@pytest.mark.parametrize("seed", range(8))
def test_a_network_that_stays_mostly_float_is_told(seed):
    pick = random.Random(seed)
    kind = pick.choice([nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
    axes = 1 if kind is nn.Conv1d else 3 if kind is nn.Conv3d else 2
    width, depth = pick.choice([8, 12]), pick.randint(2, 4)
    own = type("Own", (kind,), {"forward": lambda self, x: kind.forward(self, x)})
    layers = [own(1 if i == 0 else width, width, 3) for i in range(depth)]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1](1)
    model = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(width, 8), nn.Linear(8, 3))
    for size in ((1, *[12] * axes), None):
        with pytest.warns(
            MostlyFloat, match=r"only \d\.\d% of the (MACs|weights) of Sequential can become binary; .*"
        ) as told:
            bonn_qat.binarize(model, input_size=size)
        said = next(str(w.message) for w in told if w.category is MostlyFloat)
        assert "(Own has a forward of its own, " in said
    usual = nn.Sequential(conv(3), *[conv() for _ in range(depth + 1)], conv())
    bonn_qat.binarize(usual, input_size=(3, 12, 12), skip=[str(i) for i in range(1, depth)])  # asked for, so not told
