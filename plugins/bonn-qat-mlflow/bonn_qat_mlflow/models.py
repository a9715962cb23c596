"""Packed networks as models of MLflow, which the runtime in C serves without torch."""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bonn_qat.errors import InvalidModel

if TYPE_CHECKING:
    from mlflow.models.model import ModelInfo

    from bonn_qat import PackedModel


def log_model(network: "PackedModel | str | Path", name: str = "model", **options: Any) -> "ModelInfo":
    """Log a packed network, or its file, to MLflow's active run as a ``python_function`` model.

    It takes numpy's float32 images ``(B, C, H, W)``, as the network does, and needs ``bonn-qat-runtime``, numpy and
    MLflow where it is loaded or served. ``options`` are those of ``mlflow.pyfunc.log_model``, such as
    ``registered_model_name``.

    >>> log_model(bonn_qat.pack(model), "net")  # doctest: +SKIP

    Raises InvalidModel for a network that the runtime in C does not run, and if it is not installed.
    """
    import mlflow

    with _described(network) as described, _without_example():
        return mlflow.pyfunc.log_model(name=name, **(described | options))


def save_model(network: "PackedModel | str | Path", path: str | Path, **options: Any) -> None:
    """Write the model of :func:`log_model` into a new folder; ``options`` are those of ``mlflow.pyfunc.save_model``.

    >>> save_model("net.safetensors", "served")  # doctest: +SKIP

    Raises InvalidModel as :func:`log_model` does.
    """
    import mlflow

    with _described(network) as described, _without_example():
        mlflow.pyfunc.save_model(path=str(path), **(described | options))


@contextmanager
def _described(network: "PackedModel | str | Path") -> Iterator[dict[str, Any]]:
    """Arguments for MLflow: the file, what loads it, what it takes and returns, and what that needs."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    try:
        from bonn_qat_runtime import Network, RuntimeFailure
        from bonn_qat_runtime.pyfunc import Model
    except ImportError as error:
        raise InvalidModel("a packed network is served by bonn-qat-runtime, which is not installed") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(network) if isinstance(network, str | Path) else network.save(Path(folder, "net.safetensors"))
        try:
            model = Model(Network(path))
        except RuntimeFailure as error:
            raise InvalidModel(f"bonn-qat-runtime cannot run this network: {error}") from error
        outputs = model.predict(np.zeros((1, *model.network.input_size), np.float32))
        made = outputs.items() if isinstance(outputs, dict) else [(None, outputs)]
        yield {
            "loader_module": "bonn_qat_runtime.pyfunc",
            "data_path": str(path),
            "pip_requirements": [f"bonn-qat-runtime=={importlib.metadata.version('bonn-qat-runtime')}"],
            "signature": ModelSignature(
                inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *model.network.input_size))]),
                outputs=Schema([TensorSpec(y.dtype, (-1, *y.shape[1:]), name) for name, y in made]),
            ),
        }


@contextmanager
def _without_example() -> Iterator[None]:
    """Without MLflow's advice to give an example of the input, which as JSON takes megabytes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
        yield
