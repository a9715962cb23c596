"""Compiles the C sources of ``bonn_qat/engine`` into one library, with zig's C compiler.

``BONN_QAT_TARGET=aarch64-linux-gnu.2.17``, or another key of ``TARGETS``, builds the wheel of another machine.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ENGINE = "bonn_qat/engine"
# The targets of zig, and the platform in the name of a wheel.
TARGETS = {
    "x86_64-linux-gnu.2.17": "manylinux_2_17_x86_64",
    "aarch64-linux-gnu.2.17": "manylinux_2_17_aarch64",
    "x86_64-linux-musl": "musllinux_1_2_x86_64",
    "aarch64-linux-musl": "musllinux_1_2_aarch64",
    "x86_64-macos.11.0": "macosx_11_0_x86_64",
    "aarch64-macos.11.0": "macosx_11_0_arm64",
    "x86_64-windows-gnu": "win_amd64",
    "aarch64-windows-gnu": "win_arm64",
}
# The suffixes of the variants of kernels.c, and the CPUs that they are compiled for.
VARIANTS = {
    "x86_64": {"v3": "x86_64_v3", "v4": "x86_64_v4+avx512vpopcntdq"},
    "aarch64": {"neon": "baseline"},
}
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


def own_target() -> str | None:
    """The target that this interpreter loads libraries of, or None."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    machine = (platform.machine() if machine == "universal2" else machine).lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    musl = "musl" in str(sysconfig.get_config_var("SOABI"))
    systems = {"linux": "linux-musl" if musl else "linux-gnu.2.17", "darwin": "macos.11.0", "win32": "windows-gnu"}
    target = f"{machine}-{systems.get(sys.platform)}"
    return target if target in TARGETS else None


def compile_engine(engine: Path, target: str, folder: Path) -> Path:
    """Write ``kernels.so``, ``.dylib`` or ``.dll`` to the folder; CalledProcessError says what the compiler said."""
    # Without a cache at home, so that a home that is read-only does no harm.
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": str(folder / "cache")}

    def run(*arguments: str | Path) -> None:
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *FLAGS, *map(str, arguments)]
        subprocess.run(
            command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    objects = []
    for suffix, cpu in VARIANTS[target.partition("-")[0]].items():
        objects.append(folder / f"{suffix}.o")
        run("-c", engine / "kernels.c", f"-mcpu={cpu}", f"-DVARIANT={suffix}", "-o", objects[-1])
    sources = zlib.crc32(b"".join(path.read_bytes() for path in sorted(engine.glob("*.[ch]"))))
    system = target.split("-")[1].partition(".")[0]
    library = folder / f"kernels.{ {'linux': 'so', 'macos': 'dylib', 'windows': 'dll'}[system] }"
    alone = ["-nostdlib"] if system == "windows" else []
    run("-shared", "-s", *alone, f"-DSOURCES={sources}u", engine / "dispatch.c", *objects, "-o", library)
    return library


class EngineHook(BuildHookInterface):
    """Adds the library to wheels, and to the source tree of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; where that fails, go on without the library, unless a target was asked for."""
        if self.target_name != "wheel":
            return
        asked = os.environ.get("BONN_QAT_TARGET")
        if asked and asked not in TARGETS:
            raise ValueError(f"BONN_QAT_TARGET is {asked!r}; known: {', '.join(TARGETS)}")
        target = asked or own_target()
        try:
            if target is None:
                raise OSError(f"none is known for {sysconfig.get_platform()}")
            self.folder = tempfile.TemporaryDirectory()
            library = compile_engine(Path(self.root, ENGINE), target, Path(self.folder.name))
            if version == "editable":
                install(library, Path(self.root, ENGINE, "lib"))
                return
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            if asked:
                raise RuntimeError(f"the kernels cannot be compiled for {asked} ({reason})") from error
            self.app.display_warning(
                f"bonn-qat has no compiled kernels ({reason}): training on CPUs is slower and takes more memory"
            )
            return
        build_data["force_include"][str(library)] = f"{ENGINE}/lib/{library.name}"
        build_data["tag"] = f"py3-none-{TARGETS[target]}"
        build_data["pure_python"] = False

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled."""
        if hasattr(self, "folder"):
            self.folder.cleanup()


def install(library: Path, folder: Path) -> None:
    """Replace the library in one step, so that a process that runs keeps the one that it has loaded."""
    folder.mkdir(exist_ok=True)
    new = folder / f"{library.name}.{os.getpid()}"
    shutil.copyfile(library, new)
    os.replace(new, folder / library.name)
