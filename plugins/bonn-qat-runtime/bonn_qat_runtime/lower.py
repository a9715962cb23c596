"""Lower: the nodes of a file become operations, in their order, for one image.

``LOWERINGS`` has a function for each operator of torch or bonn-qat. It is given the arguments, tensors and constants
among them, and returns the result. The number of images is 1 in each shape: they are computed one after another.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bonn_qat_runtime import constants, convolutions, elementwise, products, shapes
from bonn_qat_runtime.builder import Builder, Refused
from bonn_qat_runtime.errors import InvalidFile, UnsupportedOperator, shown
from bonn_qat_runtime.files import PackedFile, Tensor
from bonn_qat_runtime.operations import Map, Operation, Signs
from bonn_qat_runtime.views import View, image

_INSTEAD = "use bonn_qat.PackedModel, which runs every packed network"
_ON_NUMBERS = ("add", "sub", "mul", "floordiv", "mod", "neg")
LOWERINGS: Mapping[str, Callable[..., Any]] = {
    **convolutions.LOWERINGS, **elementwise.LOWERINGS, **products.LOWERINGS, **shapes.LOWERINGS,
}  # fmt: skip


class Result(NamedTuple):
    """A map as the network returns it: its channels, then its pixels, in ``shape``."""

    map: Map
    shape: tuple[int, ...]


class Lowered(NamedTuple):
    """The operations of a network and what it returns; ``is_single``: not a tuple."""

    operations: list[Operation]
    results: list[Result]
    is_single: bool


def lower(file: PackedFile) -> Lowered:
    """The operations of a network. Raises UnsupportedOperator for one that is not known, InvalidFile for nonsense."""
    builder = Builder(file)
    for node in file.nodes:
        op, name = node.get("op"), node.get("name")
        if not isinstance(op, str) or not isinstance(name, str) or name in builder.values:
            raise InvalidFile(f"the node {shown(name)} has no op or no name of its own")
        if op == "input":
            builder.values[name] = image(Map(*file.input_size))
        elif op == "tensor":
            builder.values[name] = _constant(file, node)
        elif op == "output":
            returned, *others = builder.decoded(_listed(node, "args"))
            given = returned if isinstance(returned, list) else [returned]
            if others or node is not file.nodes[-1] or not given:
                raise InvalidFile("the network's output is not its last node, or empty")
            results = [_result(builder, x) for x in given]
            return Lowered(builder.operations, results, given is not returned)
        else:
            builder.values[name] = _call(builder, op, node)
    raise InvalidFile("the network has no output")


def _result(builder: Builder, x: Any) -> Result:
    if not isinstance(x, View) or len(x.axes) < 2 or len(x.axes[0]) != 1:
        raise UnsupportedOperator(f"the network returns something else than a tensor for each image; {_INSTEAD}")
    return Result(builder.mapped(x), x.shape[1:])


def _listed(node: Mapping[str, Any], key: str) -> list[Any]:
    value = node.get(key)
    if not isinstance(value, list) or not value:
        raise InvalidFile(f"the node {shown(node.get('name'))} has no list of {key}")
    return value


def _constant(file: PackedFile, node: Mapping[str, Any]) -> Tensor:
    name = node.get("tensor")
    if not isinstance(name, str) or name not in file.tensors:
        raise InvalidFile(f"the tensor {shown(name)} is missing")
    return file.tensors[name]


def _call(builder: Builder, op: str, node: Mapping[str, Any]) -> Any:
    function, args, kwargs = LOWERINGS.get(op), builder.decoded(_listed(node, "args")), node.get("kwargs")
    try:
        if not isinstance(kwargs, dict):
            raise Refused(f"options {shown(kwargs)}")
        options = {key: builder.decoded(value) for key, value in kwargs.items()}
        if op.removeprefix("python.") in _ON_NUMBERS:
            return _number(op.removeprefix("python."), args)
        is_constant = not _is_active([*args, *options.values()])
        if is_constant and op in constants.FUNCTIONS:
            return constants.fold(op, args, options)
        if function is None:
            raise Refused("an operator that it lacks")
        if is_constant and isinstance(args[0], Tensor) and args[0].type == "float32":
            args[0] = builder.constant(args[0], args[0].array.shape)  # computed again for each image
        return function(builder, *args, **options)
    except (Refused, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = str(error) if isinstance(error, Refused) else "arguments that it does not take"
        raise UnsupportedOperator(
            f"bonn-qat-runtime cannot run the node {shown(node['name'])}, {op}: {reason}; {_INSTEAD}"
        ) from error


def _is_active(value: Any) -> bool:
    """Whether something in nested lists depends on the image."""
    if isinstance(value, list | tuple) and not isinstance(value, Tensor):
        return any(_is_active(item) for item in value)
    return isinstance(value, View | Signs)


def _number(name: str, args: list[Any]) -> int:
    if not all(type(number) is int and abs(number) < 2**48 for number in args):
        raise Refused("something else than whole numbers")
    found: int = getattr(operator, name)(*args)
    return found
