"""Policy: which layers of a model stay float, and why. Data in, data out; nothing is changed."""

import fnmatch
import re
from collections.abc import Iterable, Iterator

from torch import nn

from bonn_qat.errors import InvalidModel, UnknownName

_SHORTCUT = re.compile(r"downsample|shortcut|skip|project|proj_conv|residual|identity", re.IGNORECASE)


def float_layers(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, str]:
    """Names of the convolutions and linear layers of ``model`` that stay float, each with the reason.

    Kept are what ``skip`` names (module names or globs; a name stands for everything below it), the first
    convolution, the classifier, 1x1 shortcut projections, depthwise convolutions and linear layers.
    Raises UnknownName for a skip pattern that matches no module.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    kept: dict[str, str] = {}
    for pattern, names in _matches(model, skip):
        for name in names:
            kept.setdefault(name, f"skip {pattern!r}")
    for name in _first(model, layers):
        kept.setdefault(name, "first layer")
    for name in _classifiers(model, layers):
        kept.setdefault(name, "classifier")
    for name, layer in layers.items():
        if isinstance(layer, nn.Linear):
            kept.setdefault(name, "linear layer")
        elif _is_shortcut(model, name, layer):
            kept.setdefault(name, "shortcut projection")
        elif layer.groups > 1 and layer.groups == layer.in_channels:
            kept.setdefault(name, "depthwise")
    return {name: reason for name, reason in kept.items() if name in layers}


def classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that turns features into logits.

    timm's metadata decides, else the last linear layer in the order of registration. Raises InvalidModel
    if there is none, or more than one.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found = [name for name in _classifiers(model, layers) if name in layers]
    if len(found) != 1:
        reason = "none" if not found else f"{len(found)} ({', '.join(found)})"
        raise InvalidModel(f"{type(model).__name__} needs one classifier layer, has {reason}; name it: classifier='...'")
    return found[0], layers[found[0]]


def _matches(model: nn.Module, skip: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in [skip] if isinstance(skip, str) else skip:
        roots = set(fnmatch.filter(names, pattern))
        if not roots:
            raise UnknownName(f"module of {type(model).__name__} in skip", pattern, names)
        yield pattern, [n for n in names if n in roots or any(n.startswith(root + ".") for root in roots)]


def _metadata(model: nn.Module, key: str) -> list[str]:
    config = getattr(model, "pretrained_cfg", None) or {}
    value = config.get(key) if isinstance(config, dict) else None
    return [value] if isinstance(value, str) else list(value or ())


def _first(model: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear]) -> list[str]:
    named = [name for name in _metadata(model, "first_conv") if name in layers]
    return named or [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)][:1]


def _classifiers(model: nn.Module, layers: dict[str, nn.Conv2d | nn.Linear]) -> list[str]:
    named = [name for name in _metadata(model, "classifier") if name in layers]
    return named or [name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:]


def _is_shortcut(model: nn.Module, name: str, conv: nn.Conv2d) -> bool:
    if conv.kernel_size != (1, 1):
        return False
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        if _SHORTCUT.search(part):
            # Some nets call a whole stage transition "downsample": a shortcut has one or two convolutions.
            ancestor = model.get_submodule(".".join(parts[:depth]))
            return sum(isinstance(m, nn.Conv2d) for m in ancestor.modules()) <= 2
    return False
