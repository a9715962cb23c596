"""The float network, the upper bound of a comparison."""

from collections.abc import Iterable

from bonn_qat import Scheme, hookimpl

FLOAT = Scheme(
    name="float",
    title="Full precision",
    reference="the float network, trained with the same recipe",
    weight=None,
    activation=None,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``float``."""
    yield FLOAT
