"""binarize: model -> model."""

import copy
import functools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pluggy
import torch
from torch import Tensor, nn

from bonn_qat import plugins
from bonn_qat.binarization import policy
from bonn_qat.errors import InvalidModel
from bonn_qat.layers import BinaryLayer
from bonn_qat.scheme import Scheme

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_SCALE = re.compile(r"gain|gamma|scale")
_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")  # those that timm.utils.reparameterize_model calls


class BypassedLayers(UserWarning):
    """Layers that stay float because another module reads their weights, past the layer."""


@dataclass(frozen=True, kw_only=True)
class Binarization:
    """What :func:`binarize` did; stored as ``model.binarization``.

    ``binary`` names the binary layers, ``kept`` the float ones with the reason, ``schemes`` the binary layers with
    another scheme than ``scheme``, ``revived`` the norms and gains that were all zero and now are one, ``added`` the
    keys that the float model's state dict lacks. ``input_size`` is that of the policy's dry run, None without one.
    ``skip`` and ``include`` are as given to :func:`binarize`.
    """

    scheme: Scheme
    binary: tuple[str, ...]
    kept: Mapping[str, str]
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    revived: tuple[str, ...] = ()
    input_size: tuple[int, ...] | None = None
    added: frozenset[str] = field(default=frozenset(), repr=False)
    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()


def binarize(
    model: nn.Module,
    scheme: str | Scheme = "bonn",
    *,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    predicate: policy.Predicate | None = None,
    schemes: Mapping[str, str | Scheme] | None = None,
    input_size: Sequence[int] | None = None,
    inplace: bool = False,
    pm: pluggy.PluginManager | None = None,
) -> nn.Module:
    """Turn ``model`` into a 1-bit network by module replacement; a copy unless ``inplace``.

    Convolutions and linear layers become binary, but for those that :mod:`bonn_qat.binarization.policy` keeps float:
    the first layer, the classifier, shortcut projections, depthwise convolutions, gates. ``skip`` and ``include``,
    names of modules or globs, and ``predicate(name, layer) -> bool | None`` overrule it; ``schemes`` maps names or
    globs to other schemes, the last that matches counts, and a scheme with float weights keeps a layer float.
    ``input_size`` ``(C, H, W)`` is what the model is for, found out if None.

    A norm before each sign and the scheme's nonlinearity in place of each ReLU keep the signs informative. Norms and
    gains that start at zero (timm's ``zero_init_last``, the NFNets' ``skipinit_gain``) start at one, because a zero
    there stops the gradient of every binary weight of the block. The result loads the float model's state dict
    strictly, as if binarized after loading.
    ``model.binarization`` says what was done. Warns of BypassedLayers.

    Raises UnknownName (a scheme or a pattern) and InvalidModel: nothing to binarize, already binary, a layer that was
    asked for and cannot be, a scheme that does not fit a layer, a size that the model refuses. The model is as before.
    """
    chosen = plugins.find_scheme(scheme, pm)
    if isinstance(getattr(model, "binarization", None), Binarization):
        raise InvalidModel(f"{type(model).__name__} is already binarized ({model.binarization.scheme.name}); "  # type: ignore[union-attr]
                           "binarize the float model instead")  # fmt: skip
    skip, include = (tuple([x] if isinstance(x, str) else x) for x in (skip, include))
    others = _Schemes(chosen, {p: plugins.find_scheme(s, pm) for p, s in (schemes or {}).items()}, model)
    decision = policy.decide(model, skip=skip, include=include, predicate=predicate, input_size=input_size)
    kept = decision.kept | {n: f"scheme {others.of(n).name!r}" for n in decision.binary if others.of(n).weight is None}
    if chosen.weight is None and not others.patterns:
        result = model if inplace else copy.deepcopy(model)
        result.binarization = Binarization(  # type: ignore[assignment]
            scheme=chosen, binary=(), kept=decision.kept, input_size=decision.input_size, skip=skip, include=include
        )
        return result
    if len(kept) == len(decision.kept) + len(decision.binary):
        reasons = ", ".join(f"{name} ({why})" for name, why in kept.items()) or "no module inside it has weights"
        raise InvalidModel(f"nothing to binarize in {type(model).__name__}: {reasons}")
    _warn_of_bypassed(decision.bypassed)

    before = set(model.state_dict())
    result = model if inplace else copy.deepcopy(model)
    names = {*kept, *policy.named(model, skip, "skip"), *_gates(model, kept)}
    originals = list(result.modules())
    _rewrite(result, others, {id(result.get_submodule(name)) for name in names}, pm or plugins.manager())
    _place_what_is_new(result, originals)
    layers = dict(binary_layers(result))
    result.binarization = Binarization(  # type: ignore[assignment]
        scheme=chosen,
        binary=tuple(layers),
        kept={name: kept[name] for name, _ in model.named_modules() if name in kept},
        schemes={name: others.of(name) for name in layers if others.of(name) is not chosen},
        revived=tuple(_revive_zero_scales(result)),
        input_size=decision.input_size,
        added=frozenset(set(result.state_dict()) - before),
        skip=skip,
        include=include,
    )
    for name, layer in layers.items():
        layer.adopt(others.of(name).latent_std)
    _refuse_folding(result)
    result.register_load_state_dict_pre_hook(_complete_float_state_dict)  # type: ignore[no-untyped-call]
    return result


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """The binary layers of ``model`` with their names, each once."""
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLayer):
            yield name, layer


