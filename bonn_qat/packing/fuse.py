"""Fusion: what follows a binary convolution in a graph becomes its epilogue, and a sign after that its output.

Every step computes what the operators computed before it, in the same order and with the same roundings.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bonn_qat.packing.thresholds import find_thresholds
from bonn_qat.runtime import epilogue
from bonn_qat.runtime.layout import Geometry, decode_weight, encode_weight
from bonn_qat.runtime.operators import can_follow

aten, ours = torch.ops.aten, torch.ops.bonn_qat
_SAME = (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)
_NORM = aten.batch_norm.default


class Network:
    """A graph with its tensors, while it is made smaller; ``weights`` names the tensors that are bits."""

    def __init__(self, graph: fx.Graph, tensors: dict[str, Tensor], weights: dict[str, Geometry]) -> None:
        self.graph, self.tensors, self.weights = graph, tensors, weights

    def constant(self, value: Any) -> Tensor | None:
        """The tensor that a node is, None for one that depends on the input."""
        return self.tensors[str(value.target)] if isinstance(value, fx.Node) and value.op == "get_attr" else None

    def add(self, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
        """A node for a new tensor."""
        while name in self.tensors:
            name += "_"
        self.tensors[name] = tensor
        with self.graph.inserting_before(before):
            return self.graph.create_node("get_attr", name)

    def hoist_tensors(self) -> None:
        """Bring the nodes of tensors to the beginning."""
        (first,) = self.graph.find_nodes(op="placeholder")
        for node in self.graph.find_nodes(op="get_attr"):
            first.prepend(node)

    def drop_unused(self) -> None:
        """Take out nodes and tensors that nothing needs."""
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        used = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}


def fuse(network: Network) -> None:
    """Make ``network`` smaller, in place."""
    network.drop_unused()  # what is dead counts as a user
    _fold_constants(network)
    for node in list(network.graph.find_nodes(op="call_function", target=ours.binary_conv2d.default)):
        _absorb_all(network, node)
    for node in list(network.graph.find_nodes(op="call_function", target=ours.sign_codes.default)):
        _absorb_norm(network, node)
    seen: set[fx.Node] = set()
    while norms := [node for node in network.graph.find_nodes(op="call_function", target=_NORM) if node not in seen]:
        seen.add(norms[0])
        new = _elementwise(network, norms[0])
        if new is not None:
            _absorb_all(network, new)  # which may take norms, too
    for node in list(network.graph.find_nodes(op="call_function", target=aten.max_pool2d.default)):
        _pool_first(network, node)
    _pool_planes(network)
    network.hoist_tensors()  # thresholds may stand below the convolution that is to have them
    for node in list(network.graph.find_nodes(op="call_function", target=ours.binary_conv2d.default)):
        _join_sign(network, node)
    network.drop_unused()


@torch.no_grad()
def _fold_constants(network: Network) -> None:
    for node in list(network.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _SAME and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
            continue
        if node.target is aten.sign.default and (signs := _signs_again(node)) is not None:
            node.replace_all_uses_with(signs)
            network.graph.erase_node(node)
            continue
        inputs = node.all_input_nodes
        is_bits = node.target is ours.unpack_signs.default  # stay bits
        if is_bits or not inputs or any(network.constant(x) is None for x in inputs):
            continue
        args, kwargs = (fx.map_arg(part, network.constant) for part in (node.args, node.kwargs))
        result = node.target(*args, **kwargs)
        if isinstance(result, Tensor):
            new = network.add(node.name, result.contiguous(), node)
            node.replace_all_uses_with(new)
            network.graph.erase_node(node)


def _signs_again(node: fx.Node) -> fx.Node | None:
    """The signs of which ``node`` is ``sign(sign(x) + 1/2)``, :func:`bonn_qat.functional.sign` anew."""
    shifted = node.args[0]
    if not isinstance(shifted, fx.Node) or shifted.target is not aten.add.Tensor or shifted.args[1] != 0.5:
        return None
    inner = shifted.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not aten.sign.default:
        return None
    source = inner.args[0]
    return source if isinstance(source, fx.Node) and source.target is ours.unpack_signs.default else None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _absorb_all(network: Network, node: fx.Node) -> None:
    while (following := _absorb(network, node)) is not None:
        node = following


def _absorb(network: Network, node: fx.Node) -> fx.Node | None:
    """Take the only user of a convolution, or of an epilogue of its own, into the epilogue; the new node, or None."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    match = _STEPS.get(user.target)
    step = match(network, node, user) if match else None
    if step is None:
        return None
    operation, rows, residual, replaced = step
    *inputs, program, vectors, before = node.args
    if residual is not None and before is not None:
        return None
    held = network.constant(vectors)
    assert held is not None
    assert isinstance(program, list | tuple)
    longer = vectors
    if rows:
        longer = network.add(f"{_name(node)}.epilogue", torch.cat([held, torch.stack(rows)]), replaced)
    args = (*inputs, [*program, operation, len(held) if rows else 0], longer, residual or before)
    new = _call(network, node.target, args, replaced)
    for old in dict.fromkeys((replaced, user, node)):
        network.graph.erase_node(old)
    return new


def _call(network: Network, function: Any, args: tuple[Any, ...], replaced: fx.Node) -> fx.Node:
    """A call in the place of a node."""
    with network.graph.inserting_before(replaced):
        new = network.graph.call_function(function, args)
    new.meta = {"val": replaced.meta["val"]}
    replaced.replace_all_uses_with(new)
    return new


def _elementwise(network: Network, norm: fx.Node) -> fx.Node | None:
    """An epilogue of its own in the place of a batch norm."""
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    if len(_shape(source)) != 4 or source.meta["val"].dtype != torch.float32:
        return None
    step = _match_norm(network, source, norm)
    if step is None:
        return None
    operation, rows, _, replaced = step
    vectors = network.add(f"{_name(norm)}.epilogue", torch.stack(rows), replaced)
    new = _call(network, ours.elementwise.default, (source, [operation, 0], vectors, None), replaced)
    network.graph.erase_node(norm)
    return new


def _name(node: fx.Node) -> str:
    """The layer that a node came from, by its tensors' names."""
    named = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    return str(named[0]).rpartition(".")[0] if named else node.name


_Step = tuple[int, list[Tensor], fx.Node | None, fx.Node]


def _per_channel(network: Network, node: fx.Node, value: Any) -> Tensor | None:
    """A number, or a tensor with one for each channel of ``node``, as ``(O,)``."""
    channels = _shape(node)[1]
    if isinstance(value, int | float):
        return torch.full((channels,), float(value))
    tensor = network.constant(value)
    if tensor is None or tensor.dtype != torch.float32:
        return None
    shape = [1] * (4 - tensor.ndim) + list(tensor.shape)
    if tensor.ndim > 4 or shape[0] != 1 or shape[2:] != [1, 1] or shape[1] not in (1, channels):
        return None
    return tensor.reshape(-1).expand(channels)


def _is_plain(user: fx.Node) -> bool:
    return len(user.args) == 2 and not user.kwargs and user.args[0] is not user.args[1]


