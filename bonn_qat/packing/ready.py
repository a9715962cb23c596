"""Ready: a user's model as what packing and exporting take, a copy for inference without wrappers; quiet exports."""

import contextlib
import io
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from bonn_qat.binarization.copies import copied, unwrapped
from bonn_qat.errors import InvalidModel, first_line

_LONGEST = 200


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in float32, on the CPU, without gradients; compiled parts are as they were before.

    Raises InvalidModel for a model that cannot be copied, and for one without values, on the device meta.
    """
    held: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if empty := [name for name, tensor in held.items() if tensor.is_meta]:
        raise InvalidModel(
            f"{empty[0]} is on the device meta, so it has no values; load a checkpoint first, for example with "
            "load_state_dict(..., assign=True)"
        )
    ready = copied(unwrapped(model))
    for name, module in list(ready.named_modules(remove_duplicate=False)):
        if name and unwrapped(module) is not module:
            ready.set_submodule(name, unwrapped(module))
    return ready.cpu().float().eval().requires_grad_(False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, nothing is printed to ``sys.stderr`` by what fails: torch.export prints the whole graph."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


def reason(error: Exception) -> str:
    """The first line of an error, cut where torch writes formulas of thousands of characters."""
    line = first_line(error)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."
