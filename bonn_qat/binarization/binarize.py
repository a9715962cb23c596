"""binarize: a float model -> a binary one."""

import contextlib
import copy
import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pluggy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bonn_qat import plugins
from bonn_qat.binarization import policy
from bonn_qat.binarization.copies import copied, unwrapped
from bonn_qat.binarization.fast_paths import close_fast_paths
from bonn_qat.conv_types import MATRICES
from bonn_qat.engine.kept import lean
from bonn_qat.errors import InvalidModel, InvalidRecipe, check_model
from bonn_qat.inputs import Example, Inputs
from bonn_qat.layers import BINARY, BinaryLayer, check_contract, check_start, is_own
from bonn_qat.scheme import Scheme, WatchedScheme
from bonn_qat.tables import as_html, facts

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_SCALE = re.compile(r"gain|gamma|scale")
_NAMED = 3  # layers in a warning
_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")  # those that timm.utils.reparameterize_model calls


class BypassedLayers(UserWarning):
    """Layers that stay float because another module reads their weights directly."""


class MostlyFloat(UserWarning):
    """A network of which less than half of the MACs can become binary."""


class UnseenModel(UserWarning):
    """A model that no dry run could follow, so that names and classes decide which layers stay float."""


@dataclass(frozen=True, kw_only=True)
class Binarization:
    """What :func:`binarize` did; stored as ``model.binarization``.

    ``binary``: names of the binary layers. ``kept``: the float layers, each with the reason. ``schemes``: the binary
    layers with another scheme than ``scheme``. ``revived``: norms and gains that were all zero and are now one.
    ``input_size``: that of the policy's dry run, None without one; ``inputs``: the example of other inputs than images.
    ``added`` and ``removed``: the keys of the state dict that only the binary or only the float model has.
    ``skip`` and ``include`` are as given to :func:`binarize`.
    ``logits``: the layers that produce an output ``(B, classes)``, None without a dry run. ``channels``: how many each
    module of the float model without weights reads, where they are known.
    """

    scheme: Scheme
    binary: tuple[str, ...]
    kept: Mapping[str, str]
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    revived: tuple[str, ...] = ()
    input_size: tuple[int, ...] | None = None
    inputs: Inputs | None = field(default=None, compare=False, repr=False)
    added: frozenset[str] = field(default=frozenset(), repr=False)
    skip: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    removed: frozenset[str] = field(default=frozenset(), repr=False)
    logits: tuple[str, ...] | None = None
    channels: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)

    def _repr_html_(self) -> str:
        rows = {"scheme": self.scheme.title, f"binary ({len(self.binary)})": ", ".join(self.binary)}
        for name, scheme in self.schemes.items():
            rows[f"{name}: scheme"] = scheme.title
        for reason in dict.fromkeys(self.kept.values()):
            rows[f"float: {reason}"] = ", ".join(name for name, why in self.kept.items() if why == reason)
        return as_html(facts(rows.items()))


