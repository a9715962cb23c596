"""Fuse: operations that can be done in the same pass become one."""

from collections import Counter

from bonn_qat_runtime.lower import Lowered
from bonn_qat_runtime.operations import RESIDUAL, Map, Operation, Pointwise, Signs


class _Fused:
    def __init__(self, lowered: Lowered) -> None:
        self.operations = _used(lowered)
        self.results = [result.map for result in lowered.results]
        self.became: dict[Operation, Operation] = {}  # what a merged operation is part of
        # How often each result is read, as floats or by the signs of a convolution.
        self.readers = Counter(x.source for operation in self.operations for x in operation.reads)
        self.readers.update(x.source for x in self.results)

    def source(self, x: Map) -> Operation | None:
        found = x.source
        while found in self.became:
            found = self.became[found]
        return found

    def takes(self, x: Map | Signs | None, steps_of: Pointwise) -> Operation | None:
        """The operation that computes x, if it can do the steps as well."""
        source = self.source(x) if isinstance(x, Map) else None
        if source is None or not source.has_epilogue or self.readers[source] != 1:
            return None
        adds_twice = source.residual is not None and steps_of.residual is not None
        return None if adds_twice else source

    def merge(self, pointwise: Pointwise) -> None:
        source = self.takes(pointwise.x, pointwise)
        residual = pointwise.residual
        if source is None and residual is not None and [step.code for step in pointwise.steps] == [RESIDUAL]:
            assert isinstance(pointwise.x, Map)
            if residual.pixels == pointwise.x.pixels:
                source = self.takes(residual, pointwise)
            if source is not None:
                pointwise.x, pointwise.residual = residual, pointwise.x
        if source is None:
            return
        source.steps = source.steps + pointwise.steps
        source.residual = source.residual or pointwise.residual
        # At the later place: what is added may be computed between the two.
        self.operations.remove(source)
        self.operations[self.operations.index(pointwise)] = source
        self.became[pointwise] = source
        self.readers[source] = self.readers[pointwise]

    def redirect(self) -> None:
        """Let every map name the operation that computes it."""
        for x in [x for operation in self.operations for x in operation.reads] + self.results:
            x.source = self.source(x)

    def place_signs(self) -> None:
        """Signs are computed with their map; by an operation of their own if that has others."""
        for convolution in list(self.operations):
            signs = convolution.x
            if not isinstance(signs, Signs):
                continue
            source = signs.map.source
            if source is not None and source.has_epilogue and source.signs in (None, signs):
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
    read = {x.source for operation in fused.operations for x in _floats(operation)}
    read |= {x.source for x in fused.results}
    for operation in fused.operations:
        operation.wants_floats = operation in read
    return Lowered(fused.operations, lowered.results, lowered.is_single)


def _floats(operation: Operation) -> list[Map]:
    return operation.reads[1:] if isinstance(operation.x, Signs) else operation.reads


def _used(lowered: Lowered) -> list[Operation]:
    """Without operations whose results nothing reads."""
    used, wanted = list[Operation](), {result.map.source for result in lowered.results}
    for operation in reversed(lowered.operations):
        if operation in wanted:
            used.append(operation)
            wanted.update(x.source for x in operation.reads)
    return used[::-1]
