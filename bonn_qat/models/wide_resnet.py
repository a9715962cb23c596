"""Wide residual networks of BONN's CIFAR experiments: WRN-22 and WRN-40 in two widths (arXiv:1605.07146).

Images are ``(B, in_chans, H, W)`` with H and W at least 8, activations ``(B, C, H, W)``.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from bonn_qat.layers import is_idle, normalized, step
from bonn_qat.models.backbone import Backbone, build
from bonn_qat.scheme import Scheme

_CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
_CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


class BasicBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-dropout-conv, plus a shortcut; ``(B, I, H, W) -> (B, O, ceil(H/stride), ceil(W/stride))``.

    The shortcut is the identity or, if the shape changes, a 1x1 convolution of the first ReLU's output.
    ``follows_stem`` marks the first block: its input has had no norm.
    """

    normalizes_input = True

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, drop_rate: float, follows_stem: bool = False
    ) -> None:
        super().__init__()
        self.follows_stem = follows_stem
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        projects = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.dropout(self.act2(self.bn2(self.conv1(y))))
        return shortcut + self.conv2(y)  # type: ignore[no-any-return]

    def binary_form(self, scheme: Scheme) -> nn.Module:
        """The block for ``scheme.shortcut``, made of this block's modules under the same names.

        ``"conv"`` gives a :class:`ConvShortcutBlock`, ``"block"`` a :class:`BlockShortcutBlock`. With float activations
        there is no sign to replace the ReLU, and ``"block"`` gives this block.
        """
        if scheme.shortcut == "conv":
            return ConvShortcutBlock(self, scheme)
        return self if scheme.activation is None else BlockShortcutBlock(self, scheme)


class _BinaryBlock(nn.Module):
    """The base of both binary forms. Signs are taken by the binary convolutions, after the BNs of the block.

    Dropout acts on the output of the first convolution: between BN and sign it would make +1 of what it drops.

    With the norm position ``after_conv`` the BNs stand between convolution and addition instead of before the signs;
    the first block keeps its first BN, now for the sign and the shortcut alike, because the stem has none. With
    ``both`` they stand at both places.
    """

    normalizes_input = True

    def __init__(self, block: BasicBlock, scheme: Scheme) -> None:
        super().__init__()
        self.bn1: nn.Module = block.bn1
        self.conv1 = block.conv1
        self.bn2: nn.Module = block.bn2
        self.conv2 = block.conv2
        self.bn2_after: nn.Module = nn.Identity()
        self.dropout, self.shortcut = block.dropout, block.shortcut
        self.norm_position, moved = scheme.norm_position, scheme.norm_position == "after_conv"
        self.shares_norm = moved and block.follows_stem
        if moved and not self.shares_norm:
            self.bn1 = nn.Identity()
        if self.norm_position != "before_sign":
            self.bn2_after = nn.BatchNorm2d(block.conv2.out_channels)
        self.act_after_add = scheme.nonlinearity_position == "after_add"
        self.training = block.training

    def _unit(
        self,
        norm: nn.Module | None,
        conv: nn.Module,
        after: Sequence[nn.Module],
        x: Tensor,
        shortcut: Tensor,
        act: nn.Module,
    ) -> Tensor:
        """``act(after(conv(norm(x))) + shortcut)``, or with the other position of ``act``."""
        passes = [functools.partial(step, norm, conv)]
        passes += [functools.partial(normalized, module) for module in after if not is_idle(module)]
        for pass_ in passes[:-1]:
            x = pass_(x)
        if self.act_after_add:
            return act(passes[-1](x, shortcut))  # type: ignore[no-any-return]
        return act(passes[-1](x)) + shortcut  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"act_after_add={self.act_after_add}, norm_position={self.norm_position!r}"


class ConvShortcutBlock(_BinaryBlock):
    """One shortcut per convolution, as in BONN's ResNet-18; shapes as in :class:`BasicBlock`.

    Twice ``act(conv(sign(BN(x))) + shortcut(x))``, or ``act(conv(...)) + shortcut(x)`` for the position
    ``before_add``; ``act(BN(conv(sign(x))) + shortcut(x))`` for the norm position ``after_conv``. If the shape changes,
    the first shortcut is 2x2 average pooling and the 1x1 convolution with stride 1, of the block's input before the BN;
    for the projection ``conv_norm_pool`` it is the convolution, a BN and the pooling.
    """

    def __init__(self, block: BasicBlock, scheme: Scheme) -> None:
        super().__init__(block, scheme)
        channels = block.conv1.out_channels
        self.act1, self.act2 = _nonlinearity(scheme, channels), _nonlinearity(scheme, channels)
        stride = block.conv1.stride[0]
        self.pools_last = self.shortcut is not None and scheme.projection == "conv_norm_pool"
        self.shortcut_bn = nn.BatchNorm2d(channels) if self.pools_last else nn.Identity()
        # ceil_mode, so that an odd size becomes as long as after the strided convolution.
        self.pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        if self.shortcut is not None:
            self.shortcut.stride = (1, 1)
        self.bn1_after: nn.Module = nn.Identity()
        if self.norm_position == "after_conv":
            self.bn2 = nn.Identity()
        if self.norm_position != "before_sign":
            self.bn1_after = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = normalized(self.bn1, x) if self.shares_norm else x
        # In this order, because a compiler that finds a convolution between two uses of x keeps the mask of the sign
        # in memory, which it could recompute.
        if self.pools_last:
            shortcut = self.pool(self.shortcut_bn(self.shortcut(x)))  # type: ignore[misc]
        else:
            pooled = self.pool(x)
            shortcut = x if self.shortcut is None else self.shortcut(pooled)
        x = self._unit(
            None if self.shares_norm else self.bn1, self.conv1, (self.bn1_after, self.dropout), x, shortcut, self.act1
        )
        return self._unit(self.bn2, self.conv2, (self.bn2_after,), x, x, self.act2)


class BlockShortcutBlock(_BinaryBlock):
    """The float block with signs in place of its ReLUs; shapes as in :class:`BasicBlock`.

    With y the output of both convolutions it returns ``act2(y + shortcut)`` or ``act2(y) + shortcut``. The projection
    takes the output of the first BN before the sign, if there is one. The BN between the convolutions stands after the
    one and before the other's sign in every norm position.
    """

    def __init__(self, block: BasicBlock, scheme: Scheme) -> None:
        super().__init__(block, scheme)
        self.act2 = _nonlinearity(scheme, block.conv2.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.shares_norm or self.shortcut is not None:
            y = normalized(self.bn1, x)
            shortcut = y if self.shares_norm else x
            shortcut = shortcut if self.shortcut is None else self.shortcut(y)
            y = self.conv1(y)
        else:
            shortcut, y = x, step(self.bn1, self.conv1, x)
        return self._unit(self.bn2, self.conv2, (self.bn2_after,), self.dropout(y), shortcut, self.act2)


def _nonlinearity(scheme: Scheme, channels: int) -> nn.Module:
    if scheme.nonlinearity is not None:
        return scheme.nonlinearity(channels)
    return nn.ReLU() if scheme.activation is None else nn.Identity()


class WideResNet(Backbone):
    """Pre-activation residual network of three stages; images ``(B, in_chans, H, W)`` -> logits ``(B, num_classes)``.

    ``depth`` is 6n + 4 for n blocks in each stage, ``widths`` are the channels of the stem and the stages.
    ``drop_rate`` is the dropout between the two convolutions of a block. Raises ValueError for another depth.
    """

    def __init__(
        self,
        depth: int = 22,
        widths: Sequence[int] = (16, 16, 32, 64),
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"the depth of a WideResNet is 6n + 4, at least 10; got {depth}")
        self.drop_rate = drop_rate
        self.feature_info = [
            {"num_chs": channels, "reduction": 2**stage, "module": f"layer{stage + 1}"}
            for stage, channels in enumerate(widths[1:])
        ]

        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.layer1 = _stage(widths[0], widths[1], blocks, 1, drop_rate, follows_stem=True)
        self.layer2 = _stage(widths[1], widths[2], blocks, 2, drop_rate)
        self.layer3 = _stage(widths[2], widths[3], blocks, 2, drop_rate)
        self.bn = nn.BatchNorm2d(widths[3])
        self.act = nn.ReLU(inplace=True)
        self.make_head(widths[-1], num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """MSRA initialization of the convolutions, zero bias of the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameters into layers, as timm's optimizers ask for them."""
        return {"stem": r"^conv1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W) -> (B, num_features, ceil(H/4), ceil(W/4))``."""
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return self.act(self.bn(x))  # type: ignore[no-any-return]


def _stage(
    in_channels: int, out_channels: int, blocks: int, stride: int, drop_rate: float, follows_stem: bool = False
) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, drop_rate, follows_stem)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, drop_rate) for _ in range(blocks - 1)))


_NARROW, _WIDE = (16, 16, 32, 64), (64, 64, 128, 256)

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "min_input_size": (3, 8, 8),
            "mean": _CIFAR_MEAN,
            "std": _CIFAR_STD,
            "crop_pct": 1.0,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in ("wrn10_16", "wrn16_16", "wrn22_16", "wrn22_64", "wrn40_16", "wrn40_64")
    }
)


def _wide_resnet(
    variant: str, pretrained: bool, depth: int, widths: tuple[int, ...], kwargs: Mapping[str, Any], drop_rate: float = 0
) -> nn.Module:
    architecture = {
        "depth": depth, "widths": widths, "drop_rate": drop_rate, "feature_cfg": {"out_indices": (0, 1, 2)}
    }  # fmt: skip
    return build(WideResNet, variant, pretrained, architecture, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def wrn10_16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-10, channels 16-16-32-64; float, or binarized by ``scheme``."""
    return _wide_resnet("wrn10_16", pretrained, 10, _NARROW, kwargs)


@register_model  # type: ignore[untyped-decorator]
def wrn16_16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-16, channels 16-16-32-64; float, or binarized by ``scheme``."""
    return _wide_resnet("wrn16_16", pretrained, 16, _NARROW, kwargs)


@register_model  # type: ignore[untyped-decorator]
def wrn22_16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-22, channels 16-16-32-64 (0.27 M parameters); float, or binarized by ``scheme``."""
    return _wide_resnet("wrn22_16", pretrained, 22, _NARROW, kwargs)


@register_model  # type: ignore[untyped-decorator]
def wrn22_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-22, channels 64-64-128-256 (4.33 M parameters), dropout 0.3; float, or binarized by ``scheme``."""
    return _wide_resnet("wrn22_64", pretrained, 22, _WIDE, kwargs, drop_rate=0.3)


@register_model  # type: ignore[untyped-decorator]
def wrn40_16(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40, channels 16-16-32-64; float, or binarized by ``scheme``."""
    return _wide_resnet("wrn40_16", pretrained, 40, _NARROW, kwargs)


@register_model  # type: ignore[untyped-decorator]
def wrn40_64(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """WRN-40, channels 64-64-128-256, dropout 0.3; float, or binarized by ``scheme``."""
    return _wide_resnet("wrn40_64", pretrained, 40, _WIDE, kwargs, drop_rate=0.3)
