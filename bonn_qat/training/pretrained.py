"""Trained networks by name, offered by plugins through the hook ``bonn_qat_pretrained``."""

import fnmatch
from typing import Any

import pluggy
from torch import nn

from bonn_qat import plugins
from bonn_qat.errors import UnknownName
from bonn_qat.training.network import load


def list_models(filter: str = "*", *, pretrained: bool = False, pm: pluggy.PluginManager | None = None) -> list[str]:
    """Names for :func:`create_model` that match ``filter``, with ``*`` and ``?``: those of timm, and with tags ours.

    With ``pretrained`` they are those whose trained weights a plugin has brought.

    >>> list_models("birealnet*")
    ['birealnet18', 'birealnet34']
    """
    import timm

    names = [*plugins.pretrained(pm), *([] if pretrained else timm.list_models())]
    return sorted(fnmatch.filter(names, filter))


def create_model(
    name: str, pretrained: bool = False, *, pm: pluggy.PluginManager | None = None, **kwargs: Any
) -> nn.Module:
    """A network by its name, as ``timm.create_model``, which takes the names of our own networks alike.

    A name with a tag, such as ``wrn22_16.bonn_cifar10``, is that of a trained network of a plugin: binary as its scheme
    says, with its weights if ``pretrained``, else as its training began; ``num_classes`` and ``in_chans`` fit it to
    other data (:func:`bonn_qat.load`). Any other name is timm's, and gives a float network. As from timm, it is in
    training mode: call ``model.eval()`` before you use it.

    >>> create_model("wrn22_16", num_classes=7).get_classifier()
    Linear(in_features=64, out_features=7, bias=True)

    Raises UnknownName for a tag or an architecture that nothing installed has, PluginConflict for a name that several
    plugins offer, and what :func:`bonn_qat.load` raises.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if tag and not (timm.is_model(architecture) and name in timm.list_pretrained(f"{architecture}.*")):
        found = plugins.find_pretrained(name, pm)
        known = {key: kwargs.pop(key, None) for key in ("num_classes", "in_chans")}
        return load(found.weights, trained=pretrained, model_options=kwargs, pm=pm, **known).train()
    if not timm.is_model(architecture):
        raise UnknownName("model", name, list_models(pm=pm))
    model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    return model
