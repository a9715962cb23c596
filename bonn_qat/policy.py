"""Policy: which layers of a model stay float, and why. Data in, data out; nothing is changed."""

import fnmatch
import re
from collections.abc import Iterable

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
    kept = skipped(model, skip)
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


def skipped(model: nn.Module, skip: Iterable[str]) -> dict[str, str]:
    """Names of all modules of ``model`` that ``skip`` names, directly or by a parent, each with the pattern.

    A module that stands at several places has the name of its first. Raises UnknownName for a pattern that
    matches no module.
    """
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    first = {id(module): name for name, module in reversed(modules)}
    found: dict[str, str] = {}
    for pattern in [skip] if isinstance(skip, str) else skip:
        roots = set(fnmatch.filter((name for name, _ in modules), pattern))
        if not roots:
            raise UnknownName(f"module of {type(model).__name__} in skip", pattern, (name for name, _ in modules))
        for name, module in modules:
            if any(name == root or name.startswith(root + ".") for root in roots):
                found.setdefault(first[id(module)], f"skip {pattern!r}")
    return found


def classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that turns features into logits.

    timm's metadata decides, else the last linear layer in the order of registration. Raises InvalidModel
    if there is none, or more than one.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found = [name for name in _classifiers(model, layers) if name in layers]
    if len(found) != 1:
        reason = "none" if not found else f"{len(found)} ({', '.join(found)})"
        raise InvalidModel(
            f"{type(model).__name__} needs one classifier layer, has {reason}; name it: classifier='...'"
        )
    return found[0], layers[found[0]]


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
