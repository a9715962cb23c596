"""The environment of a run: the versions, commit and machine that its result depends on beside the recipe."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_vpopcntdq", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip


def environment(device: torch.device) -> Mapping[str, str]:
    """Versions, commit and machine, as text by name; ``device`` is where the run trains.

    >>> environment(torch.device("cpu"))["device"]
    'cpu'
    """
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for package in ("bonn-qat", "torch", "timm", "brevitas"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    found["commit"] = _commit()
    return found


def processor() -> str:
    """The processor's name, and which of the vector instructions that matter for networks it has."""
    facts, flags = _cpu(), instructions()
    if not facts:
        return platform.processor() or "unknown"
    known = " ".join(name for name in _INSTRUCTIONS if name in flags)
    return f"{facts.get('model name', platform.machine())} ({known or 'no vector instructions known here'})"


def instructions() -> frozenset[str]:
    """The names that Linux gives to the processor's instruction sets; empty on other systems."""
    facts = _cpu()
    return frozenset((facts.get("flags") or facts.get("Features", "")).split())


def _cpu() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
