"""BWN, Binary-Weight-Networks (Rastegari et al., ECCV 2016, arXiv:1603.05279): XNOR-Net's weights, float activations.

The network is the float one, except that its kernels W ``(O, I, kh, kw)`` are ``alpha sign(W)`` with one alpha for
each output filter: no norm is added, each ReLU stays, and blocks keep their shortcuts. The forward pass, the four
readings of the gradient and the option ``centre`` are those of :class:`bonn_qat_baselines.xnor.XnorWeight`.
"""

from collections.abc import Iterable

from bonn_qat import Scheme, hookimpl
from bonn_qat_baselines.xnor import XnorWeight

BWN = Scheme(
    name="bwn",
    title="BWN",
    reference="Rastegari et al., XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks, "
    "ECCV 2016, arXiv:1603.05279",
    weight=XnorWeight,
    activation=None,
    norm=None,
    nonlinearity=None,
    shortcut="block",
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``bwn``."""
    yield BWN
