"""Fuse: operations that can be done in the same pass become one."""

from bonn_qat_runtime.lower import Lowered
from bonn_qat_runtime.operations import RESIDUAL, Convolution, Map, Operation, Pointwise, Signs


class _Fused:
    def __init__(self, lowered: Lowered) -> None:
        self.operations = _used(lowered)
        self.result = lowered.result
        self.became: dict[Operation, Operation] = {}  # what a merged operation is part of

    def source(self, x: Map) -> Operation | None:
        found = x.source
        while found in self.became:
            found = self.became[found]
        return found

    def readers(self, operation: Operation) -> int:
        """How often the result is read, as floats or by the signs of a convolution."""
        read = [reads for other in self.operations for reads in _reads(other)] + [self.result]
        return sum(self.source(x) is operation for x in read)

    def takes(self, x: Map | Signs | None, steps_of: Pointwise) -> Operation | None:
        """The operation that computes x, if it can do the steps as well."""
        source = self.source(x) if isinstance(x, Map) else None
        if source is None or (isinstance(source, Convolution) and source.is_ragged):
            return None
        adds_twice = source.residual is not None and steps_of.residual is not None
        return None if adds_twice or self.readers(source) != 1 else source

    def merge(self, pointwise: Pointwise) -> None:
        source = self.takes(pointwise.x, pointwise)
        if source is None and [step.code for step in pointwise.steps] == [RESIDUAL]:
            source = self.takes(pointwise.residual, pointwise)
            if source is not None:
                assert isinstance(pointwise.x, Map)
                pointwise.x, pointwise.residual = pointwise.residual or pointwise.x, pointwise.x
        if source is None:
            return
        source.steps = source.steps + pointwise.steps
        source.residual = source.residual or pointwise.residual
        # At the later place: what is added may be computed between the two.
        self.operations.remove(source)
        self.operations[self.operations.index(pointwise)] = source
        self.became[pointwise] = source

    def redirect(self) -> None:
        """Let every map name the operation that computes it."""
        for operation in self.operations:
            for x in _reads(operation):
                x.source = self.source(x)
        self.result.source = self.source(self.result)

    def place_signs(self) -> None:
        """Signs are computed with their map; by an operation of their own if that has others."""
        for convolution in list(self.operations):
            signs = convolution.x
            if not isinstance(signs, Signs):
                continue
            source = signs.map.source
            is_ragged = isinstance(source, Convolution) and source.is_ragged
            if source is not None and not is_ragged and source.signs in (None, signs):
                source.signs = signs
            elif not any(operation.signs is signs for operation in self.operations):
                alone = Pointwise(signs.map, signs=signs)
                alone.result = Map(*signs.map.shape, alone)
                self.operations.insert(self.operations.index(convolution), alone)


def fuse(lowered: Lowered) -> Lowered:
    """The operations that are left; they compute the same, step by step."""
    fused = _Fused(lowered)
    for operation in list(fused.operations):
        if isinstance(operation, Pointwise):
            fused.merge(operation)
    fused.redirect()
    fused.place_signs()
    floats = [x for operation in fused.operations for x in _floats(operation)]
    read = {x.source for x in [*floats, fused.result]}
    for operation in fused.operations:
        operation.wants_floats = operation in read
    return Lowered(fused.operations, fused.result)


def _floats(operation: Operation) -> list[Map]:
    x = [operation.x] if isinstance(operation.x, Map) else []
    return x if operation.residual is None else [*x, operation.residual]


def _reads(operation: Operation) -> list[Map]:
    x = operation.x.map if isinstance(operation.x, Signs) else operation.x
    return [x] if operation.residual is None else [x, operation.residual]


def _used(lowered: Lowered) -> list[Operation]:
    """Without operations whose results nothing reads."""
    used, wanted = list[Operation](), {lowered.result.source}
    for operation in reversed(lowered.operations):
        if operation in wanted:
            used.append(operation)
            wanted.update(x.source for x in _reads(operation))
    return used[::-1]
