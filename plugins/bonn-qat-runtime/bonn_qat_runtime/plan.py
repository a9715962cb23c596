"""Plan: a network as rows of numbers for the C library, with its constants; the fields are those of
``engine/bonn_qat_runtime.h``."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.errors import UnsupportedOperator
from bonn_qat_runtime.lower import Lowered
from bonn_qat_runtime.operations import (
    LANES,
    Arrange,
    Convolution,
    Floats,
    Map,
    Normalize,
    Offsets,
    Operation,
    Part,
    Pool,
    Product,
    Signs,
    up,
)
from bonn_qat_runtime.weights import bit_weight, depthwise_weight, float_weight, start_sums

COPY, POINTWISE, POOL, FLOAT, BINARY, RESULT, ARRANGE, DEPTHWISE, NORMALIZE, PRODUCT = range(1, 11)
FIELDS = (
    "operation", "x", "height", "width", "channels", "pitch", "out_height", "out_width", "outputs", "out_pitch",
    "y", "signs", "residual", "program", "steps", "vectors", "rows", "thresholds",
    "kernel_height", "kernel_width", "stride_y", "stride_x", "dilation_y", "dilation_x", "groups",
    "top", "bottom", "left", "right", "weight", "scratch", "windows", "is_mean",
    "turns", "band", "ring", "x_ring", "classes", "tables", "sums", "other", "residual_pitch", "axes", "run",
)  # fmt: skip
_ALIGNMENT = 64
_PLACES = ("x", "y", "signs", "residual", "program", "vectors", "thresholds", "weight", "scratch", "windows", "tables",
           "sums", "other")  # fmt: skip
_MOST_SUMS = 2**26
_MOST_TURNS = 7
_LARGE = 2**18  # bytes of a map that would not stay in the caches beside what is computed from it
_BAND = 96  # pixels that make whole tiles
_MOST_MERGED = 2**12  # indices of axes that are counted as one


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``rows`` ``(n, len(FIELDS))``, over ``constants``, bytes at a multiple of 64, and an arena of ``arena_bytes``.

    ``results`` are the shapes of the results for an image, such as ``(classes,)`` or ``(C, H, W)``, which lie one after
    the other; ``is_single``: there is one, and no tuple.
    """

    rows: NDArray[np.int64]
    constants: NDArray[np.uint8]
    arena_bytes: int
    inputs: int
    results: tuple[tuple[int, ...], ...]
    is_single: bool
    layout: int


@dataclass(eq=False)
class _Buffer:
    """Bytes of the arena that are needed from row ``first`` to row ``last``."""

    size: int
    first: int
    last: int
    place: int = -1


def aligned(size: int) -> NDArray[np.uint8]:
    """Zeros, at a multiple of 64."""
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]


def plan(lowered: Lowered, input_size: tuple[int, int, int], layout: int) -> Plan:
    """The plan of a network's operations, for an instruction set with this layout of binary weights."""
    planner = _Planner(layout)
    for operation in lowered.operations:
        planner.add(operation)
    begin = 0
    for result in lowered.results:
        planner.row(RESULT, planner.map_of(result.map), result.map, {"y": begin})
        begin += math.prod(result.shape)
    planner.take_turns()
    # A product reads whole vectors, which may reach beyond the last pixel.
    arena_bytes = _allocate(planner.buffers) + _ALIGNMENT
    rows = np.array([[_number(row[name]) for name in FIELDS] for row in planner.rows], np.int64)
    constants = aligned(sum(len(part) for part in planner.constants))
    np.concatenate(planner.constants, out=constants)
    return Plan(
        rows=rows, constants=constants, arena_bytes=arena_bytes, inputs=math.prod(input_size), layout=layout,
        results=tuple(result.shape for result in lowered.results), is_single=lowered.is_single,
    )  # fmt: skip


