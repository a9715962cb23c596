"""Tracks the runs of bonn-qat in MLflow; installing it is all it takes."""
