"""Trace: a model as a program of torch.export; its file, the format pt2; and what the writers of all formats share."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonn_qat.binarization.copies import copied
from bonn_qat.binarization.dry_run import tensors_in
from bonn_qat.errors import InvalidModel
from bonn_qat.inputs import Inputs
from bonn_qat.packing.compare import compare
from bonn_qat.packing.ready import quiet, reason


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors that a network returned, as a list."""
    return list(tensors_in(result))


def in_batches(run: Callable[[Inputs], list[Tensor]], inputs: Tensor | Inputs, batch: int | None) -> list[Tensor]:
    """The outputs of ``run`` on parts of ``batch`` samples, None for all at once, joined."""
    parts = [run(part) for part in Inputs.batch(inputs).split(batch or len(inputs))]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def trace(model: nn.Module, inputs: Inputs, batch: int | None = None) -> torch.export.ExportedProgram:
    """``model`` as a program for ``batch`` samples; None: for any number, or for one if the model's code fixes it.

    Raises InvalidModel for a model that torch cannot export, and for a program that computes something else.
    """
    given = inputs.drawn(batch or 2, seed=0)
    shapes = None if batch else inputs.dynamic_shapes(model, torch.export.Dim("batch"))
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(model, given.args, given.kwargs, dynamic_shapes=shapes)
    except Exception as error:  # whatever torch and a model's code raise
        if batch is None:
            return trace(model, inputs, 1)
        raise InvalidModel(f"torch.export cannot trace {type(model).__name__} for {inputs}: {reason(error)}") from error
    # Copies, because a call may change buffers, which the program shares with the model.
    module, most = copy.deepcopy(program.module()), None if program.range_constraints else batch or 1

    def run(*args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        return _run(module, most, Inputs(args=args, kwargs=kwargs))

    compare(copied(model), run, inputs, f"{type(model).__name__} cannot be exported")
    return program


def _run(module: nn.Module, batch: int | None, inputs: Tensor | Inputs) -> list[Tensor]:
    return in_batches(lambda part: outputs_of(part.call(module)), inputs, batch)


def write_pt2(model: nn.Module, inputs: Inputs) -> bytes:
    """The bytes of a ``torch.export`` program."""
    program = trace(model, inputs)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths, once for each node
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def run_pt2(path: Path, inputs: Tensor | Inputs) -> list[Tensor]:
    """The outputs of a ``torch.export`` program in a file."""
    program = torch.export.load(io.BytesIO(path.read_bytes()))  # given a path it demands a certain suffix
    with torch.no_grad():
        return _run(program.module(), None if program.range_constraints else 1, inputs)