def binarize(
    model: nn.Module,
    scheme: str | Scheme = "bonn",
    *,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    predicate: policy.Predicate | None = None,
    schemes: Mapping[str, str | Scheme] | None = None,
    input_size: Sequence[int] | None = None,
    example_inputs: Example | None = None,
    inplace: bool = False,
    pm: pluggy.PluginManager | None = None,
) -> nn.Module:
    """Turn ``model`` into a 1-bit network by replacing modules; a copy unless ``inplace``.

    Convolutions and linear layers become binary, except those that :mod:`bonn_qat.binarization.policy` keeps float:
    layers that read the input or produce an output, shortcut projections, depthwise convolutions, gates. Three
    arguments overrule it:
    ``skip`` and ``include``, which are names of modules or globs, and ``predicate(name, layer) -> bool | None``.
    ``schemes`` maps names or globs to other schemes, of which the last match counts; a scheme with float weights keeps
    a layer float. ``input_size`` ``(C, H, W)`` is the size of the model's images; None finds it out. A model of tokens
    or of several inputs gets ``example_inputs`` instead: a batch of what it is called with, as a tensor, a tuple of
    tensors, or a dict of tensors by name.

    A norm before each sign and the scheme's nonlinearity in place of each ReLU keep the signs informative; the model's
    own norms stay where they are, but for blocks that give their own binary form, as the paper's networks do. Norms and
    gains that start at zero (timm's ``zero_init_last``, the NFNets' ``skipinit_gain``) start at one, because a zero
    there stops the gradient of every binary weight of the block. The result loads the float model's state dict
    strictly, as if it had been binarized after loading; of a part of one, each layer whose weight is there.
    ``model.binarization`` says what was done. Of a compiled or parallel model the result is the binarized original;
    wrap that. Warns of BypassedLayers, of a MostlyFloat network and of an UnseenModel.

    Raises UnknownName for an unknown scheme or a pattern without a match; InvalidRecipe for an option of
    :meth:`Scheme.configure` that has no effect on this model; PluginError for a faulty plugin; and InvalidModel if
    there is nothing to binarize, the model is binary already, a layer of ``include`` cannot be binary, the scheme
    does not fit a layer, the model refuses the size, or it cannot be copied (``inplace`` needs no copy). After an
    error the model is as before.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 28 * 28, 10))
    >>> binarize(net, input_size=(3, 32, 32)).binarization.binary
    ('2',)
    """
    _check_arguments(model, input_size)
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    model = unwrapped(model)
    chosen = plugins.find_scheme(scheme, pm)
    record = getattr(model, "binarization", None)
    if isinstance(record, Binarization) and record.binary:  # not a network of the scheme "float", which is as it was
        raise InvalidModel(f"{type(model).__name__} is already binarized ({record.scheme.name}); "
                           "binarize the float model instead")  # fmt: skip
    skip, include = (tuple([x] if isinstance(x, str) else x) for x in (skip, include))
    others = _Schemes(chosen, {p: plugins.find_scheme(s, pm) for p, s in (schemes or {}).items()}, model)
    decision = policy.decide(
        model, skip=skip, include=include, predicate=predicate, input_size=input_size, inputs=inputs
    )
    kept = decision.kept | {n: f"scheme {others.of(n).name!r}" for n in decision.binary if others.of(n).weight is None}
    if chosen.weight is None and not others.patterns:
        others.check_options(model)
        result = model if inplace else copied(model, ", or give inplace=True")
        result.binarization = Binarization(  # type: ignore[assignment]
            scheme=chosen, binary=(), kept=decision.kept, input_size=decision.input_size, skip=skip, include=include,
            logits=decision.logits, inputs=inputs,
        )  # fmt: skip
        return result
    if len(kept) == len(decision.kept) + len(decision.binary):
        reasons = ", ".join(f"{name} ({why})" for name, why in kept.items()) or "no module inside it has weights"
        raise InvalidModel(f"nothing to binarize in {type(model).__name__}: {reasons}")
    _warn(model, decision)

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the network must not depend on the check
        for used in {id(scheme): scheme for scheme in (others.of(name) for name in decision.binary)}.values():
            check_contract(used)
            check_start(used)
    before = set(model.state_dict())
    result = model if inplace else copied(model, ", or give inplace=True")
    names = {*kept, *policy.named(model, skip, "skip"), *_gates(model, kept)}
    originals = list(result.modules())
    # On the CPU, so that what is new has values, which a float state dict is completed with, also in a model on meta.
    with _as_before_after_an_error(result), torch.device("cpu"):
        _rewrite(result, others, {id(result.get_submodule(name)) for name in names}, decision.channels, pm)
    added = frozenset(set(result.state_dict()) - before)
    initial = _initial_values(result, added)
    _place_what_is_new(result, originals)
    lean(result)
    close_fast_paths(result, {id(module) for module in originals})
    layers = dict(binary_layers(result))
    result.binarization = Binarization(  # type: ignore[assignment]
        scheme=chosen,
        binary=tuple(layers),
        kept={name: kept[name] for name, _ in model.named_modules() if name in kept},
        schemes={name: others.of(name) for name in layers if others.of(name) is not chosen},
        revived=tuple(_revive_zero_scales(result, added)),
        input_size=decision.input_size,
        inputs=inputs,
        added=added,
        skip=skip,
        include=include,
        removed=frozenset(before - set(result.state_dict())),
        logits=decision.logits,
        channels=decision.channels,
    )
    for layer in layers.values():
        layer.any_layout = decision.any_layout and isinstance(layer, nn.Conv2d)
        layer.adopt()
    _refuse_folding(result)
    _take_float_states(result, initial)
    return result


