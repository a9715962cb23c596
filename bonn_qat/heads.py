"""Heads: the layer that turns features into logits, by timm's metadata."""

from torch import nn

from bonn_qat.errors import InvalidModel


def classifier(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that turns features into logits.

    timm's metadata decides, else the last linear layer in the order of registration. Raises InvalidModel
    if there is none, or more than one.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found = [name for name in metadata(model, "classifier") if name in layers]
    found = found or [name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:]
    if len(found) != 1:
        reason = "none" if not found else f"{len(found)} ({', '.join(found)})"
        raise InvalidModel(
            f"{type(model).__name__} needs one classifier layer, has {reason}; name it: classifier='...'"
        )
    return found[0], layers[found[0]]


def metadata(model: nn.Module, key: str) -> list[str]:
    """Names of layers that timm's ``pretrained_cfg`` of ``model`` has under ``key``; empty without any."""
    config = getattr(model, "pretrained_cfg", None) or {}
    value = config.get(key) if isinstance(config, dict) else None
    return [value] if isinstance(value, str) else list(value or ())
