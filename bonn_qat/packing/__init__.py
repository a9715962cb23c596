"""Packing: a trained binary network becomes bits."""
