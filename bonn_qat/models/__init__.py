"""The paper's backbones, registered with timm when this package is imported."""

from bonn_qat.models import shared  # noqa: F401 (registers an architecture)
from bonn_qat.models.birealnet import BiRealNet
from bonn_qat.models.wide_resnet import WideResNet

__all__ = ["BiRealNet", "WideResNet"]