def _check_arguments(model: nn.Module, input_size: object) -> None:
    check_model(model)
    if any(map(is_lazy, model.parameters())):
        raise InvalidModel(
            f"{type(model).__name__} has lazy layers without weights yet; call it once with a batch first"
        )
    check_size(input_size)


def check_size(size: object) -> None:
    """Raise InvalidModel unless ``size`` is None or the shape of one input: ``(C, H, W)``, ``(C, L)``, ``(features,)``.

    >>> check_size((3, 224, 224))
    """
    valid = isinstance(size, Sequence) and size and all(type(x) is int and x > 0 for x in size)
    if size is not None and not valid:
        raise InvalidModel(f"input_size is (C, H, W), such as (3, 224, 224); got {size!r}")


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """Names and binary layers of ``model``, each layer once."""
    check_model(model)
    for name, layer in model.named_modules():
        if isinstance(layer, BinaryLayer):
            yield name, layer


class _Schemes:
    """Which scheme a module has: the last of the patterns that name it or a parent, else the model's."""

    def __init__(self, chosen: Scheme, patterns: Mapping[str, Scheme], model: nn.Module) -> None:
        self.chosen, self.patterns = chosen, patterns
        self._named = [(set(policy.named(model, [p], "schemes")), s) for p, s in reversed(list(patterns.items()))]
        self._watched = {id(scheme): WatchedScheme.of(scheme) for scheme in (chosen, *patterns.values())}

    def of(self, name: str) -> Scheme:
        parents = [name, *(name[:i] for i, letter in enumerate(name) if letter == ".")]
        return next((s for names, s in self._named if not names.isdisjoint(parents)), self.chosen)

    def watched(self, name: str) -> Scheme:
        """The same scheme for code that uses it: the fields that it reads count as used."""
        scheme = self.of(name)
        return self._watched[id(scheme)] if scheme.given else scheme

    def check_options(self, model: nn.Module) -> None:
        for scheme in self._watched.values():
            for option in sorted(scheme.unused):
                raise InvalidRecipe(
                    f"the option {option!r} of the scheme {scheme.name!r} has no effect on {type(model).__name__}: "
                    f"{_EFFECTS.get(option, 'no layer is quantized by this scheme')}; leave it out"
                )


_EFFECTS = {
    "nonlinearity": "it has no ReLU, and no block that takes the scheme's nonlinearity",
    "norm": "no binary layer takes a norm of the scheme; its blocks have their own",
    "shortcut": "it has no block whose shortcut can be changed",
    "nonlinearity_position": "it has no block whose nonlinearity can be moved",
    "norm_position": "it has no block whose norms can be moved; its own norms stay where they are",
    "projection": "it has no block whose shortcut is a projection that the scheme makes",
}


def _rewrite(
    model: nn.Module, schemes: _Schemes, frozen: set[int], channels: Mapping[str, int], pm: pluggy.PluginManager | None
) -> None:
    # New modules are put in place at the end, so that an error leaves the model as it was. Each module is asked about
    # once, so that a layer used at two places stays shared (named_children would leave out its second place);
    # `done` keeps the replaced ones alive, because the id of a collected module may be reused.
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
                        new = plugins.binarize_layer(
                            pm, schemes.watched(name), name, child, parent, channels.get(name, 1)
                        )
                    except InvalidModel as error:
                        raise InvalidModel(f"{name}: {error}; skip={name!r} leaves it float") from error
                new = child if new is None else new
                done[id(child)] = done[id(new)] = (child, new)
                if not isinstance(new, BinaryLayer):
                    walk(new, name + ".")
            if done[id(child)][1] is not child:
                replaced.append((parent, child_name, done[id(child)][1]))

    walk(model, "")
    schemes.check_options(model)
    for parent, child_name, new in replaced:
        setattr(parent, child_name, new)


