import importlib.metadata
import os

import pytest
import torch

# Before any test imports them: no window system, no telemetry, no tracking server, no observer among the plugins.
os.environ["MPLBACKEND"] = "Agg"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
_installed = (entry.name for entry in importlib.metadata.entry_points(group="bonn_qat"))
os.environ["BONN_QAT_PLUGINS"] = ",".join(name for name in _installed if name.startswith("baselines."))
for variable in ("BONN_QAT_DATA", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
