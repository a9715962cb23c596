"""``tox -e release``: wheels and sdists of all distributions in ``dist/``, tried where nothing of this clone is.

Each wheel is built from its sdist, so an sdist that lacks a file fails. In an empty environment the wheels are
installed and the Python of the README runs.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TRIED = """
import importlib.metadata, bonn_qat
assert "site-packages" in bonn_qat.__file__, bonn_qat.__file__
print(*(f"{d.name} {d.version}" for d in importlib.metadata.distributions() if d.name.startswith("bonn-qat")))
"""


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a command; its error ends the program."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} ... failed with {done.returncode}")


def main() -> None:
    """Build, check and try."""
    shutil.rmtree(DIST, ignore_errors=True)
    for project in (ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))):
        run("uv", "build", "--quiet", project, "--out-dir", DIST)
    wheels = sorted(DIST.glob("*.whl"))
    run(sys.executable, "-m", "twine", "check", "--strict", *wheels, *sorted(DIST.glob("*.tar.gz")))
    for wheel in wheels:
        names = zipfile.ZipFile(wheel).namelist()
        if not any(name.endswith("licenses/LICENSE") for name in names):
            sys.exit(f"{wheel.name} has no licence")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run("uv", "venv", "--quiet", place / "env")
        python = place / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        run("uv", "pip", "install", "--quiet", "--python", python, *wheels)
        (place / "readme.py").write_text("\n".join([TRIED, *blocks]), encoding="utf-8")
        run(python, "readme.py", cwd=place)
        run(python.with_name("bonn-qat"), "schemes", cwd=place)
        run(python.with_name("bonn-qat-run"), "--help", cwd=place)
    for path in sorted(DIST.glob("bonn*")):
        sys.stdout.write(f"{path.name} {path.stat().st_size / 1e6:.2f} MB\n")


if __name__ == "__main__":
    main()
