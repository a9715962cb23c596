"""timm knows the package's networks after ``import bonn_qat``, whichever of the two is imported first."""

import subprocess
import sys
from pathlib import Path

import bonn_qat

BONN_QAT_FIRST = """
import importlib.machinery, importlib.util, sys
import bonn_qat
assert not {"timm", "torch"} & set(sys.modules)
spec = importlib.util.find_spec("timm")  # other packages ask like this whether timm is installed
assert spec.loader.get_filename() == spec.origin
import timm
assert timm.is_model("wrn22_16") and timm.is_model("birealnet18")
timm.create_model("wrn10_16", num_classes=10)
assert type(timm.__loader__) is importlib.machinery.SourceFileLoader
assert timm.__spec__.loader is timm.__loader__
assert not any("bonn_qat" in type(finder).__module__ for finder in sys.meta_path)
"""
TIMM_FIRST = """
import timm
assert not timm.is_model("wrn22_16")
import bonn_qat
timm.create_model("wrn10_16", num_classes=10)
"""
WITHOUT_TIMM = """
import sys
sys.path.insert(0, sys.argv[1])
import bonn_qat
for _ in range(2):
    try:
        import timm
    except ModuleNotFoundError as error:
        assert "timm" in str(error)
    sys.modules["timm"] = None
del sys.modules["bonn_qat"]
import bonn_qat
"""


def test_bonn_qat_first() -> None:
    command = [sys.executable, "-W", "error", "-X", "importtime", "-c", BONN_QAT_FIRST]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_timm_first(tmp_path: Path, run_scripts) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.py"
    script.write_text(TIMM_FIRST)
    (done,) = run_scripts([str(script)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_timm() -> None:
    root = str(Path(bonn_qat.__file__).parents[1])
    subprocess.run([sys.executable, "-I", "-S", "-c", WITHOUT_TIMM, root], check=True)
