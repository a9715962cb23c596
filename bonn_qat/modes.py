"""Training flags, set for a while and put back, module by module: a norm that a user froze stays frozen."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


def _never(module: nn.Module) -> bool:
    return False


@contextlib.contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool] = _never) -> Iterator[None]:
    """Within the block ``training`` says which modules of ``model`` are in training mode; none unless given."""
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training(module)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag
