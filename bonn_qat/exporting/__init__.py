"""Exporting: a binary network becomes a file for another runtime."""
