"""Fuse: rewrites of a packed network's graph, so that only bits are written between two binary convolutions.

Every rewrite computes what the operators before it computed, in the same order and with the same roundings.
``REWRITES`` are applied one after the other; the equation of each is in its docstring, with y for a map
``(B, C, H, W)`` of floats and rows ``(C,)`` that broadcast over it.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bonn_qat.packing.epilogues import STEPS, batch_norm, value_of
from bonn_qat.packing.network import Network
from bonn_qat.packing.thresholds import find_thresholds
from bonn_qat.runtime import epilogue
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.operators import can_follow

aten, ours = torch.ops.aten, torch.ops.bonn_qat
_NORM = aten.batch_norm.default


def fuse(network: Network) -> None:
    """Apply all rewrites to ``network``, in place."""
    for rewrite in REWRITES:
        rewrite(network)
    network.drop_unused()


def absorb_into_convolutions(network: Network) -> None:
    """``prelu(norm(scale * conv) + shortcut)``, and other such steps -> the epilogue of the convolution."""
    for convolution in network.calls(ours.binary_conv2d.default):
        _absorb_users(network, convolution)


def norms_into_thresholds(network: Network) -> None:
    """``low <= norm(y) <= high`` -> ``low' <= y <= high'``, for finite and infinite y; a NaN is in no interval.

    low' and high' are the least and the largest float32 whose norms are between low and high, so that they round as the
    norm does.
    """
    for sign in network.calls(ours.sign_codes.default):
        norm, thresholds, numbers = sign.args
        if not isinstance(norm, fx.Node) or norm.target is not _NORM or len(norm.users) != 1 or norm.args[5]:
            continue
        within = _within(network, norm, network.constant(thresholds))
        if within is None:
            continue
        name = _layer_name(next(iter(sign.users), sign))
        sign.args = (norm.args[0], network.add(f"{name}.thresholds", within, sign), numbers)


def norms_into_elementwise(network: Network) -> None:
    """``prelu(norm(y))``, and other steps that begin with a norm -> one pass, an epilogue without a convolution."""
    seen: set[fx.Node] = set()
    while norms := [node for node in network.calls(_NORM) if node not in seen]:
        norm = norms[0]  # what it becomes may take later norms
        seen.add(norm)
        source = cast(fx.Node, norm.args[0])
        shape, dtype = value_of(source)
        step = batch_norm(network, source, norm) if len(shape) == 4 and dtype == torch.float32 else None
        if step is not None:
            vectors = network.add(f"{_layer_name(norm)}.epilogue", torch.stack(step.rows), norm)
            new = network.substitute(norm, ours.elementwise.default, source, [step.operation, 0], vectors, None)
            network.graph.erase_node(norm)
            _absorb_users(network, new)


def pool_before_elementwise(network: Network) -> None:
    """``max_pool(f(y)) -> f(max_pool(y))`` for an f that nowhere falls, to the last bit, on a quarter of the pixels.

    ``f(y) = prelu(a * y + b)`` with a < 0 rises once the filters of the float convolution before it are negated.
    """
    for pool in network.calls(aten.max_pool2d.default):
        f = pool.args[0]
        if not isinstance(f, fx.Node) or f.target is not ours.elementwise.default or len(f.users) != 1:
            continue
        source, program, vectors, residual = f.args
        rows, steps = network.constant(vectors), cast(list[int], program)
        if residual is not None or rows is None or not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        if steps[:2] != [epilogue.FMA, 0] or not rows[0].all() or not _rises(steps[2:], rows):
            continue
        falling = rows[0] < 0
        if falling.any():
            if not _negate_filters(network, source, falling):
                continue
            rows = torch.cat([rows[:1].abs(), rows[1:]])
            vectors = network.add(str(cast(fx.Node, vectors).target), rows, f)
        with network.graph.inserting_after(pool):
            new = network.graph.call_function(ours.elementwise.default, (pool, program, vectors, None))
        new.meta = dict(pool.meta)
        pool.replace_all_uses_with(new)  # also in `new` itself
        new.args, pool.args = (pool, *new.args[1:]), (source, *pool.args[1:])
        network.graph.erase_node(f)


def stem_in_planes(network: Network) -> None:
    """``max_pool(conv(images))`` -> the same of images in ``torch.contiguous_format``, which torch computes sooner."""
    images, *others = network.graph.find_nodes(op="placeholder")
    readers = [node for node in images.users if node.target is not aten.sym_size.int and not others]
    if len(readers) != 1 or readers[0].target is not aten.conv2d.default or len(readers[0].users) != 1:
        return
    (pool,) = readers[0].users
    if pool.target is not aten.max_pool2d.default or len(pool.args) > 4 or pool.kwargs:
        return
    kernel, stride, padding = (list(cast(list[int], part)) for part in (*pool.args[1:], [0, 0])[:3])
    if len(kernel) == len(stride) == len(padding) == 2:
        pool.target, pool.args = ours.max_pool2d.default, (readers[0], kernel, stride, padding)


def signs_into_convolutions(network: Network) -> None:
    """``sign(conv(...) - t)`` -> the convolution writes the codes of its signs; the floats only if others read them."""
    network.tensors_first()  # thresholds may stand below the convolution that takes them
    for convolution in network.calls(ours.binary_conv2d.default):
        own = _geometry(convolution.args[2])
        signs = [user for user in convolution.users if user.target is ours.sign_codes.default]
        sign = next((sign for sign in signs if can_follow(own, _geometry(sign.args[2]))), None)
        if sign is None:
            continue
        args = (*convolution.args, sign.args[1], _geometry(sign.args[2]).numbers)
        graph, is_alone = network.graph, len(convolution.users) == 1
        with graph.inserting_before(convolution):
            if is_alone:
                values = codes = graph.call_function(ours.binary_conv2d_sign.default, args)
            else:
                both = graph.call_function(ours.binary_conv2d_and_sign.default, args)
                values, codes = (graph.call_function(operator.getitem, (both, place)) for place in (0, 1))
        network.remove(sign, codes)
        network.remove(convolution, values)


REWRITES: Sequence[Callable[[Network], None]] = (
    absorb_into_convolutions,
    norms_into_thresholds,
    norms_into_elementwise,
    pool_before_elementwise,
    stem_in_planes,
    signs_into_convolutions,
)


def _absorb_users(network: Network, node: fx.Node) -> None:
    """Take into the epilogue of ``node`` the operators after it, each the only one that reads the one before."""
    while len(node.users) == 1:
        (user,) = node.users
        step = STEPS[user.target](network, node, user) if user.target in STEPS else None
        *inputs, program, vectors, residual = node.args
        if step is None or (step.residual is not None and residual is not None):
            return
        first = 0
        if step.rows:
            rows = cast(Tensor, network.constant(vectors))
            first, rows = len(rows), torch.cat([rows, torch.stack(step.rows)])
            vectors = network.add(f"{_layer_name(node)}.epilogue", rows, user)
        program = [*cast(list[int], program), step.operation, first]
        new = network.substitute(user, node.target, *inputs, program, vectors, step.residual or residual)
        for old in (user, node):
            network.graph.erase_node(old)
        node = new


def _layer_name(node: fx.Node) -> str:
    """The layer that a node came from, by its tensors' names."""
    named = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    return str(named[0]).rpartition(".")[0] if named else node.name


