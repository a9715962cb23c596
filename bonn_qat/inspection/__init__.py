"""Inspection: what a binary network costs, and whether its signs carry information."""
