"""binarize: model -> model."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from bonn_qat import plugins
from bonn_qat.errors import InvalidModel
from bonn_qat.layers import BinaryConv2d
from bonn_qat.policy import float_layers, skipped
from bonn_qat.scheme import Scheme

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Binarization:
    """What :func:`binarize` did; stored as ``model.binarization``.

    ``binary`` names the binary layers, ``kept`` the float ones with the reason, ``revived`` the norms whose
    weights were all zero and now are one, ``added`` the keys that the float model's state dict lacks.
    """

    scheme: Scheme
    binary: tuple[str, ...]
    kept: Mapping[str, str]
    revived: tuple[str, ...] = ()
    added: frozenset[str] = field(default=frozenset(), repr=False)


def binarize(
    model: nn.Module,
    scheme: str | Scheme = "bonn",
    *,
    skip: Iterable[str] = (),
    inplace: bool = False,
    pm: pluggy.PluginManager | None = None,
) -> nn.Module:
    """Turn ``model`` into a 1-bit network by module replacement; a copy unless ``inplace``.

    The first convolution, the classifier, shortcut projections, depthwise convolutions and linear layers
    stay float, as does whatever ``skip`` names (module names or globs) and everything below it. A norm
    before each sign and the scheme's nonlinearity in place of each ReLU keep the signs informative. Norms
    that start at zero (timm's ``zero_init_last``) start at one, because a zero there stops every binary
    weight's gradient. The result loads the float model's state dict strictly, as if binarized after loading.

    Raises UnknownName (scheme or skip pattern) and InvalidModel (nothing to binarize, or already binary).
    """
    chosen = plugins.find_scheme(scheme, pm)
    if isinstance(getattr(model, "binarization", None), Binarization):
        raise InvalidModel(f"{type(model).__name__} is already binarized ({model.binarization.scheme.name}); "  # type: ignore[union-attr]
                           "binarize the float model instead")  # fmt: skip
    skip = [skip] if isinstance(skip, str) else list(skip)
    kept = float_layers(model, skip)
    if chosen.weight is None:
        result = model if inplace else copy.deepcopy(model)
        result.binarization = Binarization(scheme=chosen, binary=(), kept=kept)  # type: ignore[assignment]
        return result
    if not any(isinstance(layer, nn.Conv2d) and name not in kept for name, layer in model.named_modules()):
        reasons = ", ".join(f"{name} ({why})" for name, why in kept.items()) or "it has no convolution"
        raise InvalidModel(f"nothing to binarize in {type(model).__name__}: {reasons}")

    before = set(model.state_dict())
    result = model if inplace else copy.deepcopy(model)
    frozen = {id(result.get_submodule(name)) for name in (*kept, *skipped(model, skip))}
    originals = list(result.modules())
    _rewrite(result, "", chosen, frozen, pm or plugins.manager(), {})
    _place_what_is_new(result, originals)
    result.binarization = Binarization(  # type: ignore[assignment]
        scheme=chosen,
        binary=tuple(name for name, _ in binary_layers(result)),
        kept=kept,
        revived=tuple(_revive_zero_norms(result)),
        added=frozenset(set(result.state_dict()) - before),
    )
    for _, layer in binary_layers(result):
        layer.adopt(chosen.latent_std)
    result.register_load_state_dict_pre_hook(_complete_float_state_dict)  # type: ignore[no-untyped-call]
    return result


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryConv2d]]:
    """The binary layers of ``model`` with their names, each once."""
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryConv2d):
            yield name, layer


def _rewrite(
    parent: nn.Module,
    prefix: str,
    scheme: Scheme,
    frozen: set[int],
    pm: pluggy.PluginManager,
    done: dict[int, tuple[nn.Module, nn.Module]],
) -> None:
    # Each module is asked about once, so that one that stands at two places stays shared (named_children would
    # leave out its second place); `done` keeps the replaced ones alive, for the id of a collected module may be
    # given to a new one.
    for child_name, child in list(parent._modules.items()):
        if child is None or id(child) in frozen:
            continue
        name = prefix + child_name
        if id(child) not in done:
            new = None
            if not _stays_float(child, frozen):
                new = pm.hook.bonn_qat_binarize_layer(scheme=scheme, name=name, layer=child, parent=parent)
            new = child if new is None else new
            done[id(child)] = done[id(new)] = (child, new)
            if not isinstance(new, BinaryConv2d):
                _rewrite(new, name + ".", scheme, frozen, pm, done)
        setattr(parent, child_name, done[id(child)][1])


def _stays_float(module: nn.Module, frozen: set[int]) -> bool:
    # A block whose convolutions are all kept must not be rebuilt as a binary one.
    convolutions = [id(m) for m in module.modules() if isinstance(m, nn.Conv2d)]
    return bool(convolutions) and frozen.issuperset(convolutions)


def _place_what_is_new(model: nn.Module, originals: list[nn.Module]) -> None:
    # A scheme makes its nonlinearities on the CPU in float32, wherever the model is.
    reference = next((p for module in originals for p in module.parameters() if p.is_floating_point()), None)
    known = {id(module) for module in originals}
    for module in model.modules():
        if reference is not None and not any(id(part) in known for part in module.modules()):
            module.to(device=reference.device, dtype=reference.dtype)


def _revive_zero_norms(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, NORMS) else None
        if weight is not None and not weight.is_meta and not weight.detach().any():
            nn.init.ones_(weight)
            yield name


def _complete_float_state_dict(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before loading: turn a float model's state dict into that of ``binarize`` of that model."""
    record: Binarization = model.binarization  # type: ignore[assignment]
    own = model.state_dict()
    is_float = all(prefix + key in state_dict for key in own.keys() - record.added)
    if not record.added or not is_float or any(prefix + key in state_dict for key in record.added):
        return
    for key in record.added:
        state_dict[prefix + key] = own[key]
    for name, module in model.named_modules(remove_duplicate=False):
        keys = {key: f"{name}.{key}" for key in module.state_dict()}
        if isinstance(module, BinaryConv2d):
            fresh = copy.deepcopy(module)
            weight: Tensor = state_dict[prefix + keys["weight"]]
            if weight.shape != fresh.weight.shape:
                continue
            with torch.no_grad():
                fresh.weight.copy_(weight)
            fresh.adopt(record.scheme.latent_std)
            state_dict[prefix + keys["weight"]] = fresh.weight.detach()
        elif hasattr(module, "reset_parameters"):
            fresh = copy.deepcopy(module)
            fresh.reset_parameters()
        else:
            continue
        state_dict.update({prefix + keys[k]: v for k, v in fresh.state_dict().items() if keys[k] in record.added})
    for name, module in model.named_modules(remove_duplicate=False):
        key = f"{prefix}{name}.weight"
        if isinstance(module, NORMS) and key in state_dict and not state_dict[key].any():
            state_dict[key] = torch.ones_like(state_dict[key])
