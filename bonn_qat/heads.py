"""Heads: find the layer that turns features into logits."""

from typing import Any

from torch import nn

from bonn_qat.errors import InvalidModel


def classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that turns features into logits.

    It is the one in timm's metadata, else the one that returns ``(B, classes)`` among those that produce the model's
    outputs. Of a model that no dry run could follow it is the last linear layer in the order of registration. Raises
    InvalidModel if there is none, or more than one.

    >>> classifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))[0]
    '3'
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found = [name for name in metadata(model, "classifier") if name in layers]
    if not found:
        logits = _logits(model)
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        found = linear[-1:] if logits is None else [name for name in logits if name in layers]
    if len(found) != 1:
        reason = "none that returns (B, classes)" if not found else f"{len(found)} ({', '.join(found)})"
        raise InvalidModel(
            f"{type(model).__name__} needs one classifier layer, has {reason}; name it, for an Objective in "
            "options={'feature': {'classifier': 'NAME'}}"
        )
    return found[0], layers[found[0]]


def record_of(model: nn.Module) -> tuple[str, Any]:
    """The prefix of the binarized network within ``model``, and its ``binarization``; None for no such network.

    It is ``model`` itself, or the one inside a wrapper without parameters of its own, as torch.compile returns.
    """
    for name, module in model.named_modules():
        if (record := vars(module).get("binarization")) is not None:
            is_all = {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
            return (f"{name}." if name else "", record) if is_all else ("", None)
    return "", None


def _logits(model: nn.Module) -> tuple[str, ...] | None:
    prefix, record = record_of(model)
    if record is not None and record.logits is None:
        return None
    if record is not None:
        names, layers = tuple(prefix + name for name in record.logits), dict(model.named_modules())
        if all(isinstance(layers.get(name), nn.Conv2d | nn.Linear) for name in names):
            return names  # else the head is another one by now
    from bonn_qat.binarization.policy import decide  # of a higher rank

    return decide(model).logits


def metadata(model: nn.Module, key: str) -> list[str]:
    """Names of the layers under ``key`` in timm's ``pretrained_cfg`` of ``model``; empty if there are none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    value = config.get(key) if isinstance(config, dict) else None
    return [value] if isinstance(value, str) else list(value or ())
