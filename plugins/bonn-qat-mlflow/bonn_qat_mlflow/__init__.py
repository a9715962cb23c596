"""Tracks the runs of bonn-qat in MLflow, which installing it is enough for; and logs packed networks as models."""

from bonn_qat_mlflow.models import log_model, save_model

__all__ = ["log_model", "save_model"]
