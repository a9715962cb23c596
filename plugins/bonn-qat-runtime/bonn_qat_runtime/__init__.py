"""Runs packed networks of bonn-qat in C, with numpy alone: ``Network(path)(images)``."""

from bonn_qat_runtime.errors import (
    InvalidFile,
    InvalidPlan,
    InvalidThreads,
    LibraryMissing,
    RuntimeFailure,
    UnsupportedOperator,
)
from bonn_qat_runtime.files import Preprocessing
from bonn_qat_runtime.network import Network

__all__ = [
    "InvalidFile",
    "InvalidPlan",
    "InvalidThreads",
    "LibraryMissing",
    "Network",
    "Preprocessing",
    "RuntimeFailure",
    "UnsupportedOperator",
]
