"""Binarization: a float model becomes a binary one; which layers, why, and how."""
