"""Benchmarks of one network on this machine: float PyTorch, onnxruntime, and packed.

``backends`` writes the networks to files, ``engines`` loads and runs a file, ``measure`` times the backends in turns,
``startup`` times fresh processes, and ``report`` holds the results.
"""

from bonn_qat.bench.backends import BACKENDS, Backend, BackendMissing, Launch, Networks
from bonn_qat.bench.measure import InvalidBenchmark, bench
from bonn_qat.bench.report import BenchReport, Latency, Startup
from bonn_qat.bench.startup import startup

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendMissing",
    "BenchReport",
    "InvalidBenchmark",
    "Latency",
    "Launch",
    "Networks",
    "Startup",
    "bench",
    "startup",
]
