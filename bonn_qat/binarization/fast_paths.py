"""Fast paths: torch's code that computes a block at once from the weights of its layers, without calling them."""

from collections.abc import Collection

from torch import nn


def close_fast_paths(model: nn.Module, known: Collection[int] = ()) -> None:
    """Make each nn.TransformerEncoderLayer with a module that is not ``known`` by its id call its layers, in place.

    Without gradients in evaluation mode it would call a kernel that takes float weights and knows no other activation
    than ReLU and GELU.

    >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> close_fast_paths(layer)
    >>> layer.activation_relu_or_gelu
    0
    """
    closed = set()
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(part) not in known for part in module.modules()):
            module.activation_relu_or_gelu = 0  # what torch sets for an activation that its kernel does not have
            closed.add(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not closed.isdisjoint(module.layers):
            module.use_nested_tensor = False  # nested tensors need the kernel
