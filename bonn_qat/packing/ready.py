"""Ready: a user's model as what packing and exporting take, a copy for inference without wrappers."""

import copy

from torch import Tensor, nn

from bonn_qat.errors import InvalidModel, first_line


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, which share its weights."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


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
    try:
        copied = unwrapped(copy.deepcopy(model))
    except Exception as error:  # whatever the model's own attributes raise
        raise InvalidModel(
            f"copy.deepcopy does not copy this {type(model).__name__}: {first_line(error)}"
        ) from error
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if name and unwrapped(module) is not module:
            copied.set_submodule(name, unwrapped(module))
    return copied.cpu().float().eval().requires_grad_(False)
