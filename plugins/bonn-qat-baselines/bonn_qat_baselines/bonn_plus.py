"""BONN+, ours: BONN with the parts of later work that cost a packed network next to nothing.

Weights are BONN's with a modulation for each filter instead of one for the layer, trained with its losses. From
ReActNet are the thresholds of the signs, with ApproxSign's backward, the RPReLUs, and the norm after the convolution.
"""

import dataclasses
import functools
from collections.abc import Iterable

from bonn_qat import Scheme, hookimpl
from bonn_qat.bonn import BONN
from bonn_qat.quantizers import BonnWeight
from bonn_qat_baselines.reactnet import RPReLU, RSign

BONN_PLUS = dataclasses.replace(
    BONN,
    name="bonn-plus",
    title="BONN+",
    reference=f"ours; {BONN.reference}, with parts of ReActNet (Liu et al., ECCV 2020, arXiv:2003.03488)",
    weight=functools.partial(BonnWeight, granularity="filter"),
    activation=RSign,
    nonlinearity=RPReLU,
    norm_position="after_conv",
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``bonn-plus``."""
    yield BONN_PLUS