class _Schemes:
    """Which scheme a module has: the last of the patterns that name it or a parent, else the model's."""

    def __init__(self, chosen: Scheme, patterns: Mapping[str, Scheme], model: nn.Module) -> None:
        self.chosen, self.patterns = chosen, patterns
        self._named = [(set(policy.named(model, [p], "schemes")), s) for p, s in reversed(list(patterns.items()))]

    def of(self, name: str) -> Scheme:
        parents = [name, *(name[:i] for i, letter in enumerate(name) if letter == ".")]
        return next((s for names, s in self._named if not names.isdisjoint(parents)), self.chosen)


def _rewrite(model: nn.Module, schemes: _Schemes, frozen: set[int], pm: pluggy.PluginManager) -> None:
    # What is new is put in place at the end, so that an error leaves the model as it was. Each module is asked about
    # once, so that one that stands at two places stays shared (named_children would leave out its second place);
    # `done` keeps the replaced ones alive, for the id of a collected module may be given to a new one.
    done: dict[int, tuple[nn.Module, nn.Module]] = {}
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def walk(parent: nn.Module, prefix: str) -> None:
        for child_name, child in list(parent._modules.items()):
            if child is None or id(child) in frozen:
                continue
            name = prefix + child_name
            if id(child) not in done:
                scheme, new = schemes.of(name), None
                if scheme.weight is not None and not _stays_float(child, frozen):
                    try:
                        new = pm.hook.bonn_qat_binarize_layer(scheme=scheme, name=name, layer=child, parent=parent)
                    except InvalidModel as error:
                        raise InvalidModel(f"{name}: {error}; skip={name!r} leaves it float") from error
                new = child if new is None else new
                done[id(child)] = done[id(new)] = (child, new)
                if not isinstance(new, BinaryLayer):
                    walk(new, name + ".")
            if done[id(child)][1] is not child:
                replaced.append((parent, child_name, done[id(child)][1]))

    walk(model, "")
    for parent, child_name, new in replaced:
        setattr(parent, child_name, new)


