"""Switch modules to training or evaluation mode for a block, then restore each module's own flag."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn


def _never(module: nn.Module) -> bool:
    return False


@contextlib.contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool] = _never) -> Iterator[None]:
    """Within the block, only modules for which ``training(module)`` is true are in training mode; by default none.

    Afterwards every module has its previous flag, so a norm that the user froze stays frozen.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    >>> with modes(model):
    ...     print(model[0].training, model[1].training)
    False False
    >>> print(model[0].training, model[1].training)
    True False
    """
    before = {module: module.training for module in model.modules()}
    for module in before:
        module.training = training(module)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag
