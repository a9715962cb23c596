"""ResNet-18 and -34 with one shortcut per convolution (Bi-Real Net, arXiv:1808.00278), in the order of BONN's code.

Images are ``(B, in_chans, H, W)``, activations ``(B, C, H, W)``.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from bonn_qat.layers import is_idle, normalized, step
from bonn_qat.models.backbone import Backbone, build
from bonn_qat.scheme import PReLU, Scheme


class OneConvBlock(nn.Module):
    """``PReLU(conv(BN(x)) + shortcut(x))``; ``(B, I, H, W) -> (B, O, ceil(H/stride), ceil(W/stride))``.

    The shortcut is the identity or, if the shape changes, a 1x1 convolution, BN and average pooling. A binary
    convolution takes the sign itself: of the BN's output, or of x in the binary form with the BN ``after_conv``,
    ``PReLU(BN(conv(sign(x))) + shortcut(x))``.
    """

    normalizes_input = True

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn_after: nn.Module = nn.Identity()
        self.act: nn.Module = PReLU(out_channels)
        self.act_after_add = True
        if stride == 1 and in_channels == out_channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
                # ceil_mode, so that an odd size becomes as long as after the strided convolution.
                nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        if self.act_after_add and is_idle(self.bn_after):
            return self.act(step(self.bn, self.conv, x, shortcut))  # type: ignore[no-any-return]
        y = step(self.bn, self.conv, x)
        if self.act_after_add:
            return self.act(normalized(self.bn_after, y, shortcut))  # type: ignore[no-any-return]
        return self.act(normalized(self.bn_after, y)) + shortcut  # type: ignore[no-any-return]

    def binary_form(self, scheme: Scheme) -> nn.Module:
        """This block with the nonlinearity of ``scheme``, its position and that of the norm; the modules are its own.

        The PReLU stays, with its slopes, unless the scheme has another nonlinearity, such as ReActNet's RPReLU. With
        one convolution in the block there is nothing for ``scheme.shortcut`` to choose.
        """
        block = copy.copy(self)
        block._modules = dict(self._modules)
        if scheme.nonlinearity not in (None, PReLU):
            block.act = scheme.nonlinearity(self.conv.out_channels)
        block.act_after_add = scheme.nonlinearity_position == "after_add"
        if scheme.norm_position == "after_conv":
            block.bn = nn.Identity()
        if scheme.norm_position != "before_sign":
            block.bn_after = nn.BatchNorm2d(self.conv.out_channels)
        return block

    def extra_repr(self) -> str:
        return f"act_after_add={self.act_after_add}"


class BiRealNet(Backbone):
    """Residual network of four stages of one-convolution blocks; ``(B, in_chans, H, W) -> (B, num_classes)``.

    ``stem="imagenet"`` is a 7x7 convolution of stride 2, BN, PReLU and a max-pool of stride 2;
    ``stem="cifar"`` a 3x3 convolution of stride 1, BN and PReLU. Raises ValueError for another stem.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (4, 4, 4, 4),
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        stem: Literal["imagenet", "cifar"] = "imagenet",
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"the stem of a BiRealNet is 'imagenet' or 'cifar'; got {stem!r}")
        large = stem == "imagenet"
        self.feature_info = [
            {"num_chs": 64, "reduction": 2 if large else 1, "module": "act1"},
            *(
                {"num_chs": 64 * 2**i, "reduction": (4 if large else 1) * 2**i, "module": f"layer{i + 1}"}
                for i in range(4)
            ),
        ]

        kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        self.conv1 = nn.Conv2d(in_chans, 64, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = PReLU(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.layer1 = _stage(64, 64, blocks[0], 1)
        self.layer2 = _stage(64, 128, blocks[1], 2)
        self.layer3 = _stage(128, 256, blocks[2], 2)
        self.layer4 = _stage(256, 512, blocks[3], 2)
        self.make_head(512, num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """MSRA initialization of the convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that sort parameters into layers, as timm's optimizers ask for them."""
        return {"stem": r"^conv1|bn1|act1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W) -> (B, 512, h, w)``; h is H / 32, or H / 8 with the small stem, rounded up."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)
        return x


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = OneConvBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(OneConvBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 224, 224), "pool_size": (7, 7), "first_conv": "conv1", "classifier": "fc"}
        for name in ("birealnet18", "birealnet34")
    }
)


@register_model  # type: ignore[untyped-decorator]
def birealnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18 with a shortcut around each of its 16 convolutions; float, or binarized by ``scheme``.

    >>> birealnet18(num_classes=10, scheme="bonn").binarization.binary[0]
    'layer1.0.conv'
    """
    return build(BiRealNet, "birealnet18", pretrained, {"blocks": (4, 4, 4, 4)}, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def birealnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34 with a shortcut around each of its 32 convolutions; float, or binarized by ``scheme``."""
    return build(BiRealNet, "birealnet34", pretrained, {"blocks": (6, 8, 12, 6)}, **kwargs)
