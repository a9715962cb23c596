"""Policy: which layers of a model become binary, which stay float, and why. It changes nothing."""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bonn_qat.binarization.copies import CannotBeCopied
from bonn_qat.binarization.dry_run import BATCH, DryRun, Use, dry_run
from bonn_qat.conv_types import CONVOLUTIONS, conv_type
from bonn_qat.errors import InvalidModel, UnknownName, is_out_of_memory
from bonn_qat.files.plain import one_line
from bonn_qat.heads import metadata
from bonn_qat.inputs import Inputs

Predicate = Callable[[str, nn.Module], bool | None]

FIRST, READS, CLASSIFIER, OUTPUT = "first layer", "reads the input", "classifier", "produces an output"
SHORTCUT, DEPTHWISE, SINGLE, GATE = "shortcut projection", "depthwise", "single input channel", "gate"
NO_IMAGE, UNREACHED = "does not see the image", "not reached by a forward pass"
_SHORTCUT = re.compile(r"downsample|shortcut|skip|project|proj_conv|residual|identity|c1x1_w", re.IGNORECASE)
_GATE = re.compile(r"^SE$|^SE(Layer|Block)$|SEModule$|Excit|^Eca|ChannelAttn$|^GlobalContext$")
_SIDES = (224, 64, 32, 28, 96, 128, 256)
_LENGTHS = (16_000, 1024, 128)  # of signals
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """``binary``: names of the layers to binarize. ``kept``: the layers that stay float, each with the reason.

    ``bypassed``: the kept layers whose weight another module reads, layer -> module. ``input_size`` ``(C, H, W)``: that
    of the dry run, None if the model ran with no size; ``unseen`` then says why. ``macs``: those of each layer for one
    image. ``asked``: the kept layers that ``skip`` or ``predicate`` keeps. ``logits``: the layers that produce an
    output ``(B, classes)``, None without a dry run. ``channels``: those of what the other modules read, if known.
    ``any_layout``: whether the model is known to run where convolutions give their outputs in ``channels_last``.
    """

    binary: tuple[str, ...]
    kept: dict[str, str]
    bypassed: dict[str, str]
    input_size: tuple[int, ...] | None
    unseen: str | None
    macs: Mapping[str, int]
    asked: frozenset[str]
    logits: tuple[str, ...] | None
    channels: Mapping[str, int]
    any_layout: bool


def decide(
    model: nn.Module,
    *,
    skip: Iterable[str] = (),
    include: Iterable[str] = (),
    predicate: Predicate | None = None,
    input_size: Sequence[int] | None = None,
    inputs: Inputs | None = None,
) -> Decision:
    """Decide for every layer of ``model``. The first rule that applies decides.

    1. A layer that cannot be binary stays float: a class other than torch's convolutions, transposed ones and
       Linear and timm's variants of them, or a layer whose weight another module reads or shares.
    2. ``skip``: names of modules or globs, each with everything below it, stay float. Then ``predicate(name, layer)``:
       True makes a layer binary, False keeps it float, None leaves it to the rules. Then ``include``, written like
       ``skip``: binary.
    3. These layers stay float: those that read the input, with no other layer between; those that produce an output:
       it derives from no other layer, or no other layer learns through them, as in a sum of two heads or where the
       result is detached; the classifier of timm's metadata; 1x1 shortcut projections; depthwise convolutions; layers
       with one input channel; gates, as of squeeze-and-excite, which are layers on pooled features before other layers
       on unpooled ones; and layers that the image does not reach.

    A dry run with images of ``input_size`` ``(C, H, W)``, or with ``inputs``, finds out most of that. If both are None,
    usual sizes are tried; a model that takes none of them is decided by names and classes alone: the first convolution
    and the last linear layer stay float. Raises UnknownName for a pattern that matches no module, and InvalidModel for
    an ``input_size`` or ``inputs`` that the model refuses, or an ``include`` that names no layer that can be binary.

    >>> decide(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 60 * 60, 10))).kept
    {'0': 'first layer', '3': 'classifier'}
    """
    include = [include] if isinstance(include, str) else list(include)
    layers = {name: module for name, module in model.named_modules() if name and _has_matrix(module)}
    run, size, unseen = _observe(model, list(layers), input_size, inputs)
    impossible = _impossible(model, layers, run)
    kept = {n: r for n, r in named(model, skip, "skip").items() if n in layers}
    wanted = named(model, include, "include")
    _check_include(model, include, layers, impossible)
    soft = _rules(model, layers, run)
    for name, layer in layers.items():
        if name in impossible:
            kept.setdefault(name, impossible[name])
        elif name not in kept:
            opinion = predicate(name, layer) if predicate else None
            if opinion is False:
                kept[name] = "predicate"
            elif opinion is None and name not in wanted and name in soft:
                kept[name] = soft[name]
    readers = run.readers if run else {}
    ours = {*impossible.values(), *soft.values()}
    return Decision(
        binary=tuple(name for name in layers if name not in kept),
        kept={name: kept[name] for name in layers if name in kept},
        bypassed={name: reader for name, reader in readers.items() if kept.get(name) == impossible.get(name)},
        input_size=size,
        unseen=unseen,
        macs=run.macs if run else {},
        asked=frozenset(name for name, reason in kept.items() if reason not in ours),
        logits=tuple(n for n, use in run.uses.items() if n in run.outputs and _is_logits(use)) if run else None,
        channels=run.channels if run else {},
        any_layout=run is not None and run.any_layout,
    )