def _geometry(numbers: Any) -> Geometry:
    return Geometry.of(list(numbers))


def _within(network: Network, norm: fx.Node, thresholds: Tensor | None) -> Tensor | None:
    """The thresholds ``(2, C)`` of x for those of ``norm(x)``; None where they depend on the images."""
    weight, bias, mean, variance = (network.constant(argument) for argument in norm.args[1:5])
    eps = cast(float, norm.args[7])
    if thresholds is None or mean is None or variance is None:
        return None
    low, high = thresholds

    def normed(x: Tensor) -> Tensor:
        return F.batch_norm(x[None, :, None, None], mean, variance, weight, bias, eps=eps).flatten()

    above, below = (find_thresholds(f, len(low)) for f in (lambda x: normed(x) >= low, lambda x: normed(x) <= high))
    return torch.stack((torch.maximum(above[0], below[0]), torch.minimum(above[1], below[1])))


def _rises(steps: Sequence[int], rows: Tensor) -> bool:
    """Whether every step of an epilogue rises, also at infinity: 0 * inf is NaN, which a maximum may not hide."""
    factors = (epilogue.SCALE, epilogue.FMA, epilogue.PRELU)
    pairs = zip(steps[::2], steps[1::2], strict=True)
    return all(bool((rows[row] > 0).all()) for operation, row in pairs if operation in factors)


def _negate_filters(network: Network, convolution: fx.Node, which: Tensor) -> bool:
    """Negate filters of a float convolution, ``which`` bool ``(O,)``; False if its weight has other readers."""
    if convolution.target is not aten.conv2d.default:
        return False
    parts = [part for part in convolution.args[1:3] if part is not None]
    if any(network.constant(part) is None or len(cast(fx.Node, part).users) != 1 for part in parts):
        return False
    for name in (str(cast(fx.Node, part).target) for part in parts):
        held = network.tensors[name]
        network.tensors[name] = torch.where(which.reshape(-1, *[1] * (held.ndim - 1)), -held, held)
    return True
