"""bench: what one network costs on this machine as float PyTorch, in onnxruntime, and packed.

``engines`` load a file and run it, ``arms`` make the files out of the networks, ``measure`` lets the arms take turns,
``startup`` starts processes of their own, and ``report`` is what was found.
"""

from bonn_qat.bench.arms import ARMS, Arm, ArmMissing, Launch, Networks
from bonn_qat.bench.measure import InvalidBenchmark, bench
from bonn_qat.bench.report import BenchReport, Latency, Startup
from bonn_qat.bench.startup import startup

__all__ = [
    "ARMS",
    "Arm",
    "ArmMissing",
    "BenchReport",
    "InvalidBenchmark",
    "Latency",
    "Launch",
    "Networks",
    "Startup",
    "bench",
    "startup",
]
