"""Baselines for bonn-qat, one file for each scheme; they use only what every plugin can use."""