def _stays_float(module: nn.Module, frozen: set[int]) -> bool:
    # A block whose layers are all kept must not be rebuilt as a binary one.
    layers = [id(m) for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return bool(layers) and frozen.issuperset(layers)


def _gates(model: nn.Module, kept: Mapping[str, str]) -> Iterator[str]:
    """The modules that are wholly gates or classifiers: their nonlinearities stay, too."""
    for name, module in model.named_modules():
        layers = [
            f"{name}.{child}" for child, m in module.named_modules() if child and isinstance(m, nn.Conv2d | nn.Linear)
        ]
        if layers and all(kept.get(layer) in (policy.GATE, policy.CLASSIFIER) for layer in layers):
            yield name


def _warn_of_bypassed(bypassed: Mapping[str, str]) -> None:
    if not bypassed:
        return
    name, reader = next(iter(bypassed.items()))
    more = f", and {len(bypassed) - 1} more" if len(bypassed) > 1 else ""
    warnings.warn(
        f"stays float: {name}, whose weight {reader or 'the model'} reads itself{more}; skip silences this",
        BypassedLayers,
        stacklevel=3,
    )


def _place_what_is_new(model: nn.Module, originals: list[nn.Module]) -> None:
    # A scheme makes its nonlinearities on the CPU in float32, wherever the model is.
    reference = next((p for module in originals for p in module.parameters() if p.is_floating_point()), None)
    known = {id(module) for module in originals}
    for module in model.modules():
        if reference is not None and not any(id(part) in known for part in module.modules()):
            module.to(device=reference.device, dtype=reference.dtype)


def _scales(model: nn.Module) -> Iterator[str]:
    """The keys of the parameters that branches are multiplied with: norms' weights, and gains by their name."""
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            is_scale = key == "weight" if isinstance(module, NORMS) else _SCALE.search(key)
            if is_scale and parameter is not None and parameter.is_floating_point():
                yield f"{name}.{key}" if name else key


def _revive_zero_scales(model: nn.Module) -> Iterator[str]:
    parameters = dict(model.named_parameters())  # each once
    for key in _scales(model):
        parameter = parameters.get(key)
        if parameter is not None and not parameter.is_meta and not parameter.detach().any():
            nn.init.ones_(parameter)
            yield key.removesuffix(".weight")


def _refuse_folding(model: nn.Module) -> None:
    for module in model.modules():
        if any(isinstance(part, BinaryLayer) for part in module.modules()):
            for method in _FOLDS:
                if callable(getattr(module, method, None)):
                    setattr(module, method, functools.partial(_refuse, type(module).__name__, method))


def _refuse(kind: str, method: str, *_: object, **__: object) -> NoReturn:
    raise InvalidModel(
        f"{kind}.{method}() folds float weights, and would make another function of binary ones; fold the float model "
        "before it is binarized: binarize(timm.utils.reparameterize_model(model))"
    )


def _complete_float_state_dict(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Before loading: turn a float model's state dict into that of ``binarize`` of that model."""
    record: Binarization = model.binarization  # type: ignore[assignment]
    own = model.state_dict()
    is_float = all(prefix + key in state_dict for key in own.keys() - record.added)
    if not record.added or not is_float or any(prefix + key in state_dict for key in record.added):
        return
    for key in record.added:
        state_dict[prefix + key] = own[key]
    first = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        keys = {key: f"{name}.{key}" for key in module.state_dict()}
        if isinstance(module, BinaryLayer):
            fresh = copy.deepcopy(module)
            weight: Tensor = state_dict[prefix + keys["weight"]]
            if weight.shape != fresh.weight.shape:
                continue
            with torch.no_grad():
                fresh.weight.copy_(weight)
            fresh.adopt(record.schemes.get(first[id(module)], record.scheme).latent_std)
            state_dict[prefix + keys["weight"]] = fresh.weight.detach()
        elif hasattr(module, "reset_parameters"):
            fresh = copy.deepcopy(module)
            fresh.reset_parameters()
        else:
            continue
        state_dict.update({prefix + keys[k]: v for k, v in fresh.state_dict().items() if keys[k] in record.added})
    for key in (prefix + scale for scale in _scales(model)):
        if key in state_dict and not state_dict[key].any():
            state_dict[key] = torch.ones_like(state_dict[key])