def float_layers(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, str]:
    """The layers of ``model`` that stay float, by name, each with the reason (see ``decide``)."""
    return decide(model, skip=skip).kept


def named(model: nn.Module, patterns: Iterable[str], argument: str) -> dict[str, str]:
    """The modules that match ``patterns``, themselves or by a parent, by name, each with the pattern.

    A module that occurs at several places goes by its first name. Raises UnknownName for a pattern that matches no
    module of the model.
    """
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    first = {id(module): name for name, module in reversed(modules)}
    found: dict[str, str] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        roots = set(fnmatch.filter((name for name, _ in modules), pattern))
        if not roots:
            raise UnknownName(f"module of {type(model).__name__} in {argument}", pattern, (name for name, _ in modules))
        for name, module in modules:
            if name in roots or any(name[:end] in roots for end in ends(name)):
                found.setdefault(first[id(module)], f"{argument} {pattern!r}")
    return found


def ends(name: str) -> Iterator[int]:
    """Where the names of a module's parents end in its own."""
    return (match.start() for match in re.finditer(r"\.", name))


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return True
    if isinstance(module, (*_NORMS, nn.PReLU)):
        return False
    return any(
        p is not None and "weight" in name and sum(side > 1 for side in p.shape) > 1
        for name, p in module._parameters.items()
    )


def _impossible(model: nn.Module, layers: dict[str, nn.Module], run: DryRun | None) -> dict[str, str]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    found = {}
    for name, layer in layers.items():
        try:
            conv_type(layer)
        except ValueError as error:
            found[name] = str(error)
            continue
        others = [owner for owner in owners[id(layer.weight)] if owner != name]
        if others:
            found[name] = f"shares its weight with {others[0]}"
        elif run and name in run.readers:
            found[name] = f"{run.readers[name] or 'the model'} reads its weight itself"
    return found


def _check_include(
    model: nn.Module, include: Iterable[str], layers: Collection[str], impossible: dict[str, str]
) -> None:
    for pattern in include:
        asked = [name for name in named(model, [pattern], "include") if name in layers]
        reasons = {name: impossible[name] for name in asked if name in impossible}
        if len(reasons) == len(asked):
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "there is no layer with weights"
            raise InvalidModel(f"include {pattern!r} names no layer that can be binary: {why}")


def _rules(model: nn.Module, layers: dict[str, nn.Module], run: DryRun | None) -> dict[str, str]:
    """Layers that stay float unless ``include`` or ``predicate`` makes them binary, with the reason."""
    found = _ends_by_name(model, layers) if run is None else _ends_by_flow(model, layers, run)
    gates = _gates(layers, run)
    for name, layer in layers.items():
        use = run.uses.get(name) if run else None
        if run and use is None and name not in run.readers:
            reason = UNREACHED
        elif use and not use.sees_image:
            reason = NO_IMAGE
        elif name in gates or _is_in_gate(model, name):
            reason = GATE
        elif isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels > 1:
            reason = DEPTHWISE
        elif 1 in (getattr(layer, "in_channels", None), getattr(layer, "in_features", None)):
            reason = SINGLE
        elif isinstance(layer, CONVOLUTIONS) and _is_shortcut(model, name, layer):
            reason = SHORTCUT
        else:
            continue
        found.setdefault(name, reason)
    return found


def _ends_by_flow(model: nn.Module, layers: dict[str, nn.Module], run: DryRun) -> dict[str, str]:
    found = {name: READS if use.reads_layers else FIRST for name, use in run.uses.items() if name in run.inputs}
    found |= {name: CLASSIFIER for name in _classifiers(model, layers) if name not in found}
    for name in run.uses:
        if name in run.outputs:
            found.setdefault(name, CLASSIFIER if run.outputs == {name} and _is_logits(run.uses[name]) else OUTPUT)
    return found


def _is_logits(use: Use) -> bool:
    return len(use.output) == 2 and use.output[0] == BATCH