@contextlib.contextmanager
def _as_before_after_an_error(model: nn.Module) -> Iterator[None]:
    # A block that is replaced may hand over its parts, and change them, before a later one turns out not to fit.
    before = [
        (module, {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, attributes in before:
            vars(module).update(attributes)
        raise


def _stays_float(module: nn.Module, frozen: set[int]) -> bool:
    # A block whose layers are all kept must not be rebuilt as a binary one.
    layers = [id(m) for m in module.modules() if isinstance(m, MATRICES)]
    return bool(layers) and frozen.issuperset(layers)


def _gates(model: nn.Module, kept: Mapping[str, str]) -> Iterator[str]:
    """The modules that consist of gates or classifiers only, whose nonlinearities stay too."""
    for name, module in model.named_modules():
        layers = [f"{name}.{child}" for child, m in module.named_modules() if child and isinstance(m, MATRICES)]
        if layers and all(kept.get(layer) in (policy.GATE, policy.CLASSIFIER) for layer in layers):
            yield name


def _warn(model: nn.Module, decision: policy.Decision) -> None:
    if decision.bypassed:
        name, reader = next(iter(decision.bypassed.items()))
        more = f", and {len(decision.bypassed) - 1} more" if len(decision.bypassed) > 1 else ""
        words = f"{name} stays float because {reader or 'the model'} reads its weight directly{more}"
        warnings.warn(f"{words}; skip silences this", BypassedLayers, stacklevel=3)
    kind = type(model).__name__
    if decision.unseen:
        words = f"names and classes decide which layers of {kind} stay float, because {decision.unseen}"
        todo = "give input_size=(C, H, W) or example_inputs, or choose with skip and include"
        warnings.warn(f"{words}; {todo}", UnseenModel, stacklevel=3)
    _warn_of_floats(model, decision)


def _warn_of_floats(model: nn.Module, decision: policy.Decision) -> None:
    what, costs = "MACs", decision.macs
    if not costs:
        what, costs = "weights", {n: _weights(model.get_submodule(n)) for n in (*decision.binary, *decision.kept)}
    never = {n: costs[n] for n in decision.kept if n in costs and n not in decision.asked}
    total = sum(costs.values())
    if 2 * sum(never.values()) <= total:
        return
    largest = sorted(never, key=lambda name: -never[name])[:_NAMED]
    listed = ", ".join(f"{name} ({decision.kept[name]}, {never[name] / total:.1%})" for name in largest)
    warnings.warn(
        f"only {1 - sum(never.values()) / total:.1%} of the {what} of {type(model).__name__} can become binary; the "
        f"largest layers that stay float: {listed}",
        MostlyFloat,
        stacklevel=4,
    )


def _weights(layer: nn.Module) -> int:
    return sum(p.numel() for name, p in layer.named_parameters(recurse=False) if "weight" in name)


def _place_what_is_new(model: nn.Module, originals: list[nn.Module]) -> None:
    # The factories of a scheme know neither the device nor the dtype of the model.
    reference = next((p for module in originals for p in module.parameters() if p.is_floating_point()), None)
    known = {id(module) for module in originals}
    for module in model.modules():
        if reference is not None and not any(id(part) in known for part in module.modules()):
            module.to(device=reference.device, dtype=reference.dtype)


def _scales(model: nn.Module, added: Set[str]) -> Iterator[str]:
    """The keys of the parameters that scale a branch: the weights of norms, and gains by their names.

    Those gains are the float model's: what a scheme ``added`` starts as the scheme says, such as RPReLU's gamma at 0.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module._parameters.items():
            key = f"{name}.{own}" if name else own
            is_scale = own == "weight" if isinstance(module, NORMS) else _SCALE.search(own) and key not in added
            if is_scale and parameter is not None and parameter.is_floating_point():
                yield key


def _revive_zero_scales(model: nn.Module, added: Set[str]) -> Iterator[str]:
    parameters = dict(model.named_parameters())  # each once
    for key in _scales(model, added):
        parameter = parameters.get(key)
        if parameter is not None and not parameter.is_meta and not parameter.detach().any():
            nn.init.ones_(parameter)
            yield key.removesuffix(".weight")


def _refuse_folding(model: nn.Module) -> None:
    for module in model.modules():
        if any(isinstance(part, BinaryLayer) for part in module.modules()):
            for name in _FOLDS:
                method = getattr(module, name, None)
                # One that needs arguments, or is no method at all, does something else.
                if inspect.ismethod(method) and all(
                    parameter.default is not parameter.empty or parameter.kind in (2, 4)  # *args and **kwargs
                    for parameter in inspect.signature(method).parameters.values()
                ):
                    setattr(module, name, functools.partial(_refuse, type(module).__name__, name))


def _refuse(kind: str, method: str, *_: object, **__: object) -> NoReturn:
    raise InvalidModel(
        f"{kind}.{method}() folds float weights and would change the function of binary ones; fold the float model "
        "before binarizing it: binarize(timm.utils.reparameterize_model(model))"
    )


def _initial_values(model: nn.Module, added: Set[str]) -> dict[str, Tensor]:
    """What binarization added outside of the binary layers, such as slopes of nonlinearities, as it starts."""
    layers = [f"{name}." for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, BinaryLayer)]
    return {
        key: tensor.detach().clone()
        for key, tensor in model.state_dict().items()
        if key in added and not key.startswith(tuple(layers)) and not tensor.is_meta
    }


def _take_float_states(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    """Register what completes the float state that ``model``, or a part of it with binary layers, is given."""
    record: Binarization = model.binarization  # type: ignore[assignment]
    for part in {name[:end] for name in record.binary for end in (0, *policy.ends(name))}:
        prefix = f"{part}." if part else ""
        added, removed = (
            {key[len(prefix) :] for key in keys if key.startswith(prefix)} for keys in (record.added, record.removed)
        )
        own = {key: initial[prefix + key] for key in added if prefix + key in initial}
        hook = functools.partial(_complete_float_state_dict, added, removed, own)
        model.get_submodule(part).register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def _complete_float_state_dict(
    added: Set[str], removed: Set[str], initial: Mapping[str, Tensor],
    model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any],
    _strict: bool, _missing: list[str], _unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before loading: turn the state of a float model, or of a part of one, into that of the binarized float model.

    A binary layer does the same for itself wherever it can tell; here the state dict of the whole tells for all.
    ``added`` and ``removed`` are the keys of ``model`` that binarization did.
    """
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, BinaryLayer)}
    marks = {f"{prefix}{name}.{BINARY}": True for name in layers}
    if not marks.keys().isdisjoint(state_dict):
        return  # a module around it has told
    own = model.state_dict()
    given = {key for key, tensor in own.items() if not is_own(state_dict.get(prefix + key), tensor)}
    loaded = {name: m for name, m in layers.items() if m.given_float(state_dict, f"{prefix}{name}.") is not False}
    state_dict.update(marks)
    if not given.isdisjoint(added) or not loaded or not added:
        return
    for key in removed:
        state_dict.pop(prefix + key, None)
    assign = metadata.get("assign_to_params_buffers", False)
    for name, layer in loaded.items():
        layer.complete(state_dict, f"{prefix}{name}.", assign=assign, errors=errors)
    expected = own.keys() - added
    for key, value in initial.items():
        if _is_part_given(key, given, expected):
            like = state_dict[f"{prefix}{next(iter(loaded))}.weight"] if assign else own[key]
            state_dict[prefix + key] = value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    for key in (prefix + scale for scale in _scales(model, added)):
        scale = state_dict.get(key)
        if scale is not None and not scale.is_meta and not scale.any():
            state_dict[key] = torch.ones_like(scale)


def _is_part_given(key: str, given: set[str], expected: set[str]) -> bool:
    """Whether the state dict has the block that ``key`` belongs to: the closest parent that has state of its own."""
    parent = key
    while parent:
        parent = parent.rpartition(".")[0]
        inside = [other for other in expected if not parent or other.startswith(parent + ".")]
        if inside:
            return not given.isdisjoint(inside)
    return True
