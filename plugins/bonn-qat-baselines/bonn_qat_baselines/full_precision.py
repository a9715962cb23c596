"""The float network itself, so that a comparison has its upper bound."""

from collections.abc import Iterable

from bonn_qat import Scheme, hookimpl

FLOAT = Scheme(
    name="float",
    title="Full precision",
    reference="the float network as it is, trained with the same recipe",
    weight=None,
    activation=None,
)


@hookimpl
def bonn_qat_schemes() -> Iterable[Scheme]:
    """Offer ``float``."""
    yield FLOAT