def _ends_by_name(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    convolutions = [name for name, layer in layers.items() if isinstance(layer, CONVOLUTIONS)]
    linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    first = [name for name in metadata(model, "first_conv") if name in layers] or (convolutions or list(layers))[:1]
    knows = metadata(model, "classifier") or hasattr(model, "get_classifier") or hasattr(model, "feature_info")
    last = _classifiers(model, layers) if knows else linears[-1:]
    return dict.fromkeys(first, FIRST) | dict.fromkeys(last, CLASSIFIER)


def _classifiers(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    roots = metadata(model, "classifier")
    get: Callable[[], Any] | None = getattr(model, "get_classifier", None)
    heads = get() if get else ()
    inside = {id(m) for head in (heads if isinstance(heads, tuple | list) else (heads,))
              if isinstance(head, nn.Module) for m in head.modules()}  # fmt: skip
    return [n for n, m in layers.items() if id(m) in inside or any(n == r or n.startswith(r + ".") for r in roots)]


def _gates(layers: dict[str, nn.Module], run: DryRun | None) -> Collection[str]:
    if run is None:
        return ()
    pooled = {name for name, use in run.uses.items() if _is_pooled(layers[name], use.input)}
    last = max((use.order for name, use in run.uses.items() if name not in pooled), default=-1)
    return {name for name in pooled if run.uses[name].order < last}


def _is_pooled(layer: nn.Module, shape: torch.Size) -> bool:
    return len(shape) == 2 if isinstance(layer, nn.Linear) else all(side == 1 for side in shape[2:])


def _is_in_gate(model: nn.Module, name: str) -> bool:
    return any(_GATE.search(type(model.get_submodule(name[:end])).__name__) for end in ends(name))


def _is_shortcut(model: nn.Module, name: str, conv: nn.Module) -> bool:
    if set(conv.kernel_size) != {1}:  # type: ignore[arg-type]
        return False
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        if _SHORTCUT.search(part):
            # Some networks call a whole stage transition "downsample"; a shortcut has one or two convolutions.
            ancestor = model.get_submodule(".".join(parts[:depth]))
            return sum(isinstance(m, CONVOLUTIONS) for m in ancestor.modules()) <= 2
    return False


def _observe(
    model: nn.Module, layers: list[str], input_size: Sequence[int] | None, inputs: Inputs | None
) -> tuple[DryRun | None, tuple[int, ...] | None, str | None]:
    """The dry run, its size, and without one the reason."""
    if inputs is not None:
        input_size = inputs.size
    tried: list[tuple[int, ...]] = []
    error: Exception | None = None
    for size in dict.fromkeys(_sizes(model) if input_size is None else [tuple(input_size)]):
        try:
            return dry_run(model, layers, inputs or size), size, None
        except CannotBeCopied as refusal:
            return None, tuple(input_size) if input_size else None, one_line(refusal)
        except Exception as caught:  # a model may raise anything for a size that does not fit
            if is_out_of_memory(caught):
                raise
            tried.append(size)
            error = caught
    if input_size is None:
        given = ", ".join(map(str, tried[:3])) + (" and others" if len(tried) > 3 else "")
        return None, None, f"it takes no image of {given}: {one_line(error)}" if error else "no size is known to try"
    assert error is not None
    what = f"an image of {tuple(input_size)}" if inputs is None else f"the example_inputs {inputs}"
    todo = "give input_size=(C, H, W)" if inputs is None else "give what the model is called with"
    raise InvalidModel(f"{type(model).__name__} does not take {what}: {one_line(error)}; {todo}") from error


def _sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Sizes to try: those in the model's metadata, then usual ones of images, signals, videos, vectors and tokens."""
    config = getattr(model, "pretrained_cfg", None)
    known = config.get("input_size") if isinstance(config, dict) else None
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    fixed: Any = next((m.img_size for m in model.modules() if getattr(m, "img_size", None)), ())
    sides = [(fixed, fixed) if isinstance(fixed, int) else tuple(fixed), tuple(known[1:]) if known else ()]
    sides += [(side, side) for side in _SIDES]
    reads = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)), None)
    if not known and isinstance(reads, nn.Conv3d | nn.ConvTranspose3d):  # one may take an image as one without a batch
        yield from ((reads.in_channels, 16, side, side) for side in _SIDES)
    # The channels in the metadata are those of the pretrained weights, and the first convolution may not see the image
    # itself but its patches.
    for channels in (getattr(model, "in_chans", None), known[0] if known else None, first):
        yield from ((channels, *side) for side in sides if channels and side)
    if isinstance(reads, nn.Conv1d | nn.ConvTranspose1d):
        yield from ((reads.in_channels, length) for length in _LENGTHS)
        yield from ((length,) for length in _LENGTHS)
    elif isinstance(reads, nn.Linear):
        yield from ((reads.in_features,), (16, reads.in_features))
