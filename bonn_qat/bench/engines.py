"""Engines load a network's file and run it. As a program: the new process that :func:`startup` measures.

The program is run as a file and not as a module, so that a process imports only what its engine needs.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Run = Callable[[], object]  # runs a network once on its images
Load = Callable[[Path, int, Sequence[int]], Run]  # from a file, threads, and the shape (B, C, H, W) of the images

FIRST_RESULT = "first result"  # the line that the process prints after its first result

# How long an idle thread of onnxruntime spins. The default of up to half a second would slow down the next backend; a
# millisecond is longer than the gap between two calls.
_SPIN_MICROSECONDS = 1000


def session(path: Path, threads: int) -> Any:
    """An onnxruntime session for the CPU with ``threads`` threads inside an operator and one between operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(session: Any, inputs: Mapping[str, Any]) -> Run:
    """A call of ``session`` with ``inputs``, numpy arrays by name."""
    return lambda: session.run(None, inputs)


def forward(model: Any, images: Any) -> Run:
    """A call of a PyTorch ``model`` with ``images``, a tensor ``(B, C, H, W)``, in inference mode and channels_last.

    A packed network that runs in C gets them as they are, and other inputs stay as they are: tensors of other shapes,
    and :class:`bonn_qat.inputs.Inputs`.
    """
    import torch

    if getattr(model, "runtime", "") != "C" and getattr(images, "ndim", 0) == 4:
        images = images.contiguous(memory_format=torch.channels_last)

    def run() -> object:
        with torch.inference_mode():
            return model(images) if isinstance(images, torch.Tensor) else images.call(model)

    return run


def _onnxruntime() -> Load:
    import numpy
    import onnxruntime  # noqa: F401 (before the memory is read)

    def load(path: Path, threads: int, shape: Sequence[int]) -> Run:
        made = session(path, threads)
        return feed(made, {made.get_inputs()[0].name: numpy.zeros(shape, numpy.float32)})

    return load


def _torch() -> Load:
    import torch

    def load(path: Path, threads: int, shape: Sequence[int]) -> Run:
        torch.set_num_threads(threads)
        model = torch.load(path, weights_only=False)
        return forward(model, torch.zeros(*shape))

    return load


def _packed() -> Load:
    import torch

    from bonn_qat.runtime.packed import PackedModel

    def load(path: Path, threads: int, shape: Sequence[int]) -> Run:
        torch.set_num_threads(threads)
        return forward(PackedModel.load(path), torch.zeros(*shape))

    return load


ENGINES: Mapping[str, Callable[[], Load]] = {"onnxruntime": _onnxruntime, "torch": _torch, "packed": _packed}


def _kib(key: str) -> int | None:
    # Not getrusage's ru_maxrss, which a new process has from the one that started it.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def _restart_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def main(arguments: Sequence[str]) -> None:
    """Import, load and run once; print FIRST_RESULT, and then a line of JSON with the memory used.

    ``arguments`` are the engine, the file, the threads, the shape of the images separated by commas, and modules to
    import first. The JSON holds ``process_kib``, the peak of the process, and ``added_kib``, the peak of loading and
    running beyond the imports; null where the system does not report it.
    """
    name, path, threads, shape, *modules = arguments
    for module in modules:
        importlib.import_module(module)
    load = ENGINES[name]()
    imports_peak, before = _kib("VmHWM"), _kib("VmRSS")
    told = _restart_peak()
    run = load(Path(path), int(threads), [int(part) for part in shape.split(",")])
    run()
    print(FIRST_RESULT, flush=True)  # noqa: T201
    peak = _kib("VmHWM")
    memory: dict[str, int | None] = {"process_kib": None, "added_kib": None}
    if peak is not None and imports_peak is not None and before is not None:
        memory = {"process_kib": max(peak, imports_peak), "added_kib": peak - before if told else None}
    print(json.dumps(memory))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
