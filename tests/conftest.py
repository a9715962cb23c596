import os

import pytest
import torch

# Before any test imports them: no window system, no telemetry, no tracking server, no observer among the plugins.
os.environ["MPLBACKEND"] = "Agg"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["BONN_QAT_PLUGINS"] = "baselines.float,baselines.xnor,baselines.bireal,baselines.pcnn"
for variable in ("BONN_QAT_DATA", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
