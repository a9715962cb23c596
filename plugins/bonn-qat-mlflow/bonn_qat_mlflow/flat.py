"""Recipes and metrics in the form that MLflow takes: flat, with names it allows."""

import re
from collections.abc import Iterator, Mapping
from typing import Any


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"lr": 0.1, "stages": [{"share": 1.0}]}`` -> ``{"lr": "0.1", "stages.0.share": "1.0"}``.

    A list of plain values is joined by commas; what is empty is left out.
    """
    return dict(_items(content, prefix))


def _items(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        value = {str(index): item for index, item in enumerate(value)}
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _items(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        if value:
            yield allowed(key), ", ".join(map(str, value))
    else:
        yield allowed(key), str(value)


def allowed(name: str) -> str:
    """``name`` with an underscore for each character that MLflow refuses."""
    return re.sub(r"[^\w./ -]", "_", name)