def _match_mul(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
    other = user.args[1] if user.args[0] is node else user.args[0]
    row = _per_channel(network, node, other) if _is_plain(user) else None
    return None if row is None else (epilogue.SCALE, [row], None, user)


def _match_add(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
    if not _is_plain(user):
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    row = _per_channel(network, node, other)
    if row is not None:
        return epilogue.ADD, [row], None, user
    if not isinstance(other, fx.Node) or "val" not in other.meta:
        return None
    is_alike = _shape(other) == _shape(node) and other.meta["val"].dtype == torch.float32
    return (epilogue.RESIDUAL, [], other, user) if is_alike else None


def _match_sub(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
    row = _per_channel(network, node, user.args[1]) if _is_plain(user) and user.args[0] is node else None
    return None if row is None else (epilogue.ADD, [-row], None, user)


def _match_norm(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
    _, weight, bias, mean, variance = (network.constant(x) for x in user.args[:5])
    is_training, eps = cast(tuple[bool, float], (user.args[5], user.args[7]))
    if mean is None or variance is None or is_training or user.args[0] is not node:
        return None
    # The two numbers that torch's kernel multiplies with and adds, from the kernel itself.
    ones, zeros = torch.ones(1, len(mean), 1, 1), torch.zeros(1, len(mean), 1, 1)
    factor = F.batch_norm(ones, torch.zeros_like(mean), variance, weight, None, eps=eps).flatten()
    offset = F.batch_norm(zeros, mean, variance, weight, bias, eps=eps).flatten()
    return epilogue.FMA, [factor, offset], None, user


def _match_prelu(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
    slope = network.constant(user.args[1])
    if slope is None:
        return None
    return epilogue.PRELU, [slope.reshape(-1).expand(_shape(node)[1])], None, user


def _match_leaky(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
    slope = torch.full((_shape(node)[1],), float(user.args[1]) if len(user.args) > 1 else 0.01)  # type: ignore[arg-type]
    return epilogue.PRELU, [slope], None, user


def _clamp(low: float, high: float) -> Callable[[Network, fx.Node, fx.Node], _Step | None]:
    def match(network: Network, node: fx.Node, user: fx.Node) -> _Step | None:
        bounds = [*user.args[1:], *(low, high)[len(user.args) - 1 :]]
        if user.kwargs or not all(isinstance(bound, int | float) for bound in bounds):
            return None
        return epilogue.CLAMP, [torch.full((_shape(node)[1],), float(bound)) for bound in bounds], None, user  # type: ignore[arg-type]

    return match


_STEPS: dict[Any, Callable[[Network, fx.Node, fx.Node], _Step | None]] = {
    aten.mul.Tensor: _match_mul,
    aten.add.Tensor: _match_add,
    aten.sub.Tensor: _match_sub,
    _NORM: _match_norm,
    aten.prelu.default: _match_prelu,
    aten.leaky_relu.default: _match_leaky,
    aten.relu.default: _clamp(0.0, math.inf),
    aten.hardtanh.default: _clamp(-1.0, 1.0),
}


def _pool_first(network: Network, pool: fx.Node) -> None:
    """Take the maxima before what only rises, on a quarter of the pixels: of a float convolution, a norm and its PReLU.

    The maximum of rising values is the value of the maximum, to the last bit. Where a norm's factor is negative the
    convolution's filter is negated, and the factor with it.
    """
    norm = pool.args[0]
    if not isinstance(norm, fx.Node) or norm.target is not ours.elementwise.default or len(norm.users) != 1:
        return
    source, program, vectors, residual = norm.args
    rows = network.constant(vectors)
    if residual is not None or rows is None or not isinstance(source, fx.Node) or len(source.users) != 1:
        return
    steps = cast(list[int], program)
    if steps[:2] != [epilogue.FMA, 0] or not _rises(steps[2:], rows):
        return
    falling = rows[0] < 0
    if falling.any():
        if not _negate_filters(network, source, falling):
            return
        rows = rows.clone()
        rows[0] = rows[0].abs()
        vectors = network.add(f"{cast(fx.Node, vectors).target}", rows, norm)
    with network.graph.inserting_after(pool):
        new = network.graph.call_function(ours.elementwise.default, (pool, program, vectors, None))
    new.meta = {"val": pool.meta["val"]}
    pool.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    pool.args = (source, *pool.args[1:])
    network.graph.erase_node(norm)


def _pool_planes(network: Network) -> None:
    """Let a convolution of the images, and the maxima after it, have planes: torch is sooner done with them."""
    (images,) = network.graph.find_nodes(op="placeholder")
    readers = [node for node in images.users if node.target is not aten.sym_size.int]
    if len(readers) != 1 or readers[0].target is not aten.conv2d.default or len(readers[0].users) != 1:
        return
    (pool,) = readers[0].users
    if pool.target is not aten.max_pool2d.default or len(pool.args) > 4 or pool.kwargs:
        return
    kernel, stride, padding = (list(cast(list[int], part)) for part in (*pool.args[1:], [0, 0])[:3])
    if len(kernel) == len(stride) == len(padding) == 2:
        pool.target = ours.max_pool2d.default
        pool.args = (readers[0], kernel, stride, padding)


def _rises(steps: Sequence[int], rows: Tensor) -> bool:
    """Whether no step of an epilogue falls anywhere."""
    falling = (epilogue.SCALE, epilogue.FMA, epilogue.PRELU)
    pairs = zip(steps[::2], steps[1::2], strict=True)
    return all(bool((rows[row] >= 0).all()) for operation, row in pairs if operation in falling)


def _negate_filters(network: Network, convolution: fx.Node, which: Tensor) -> bool:
    """Negate filters of a float convolution, ``which`` bool ``(O,)``; false if others read them."""
    if convolution.target is not aten.conv2d.default:
        return False
    parts = [part for part in convolution.args[1:3] if part is not None]
    if any(network.constant(part) is None or len(cast(fx.Node, part).users) != 1 for part in parts):
        return False
    for part in parts:
        name = str(cast(fx.Node, part).target)
        held = network.tensors[name]
        network.tensors[name] = torch.where(which.reshape(-1, *[1] * (held.ndim - 1)), -held, held)
    return True


def _absorb_norm(network: Network, node: fx.Node) -> None:
    """Let the thresholds of a sign be those of the norm before it, too."""
    norm, thresholds, numbers = node.args
    if not isinstance(norm, fx.Node) or norm.target is not _NORM or len(norm.users) != 1 or norm.args[5]:
        return
    held = network.constant(thresholds)
    weight, bias, mean, variance = (network.constant(x) for x in norm.args[1:5])
    eps = cast(float, norm.args[7])
    users = list(node.users)
    if held is None or mean is None or variance is None or any(not _owns_weight(network, user) for user in users):
        return

    def above(x: Tensor) -> Tensor:
        return F.batch_norm(x[None, :, None, None], mean, variance, weight, bias, eps=eps).flatten() >= held

    found, flips = find_thresholds(above, len(held))
    if flips.any():
        for user in users:
            _flip(network, user, flips)
    new = network.add(f"{_name(users[0])}.thresholds", found, node)
    node.args = (norm.args[0], new, numbers)


def _owns_weight(network: Network, user: fx.Node) -> bool:
    return (
        user.target is ours.binary_conv2d.default and isinstance(user.args[1], fx.Node) and len(user.args[1].users) == 1
    )


def _flip(network: Network, convolution: fx.Node, flips: Tensor) -> None:
    """Negate the weights of the input channels whose signs are negated."""
    name = convolution.args[1].target  # type: ignore[union-attr]
    geometry = network.weights[name]  # type: ignore[index]
    bits = decode_weight(network.tensors[name], geometry)  # type: ignore[index]
    network.tensors[name] = encode_weight(bits ^ per_input(flips, geometry), geometry.groups)  # type: ignore[index]


def per_input(channels: Tensor, geometry: Geometry) -> Tensor:
    """``(C,)`` -> ``(O, C / groups, 1, 1)``: what each filter reads."""
    grouped = channels.reshape(geometry.groups, 1, -1).expand(-1, geometry.out_channels // geometry.groups, -1)
    return grouped.flatten(0, 1)[:, :, None, None]


def _join_sign(network: Network, node: fx.Node) -> None:
    """Let a convolution write the codes that a convolution after it reads."""
    own = Geometry.of(list(node.args[2]))  # type: ignore[arg-type]
    for user in node.users:
        if user.target is not ours.sign_codes.default or user.args[0] is not node:
            continue
        following = Geometry.of(list(user.args[2]))  # type: ignore[arg-type]
        if can_follow(own, following):
            break
    else:
        return
    args = (*node.args, user.args[1], following.numbers)
    is_alone = len(node.users) == 1
    target = ours.binary_conv2d_sign.default if is_alone else ours.binary_conv2d_and_sign.default
    with network.graph.inserting_after(node):
        new = values = codes = network.graph.call_function(target, args)
    if not is_alone:
        with network.graph.inserting_after(new):
            codes = network.graph.call_function(operator.getitem, (new, 1))
            values = network.graph.call_function(operator.getitem, (new, 0))
    user.replace_all_uses_with(codes)
    network.graph.erase_node(user)
    node.replace_all_uses_with(values)
    network.graph.erase_node(node)
