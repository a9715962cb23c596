"""What MLflow loads for a packed network that ``bonn_qat_mlflow.log_model`` logged, without torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.network import Network


class Model:
    """A network with the interface of MLflow's ``python_function``."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def predict(self, images: NDArray[np.float32], params: Any = None) -> Any:
        """Images ``(B, C, H, W)`` -> logits ``(B, classes)``; several outputs are named "0", "1" and so on."""
        outputs = self.network(images)
        return {str(i): output for i, output in enumerate(outputs)} if isinstance(outputs, tuple) else outputs


def _load_pyfunc(path: str) -> Model:
    return Model(Network(path))
