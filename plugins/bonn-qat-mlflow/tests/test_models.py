import subprocess
import sys

import bonn_qat_mlflow
import mlflow
import numpy as np
import pytest
import timm
import torch
from torch import nn

import bonn_qat
from bonn_qat.errors import InvalidModel

# MLflow's own, when it imports mlflow.pyfunc and reads a store.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Any type hint:UserWarning", "ignore:The ``noload`` loader strategy:DeprecationWarning"
)

# What a process without torch answers over HTTP, as "mlflow models serve" does.
SERVED = """
import sys
import mlflow, numpy as np
from fastapi.testclient import TestClient
from mlflow.pyfunc.scoring_server import init
model = mlflow.pyfunc.load_model("served")
images = np.load("images.npy")
with TestClient(init(model)) as client:
    answer = client.post("/invocations", json={"inputs": images.tolist()})
    refused = client.post("/invocations", json={"inputs": images[:, :1].tolist()})
assert refused.status_code == 400, refused
np.save("logits.npy", np.array(answer.json()["predictions"], np.float32))
assert "torch" not in sys.modules
"""


@pytest.fixture
def packed():
    model = timm.create_model("wrn10_16", num_classes=4)
    return bonn_qat.pack(bonn_qat.binarize(model, input_size=(3, 16, 16)).eval())


def test_a_packed_network_is_served_without_torch(packed, tmp_path):
    images = torch.randn(2, 3, 16, 16)
    np.save(tmp_path / "images.npy", images.numpy())
    bonn_qat_mlflow.save_model(packed, tmp_path / "served")
    subprocess.run([sys.executable, "-c", SERVED], cwd=tmp_path, check=True)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), packed(images).numpy())
    needs = (tmp_path / "served" / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in needs) == ["bonn-qat-runtime", "mlflow"]


def test_a_network_is_logged_to_the_active_run(packed, directory):
    mlflow.set_tracking_uri(f"sqlite:///{directory}/mlflow.db")
    try:
        place = mlflow.create_experiment("models", artifact_location=str(directory / "models"))
        with mlflow.start_run(experiment_id=place) as run:
            info = bonn_qat_mlflow.log_model(packed, "net", metadata={"top1": 12.5})
        images = torch.randn(2, 3, 16, 16)
        logits = mlflow.pyfunc.load_model(info.model_uri).predict(images.numpy())
    finally:
        mlflow.set_tracking_uri(None)
    assert np.array_equal(logits, packed(images).numpy())
    assert (info.run_id, info.metadata) == (run.info.run_id, {"top1": 12.5})


def test_several_outputs_have_names(tmp_path):
    class Two(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y, y.mean((2, 3))

    network = Two(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    packed = bonn_qat.pack(bonn_qat.binarize(network, include=["1"], input_size=(3, 8, 8)).eval())
    bonn_qat_mlflow.save_model(packed.save(tmp_path / "net"), tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    images = torch.randn(2, 3, 8, 8)
    for name, expected in zip("01", packed(images), strict=True):
        assert np.array_equal(model.predict(images.numpy())[name], expected.numpy())
    assert [output.name for output in model.metadata.signature.outputs] == ["0", "1"]


def test_what_the_runtime_cannot_run_is_refused(tmp_path, monkeypatch):
    (tmp_path / "net").write_bytes(b"no network")
    with pytest.raises(InvalidModel, match=r"bonn-qat-runtime cannot run this network: .*net"):
        bonn_qat_mlflow.save_model(tmp_path / "net", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "bonn_qat_runtime", None)
    with pytest.raises(InvalidModel, match="which is not installed"):
        bonn_qat_mlflow.save_model(tmp_path / "net", tmp_path / "model")
    assert not (tmp_path / "model").exists()
