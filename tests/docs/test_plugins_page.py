"""docs/plugins.md: its example is a package that installs, is listed, trains and passes the page's own test."""

import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from torch import nn

import bonn_qat
from bonn_qat import hookspecs, plugins
from bonn_qat.scheme import Scheme

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
SCHEME, REGULARIZER, TEST = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(PROJECT,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMAND = "import sys; from bonn_qat.cli import main; sys.exit(main())"


@pytest.fixture
def scheme(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("median_scheme")
    exec(compile(SCHEME, "docs/plugins.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "median_scheme", module)
    return module


@pytest.mark.parametrize("block", [SCHEME, REGULARIZER], ids=["scheme", "regularizer"])
def test_the_examples_are_as_short_as_the_page_says(block: str) -> None:
    code = [line for line in block.splitlines() if line.strip() and '"""' not in line]
    assert len(code) <= 15


def test_the_pages_own_test_passes(scheme: types.ModuleType) -> None:
    namespace: dict[str, object] = {}
    exec(compile(TEST, "docs/plugins.md, test", "exec"), namespace)
    namespace["test_median"]()


def test_the_regularizer_pulls_back_what_is_outside(scheme: types.ModuleType) -> None:
    module = types.ModuleType("bound")
    exec(compile(REGULARIZER, "docs/plugins.md, regularizer", "exec"), module.__dict__)
    pm = plugins.create_manager(entry_points=False)
    pm.register(module)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    model = bonn_qat.binarize(net, pm=pm)
    bound = bonn_qat.Objective(model, regularizers={"bound": 0.5}, pm=pm).regularizers["bound"]
    assert bound() == 0
    model[1].weight.data[0, 0, 0, 0] = -3
    assert bound() == 0.5 * 4


@pytest.mark.slow
def test_the_package_is_listed_and_compared(tmp_path: Path) -> None:
    (tmp_path / "median_scheme.py").write_text(SCHEME, encoding="utf-8")
    project = tomllib.loads(PROJECT)["project"]
    info = tmp_path / "median_scheme-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = "".join(f"{name} = {module}\n" for name, module in project["entry-points"][hookspecs.PROJECT].items())
    (info / "entry_points.txt").write_text(f"[bonn_qat]\n{entries}")
    arguments = re.search(r"^bonn-qat (compare .*)$", PAGE, re.MULTILINE)[1].split()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BONN_QAT_PLUGINS": "median", "COLUMNS": "200"}
    for words in (["schemes"], [*arguments, "--batch-size", "64", "--output", "results"]):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "median" in done.stdout.lower()


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs) if name.startswith("bonn_qat_")])
def test_every_hook_is_on_the_page_with_its_arguments(hook: str) -> None:
    code = getattr(hookspecs, hook).__code__
    assert f"`{hook}({', '.join(code.co_varnames[: code.co_argcount])})`" in PAGE


def test_every_field_of_a_scheme_and_every_member_of_the_contract_is_on_the_page() -> None:
    fields = set(Scheme.__dataclass_fields__) - {"given"}
    table = set(re.findall(r"`(\w+)`", PAGE.partition("## Schemes: the other fields")[2].partition("**Options")[0]))
    assert fields <= table
    from bonn_qat import quantizers

    contract = PAGE.partition("## Quantizers: the contract")[2].partition("## Schemes")[0]
    for base in (quantizers.Quantizer, quantizers.WeightQuantizer, quantizers.ActivationQuantizer):
        for member in vars(base).keys() - {"forward"}:
            if not member.startswith("_"):
                assert f"`{member}" in contract, member