class _Planner:
    def __init__(self, layout: int) -> None:
        self.layout = layout
        self.rows: list[dict[str, Any]] = []
        self.buffers: list[_Buffer] = []
        self.constants = [np.zeros(_ALIGNMENT, np.uint8)]  # never none at all
        self.end = _ALIGNMENT
        self.maps: dict[Operation | None, _Buffer] = {}
        self.signs: dict[Signs, _Buffer] = {}
        self.lines: dict[int, NDArray[np.int32]] = {}  # of pools, by their row: the windows of their lines

    # Rows are numbered in the order in which they are added; a buffer lives until the last row that names it.

    def buffer(self, size: int) -> _Buffer:
        made = _Buffer(up(size, _ALIGNMENT), len(self.rows), len(self.rows))
        self.buffers.append(made)
        return made

    def constant(self, values: NDArray[Any]) -> int:
        octets = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        at = self.end
        self.constants += [octets, np.zeros(-len(octets) % _ALIGNMENT, np.uint8)]
        self.end += up(len(octets), _ALIGNMENT)
        return at

    def row(self, operation: int, x: _Buffer | None, size: Map, fields: dict[str, Any], pitch: int = 0) -> None:
        row = dict.fromkeys(FIELDS, 0) | dict.fromkeys(_PLACES, -1)
        row |= {"operation": operation, "height": size.height, "width": size.width, "channels": size.channels}
        row |= {"x": -1 if x is None else x, "pitch": pitch or up(size.channels, LANES)} | fields
        for value in row.values():
            if isinstance(value, _Buffer):
                value.last = len(self.rows)
        self.rows.append(row)

    def map_of(self, x: Map) -> _Buffer:
        """Where a map lies; the image is copied from what the caller gives."""
        if x.source not in self.maps:
            assert x.source is None
            y = self.maps[None] = self.buffer(_map_bytes(x, up(x.channels, LANES)))
            self.row(COPY, None, x, {"y": y, "out_pitch": up(x.channels, LANES)})
        return self.maps[x.source]

    def add(self, operation: Operation) -> None:
        """The row of an operation, and before it one that makes room for padding."""
        if isinstance(operation, Arrange):
            y = self.maps[operation] = self.buffer(_map_bytes(operation.result, operation.result.pitch))
            for part in operation.parts:
                self.arrange(part, y)
            return
        source = operation.x
        x = self.signs[source] if isinstance(source, Signs) else None
        beside = None if operation.residual is None else self.map_of(operation.residual)
        size, pitch = source.map if isinstance(source, Signs) else source, 0
        is_depthwise = isinstance(operation, Convolution) and operation.is_depthwise
        if isinstance(operation, Convolution) and not isinstance(source, Signs) and not is_depthwise:
            x, size, pitch = self.padded(operation, source)
        elif isinstance(source, Map):
            x = self.map_of(source)
        fields: dict[str, Any] = {"residual": -1 if beside is None else beside} | self.residual_pitch(operation)
        if isinstance(operation, Product):
            fields |= self.product(operation)
        fields |= self.finish(operation)
        if isinstance(operation, Product):
            self.row(PRODUCT, x, size, fields)
        elif isinstance(operation, Normalize):
            eps = -1 if operation.eps is None else self.constant(np.array([operation.eps], np.float32))
            self.row(NORMALIZE, x, size, fields | {"weight": eps})
        elif isinstance(operation, Pool):
            self.row(POOL, x, size, fields | self.pool(operation))
        elif not isinstance(operation, Convolution):
            self.row(POINTWISE, x, size, fields)
        elif isinstance(source, Signs):
            self.row(BINARY, x, size, fields | self.convolution(operation) | self.binary(operation, size))
        elif is_depthwise:
            fields |= {"weight": self.constant(depthwise_weight(operation.weight))}
            self.row(DEPTHWISE, x, size, fields | self.convolution(operation) | _sides(operation))
        else:
            fields |= {"weight": self.constant(float_weight(operation.weight, operation.groups))}
            self.row(FLOAT, x, size, fields | self.convolution(operation), pitch)

    def residual_pitch(self, operation: Operation) -> dict[str, int]:
        """0 for a residual of one pixel that is taken everywhere."""
        beside, y = operation.residual, operation.result
        return {"residual_pitch": 0 if beside is None or beside.pixels < y.pixels else y.pitch}

    def arrange(self, part: Part, y: _Buffer) -> None:
        """A row that moves runs of numbers, each from and to a place for each index along some axes."""
        axes, run = _merged(part)
        numbers = [np.concatenate(([len(own)], own, to)) for own, to in axes]
        fields = {"y": y, "windows": self.constant(np.concatenate(numbers).astype(np.int32)), "axes": len(axes)}
        if isinstance(part.source, Map):
            self.row(ARRANGE, self.map_of(part.source), part.source, fields | {"run": run})
        else:
            at = self.constant(part.source)
            self.row(ARRANGE, None, Map(1, 1, len(part.source)), fields | {"run": run, "weight": at}, 1)

    def product(self, product: Product) -> dict[str, Any]:
        numbers = (product.first, product.second, product.rows, product.depth, product.across)
        return {
            "other": self.map_of(product.other), "axes": len(product.depth),
            "windows": self.constant(np.concatenate(numbers).astype(np.int32)),
        }  # fmt: skip

    def padded(self, convolution: Convolution, source: Map) -> tuple[_Buffer, Map, int]:
        """The map with zeros around it. An image keeps its few channels, which a kernel then reads in one run."""
        top, bottom, left, right = convolution.padding
        if source.source is not None and not any(convolution.padding):
            return self.map_of(source), source, up(source.channels, LANES)
        size = Map(source.channels, source.height + top + bottom, source.width + left + right)
        pitch = source.channels if source.source is None else up(source.channels, LANES)
        x = None if source.source is None else self.map_of(source)
        y = self.buffer(_map_bytes(size, pitch))
        self.row(COPY, x, source, {"y": y, "out_pitch": pitch} | _sides(convolution))
        return y, size, pitch

    def finish(self, operation: Operation) -> dict[str, Any]:
        """The epilogue, and what is written."""
        y = operation.result
        pitch = up(y.channels, LANES)
        fields: dict[str, Any] = {"out_height": y.height, "out_width": y.width, "outputs": y.channels}
        fields["out_pitch"] = pitch
        program, vectors = [], list[Floats]()
        for step in operation.steps:
            program.append((step.code, len(vectors)))
            vectors += [_filled(row, pitch, 0) for row in step.rows]
        if program:
            fields |= {"program": self.constant(np.array(program, np.int64)), "steps": len(program)}
            fields |= {"vectors": self.constant(np.array(vectors, np.float32)), "rows": len(vectors)}
        if operation.signs is not None:
            low, high = operation.signs.thresholds
            # Channels beyond the last have no sign that differs from the weights' zeros.
            rows = np.stack((_filled(low, pitch, math.inf), _filled(high, pitch, -math.inf)))
            fields["thresholds"] = self.constant(rows)
            fields["signs"] = self.signs[operation.signs] = self.buffer(y.height * y.width * pitch // 8)
        if operation.wants_floats:
            fields["y"] = self.maps[operation] = self.buffer(_map_bytes(y, pitch))
        return fields

    def pool(self, pool: Pool) -> dict[str, Any]:
        windows = self.constant(np.concatenate((pool.rows, pool.columns)).astype(np.int32))
        self.lines[len(self.rows)] = pool.rows
        dilation_y, dilation_x = pool.dilation
        return {"windows": windows, "dilation_y": dilation_y, "dilation_x": dilation_x, "is_mean": int(pool.is_mean)}

    def convolution(self, convolution: Convolution) -> dict[str, Any]:
        names = ("kernel_height", "kernel_width", "stride_y", "stride_x", "dilation_y", "dilation_x")
        numbers = (*convolution.weight.shape[2:], *convolution.stride, *convolution.dilation)
        return dict(zip(names, numbers, strict=True)) | {"groups": convolution.groups}

    def binary(self, convolution: Convolution, x: Map) -> dict[str, Any]:
        top, bottom, left, right = convolution.padding
        kernel, outputs = convolution.weight.shape[2:], len(convolution.weight)
        kinds = [min(2 * taps, n) for taps, n in zip(kernel, convolution.result.shape[1:], strict=True)]
        if math.prod(kinds) * outputs > _MOST_SUMS:
            raise UnsupportedOperator(
                f"a binary convolution with a kernel of {kernel} and padding {convolution.padding} needs too many "
                "tables; use bonn_qat.PackedModel"
            )
        sums = start_sums(convolution, x.height, x.width)
        per_group = x.channels // convolution.groups
        bytes_of_group = up(per_group, 16) // 4 if self.layout else up(per_group, 32) // 8
        pixels = (x.height + top + bottom) * (x.width + left + right)
        return _sides(convolution) | {
            "weight": self.constant(bit_weight(convolution.weight, convolution.groups, self.layout)),
            "scratch": self.buffer(pixels * convolution.groups * bytes_of_group),
            "classes": len(sums.values), "tables": self.constant(sums.tables), "sums": self.constant(sums.values),
        }  # fmt: skip

    # Rows that take turns: each computes the lines of its map that the next one is about to read.

    def take_turns(self) -> None:
        """Let a row whose map is large and read by the next row alone take turns with it, and keep few of its lines."""
        begin = 0
        while begin < len(self.rows):
            end = begin
            while end - begin < _MOST_TURNS and self.feeds(end, end == begin):
                end += 1
            if end > begin:
                self.join(begin, end)
            begin = end + 1

    def feeds(self, k: int, is_first: bool) -> bool:
        """Whether the next row may take turns with row ``k``."""
        if k + 1 == len(self.rows):
            return False
        y, own, following = self.rows[k]["y"], self.rows[k]["operation"], self.rows[k + 1]
        if not isinstance(y, _Buffer) or y.size < _LARGE or y.last > k + 1 or following["x"] is not y:
            return False
        if following["residual"] is y or following["y"] is y:
            return False
        if own == COPY:
            return bool(following["operation"] == FLOAT)
        lines = [self.rows[k][name] for name in ("out_height", "out_width", "out_pitch")]
        if lines != [following[name] for name in ("height", "width", "pitch")]:  # it reads them as other lines
            return False
        makes = own in (FLOAT, DEPTHWISE, POOL, POINTWISE) or (own == BINARY and is_first)
        return bool(makes and following["operation"] in (DEPTHWISE, POOL))

    def join(self, begin: int, end: int) -> None:
        """Make rows ``begin`` to ``end`` take turns."""
        last, width = self.rows[end], max(1, self.rows[end - 1]["out_width"])
        lines = band = -(-_BAND // (width * max(1, last["stride_y"])))
        for k in range(end, begin, -1):
            lines = self.span(k, lines)
            if self.rows[k]["operation"] != FLOAT and lines < self.rows[k]["height"]:
                self.rows[k]["x_ring"] = self.rows[k - 1]["ring"] = lines
                y = self.rows[k - 1]["y"]
                y.size = up(y.size // self.rows[k]["height"] * lines, _ALIGNMENT)
        self.rows[begin] |= {"turns": end - begin, "band": band}
        for row in self.rows[begin : end + 1]:
            for buffer in row.values():
                if isinstance(buffer, _Buffer):
                    buffer.first, buffer.last = min(buffer.first, begin), max(buffer.last, end)

    def span(self, k: int, lines: int) -> int:
        """How many lines of its input row ``k`` reads for so many of its result."""
        row = self.rows[k]
        if k in self.lines:
            first, last = self.lines[k][:, 0], self.lines[k][:, 1]
            if lines >= len(first):
                return int(row["height"])
            return int((last[lines - 1 :] - first[: len(first) - lines + 1]).max())
        return int((lines - 1) * row["stride_y"] + (row["kernel_height"] - 1) * row["dilation_y"] + 1)


def _sides(convolution: Convolution) -> dict[str, Any]:
    return dict(zip(("top", "bottom", "left", "right"), convolution.padding, strict=True))


def _merged(part: Part) -> tuple[list[tuple[Offsets, Offsets]], int]:
    """Axes that lie alike in both become one, and the last one a run where its numbers are next to each other."""
    axes = list[tuple[Offsets, Offsets]]()
    for own, to in zip(part.x, part.y, strict=True):
        if len(own) == 1 and axes:
            axes[-1] = (axes[-1][0] + own[0], axes[-1][1] + to[0])
        else:
            axes.append((own, to))
    run, (own, to) = 1, axes[-1]
    if len(own) > 1 and bool((np.diff(own) == 1).all() and (np.diff(to) == 1).all()):
        run, axes[-1] = len(own), (own[:1], to[:1])
    while len(axes) > 1 and (len(axes[-1][0]) == 1 or len(axes[-2][0]) * len(axes[-1][0]) <= _MOST_MERGED):
        (own, to), (more, further) = axes[-2:]
        axes[-2:] = [((own[:, None] + more).reshape(-1), (to[:, None] + further).reshape(-1))]
    return axes, run


def _map_bytes(x: Map, pitch: int) -> int:
    return 4 * x.height * x.width * pitch


def _filled(row: Floats, pitch: int, rest: float) -> Floats:
    """A number for each channel, and ``rest`` up to the pitch."""
    filled = np.full(pitch, rest, np.float32)
    filled[: len(row)] = row
    return filled


def _number(value: Any) -> int:
    return value.place if isinstance(value, _Buffer) else int(value)


def _allocate(buffers: list[_Buffer]) -> int:
    """Give each buffer the first place that is free while it lives; the bytes of all."""
    active, most = list[_Buffer](), 0
    for buffer in sorted(buffers, key=lambda each: each.first):
        active = sorted((each for each in active if each.last >= buffer.first), key=lambda each: each.place)
        place = 0
        for other in active:
            if other.place - place >= buffer.size:
                break
            place = max(place, other.place + other.size)
        buffer.place = place
        active.append(buffer)
        most = max(most, place + buffer.size)
    return most
