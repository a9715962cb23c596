"""Recipes and metrics in the form that MLflow takes: flat, with names that it allows."""

import re
from collections.abc import Mapping
from typing import Any


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten tables and lists of tables; lists of plain values are joined by commas, empty ones left out.

    >>> flatten({"lr": 0.1, "skip": ["stem", "head"], "stages": [{"share": 1.0}]})
    {'lr': '0.1', 'skip': 'stem, head', 'stages.0.share': '1.0'}
    """
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple):
            flat[allowed(f"{prefix}{key}")] = str(value)
        elif value:
            flat[allowed(f"{prefix}{key}")] = ", ".join(map(str, value))
    return flat


def allowed(name: str) -> str:
    """``name`` with an underscore for each character that MLflow refuses."""
    return re.sub(r"[^\w./ -]", "_", name)
