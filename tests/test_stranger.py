"""A third-party scheme: written as docs/plugins.md says, installed as a package, used by name.

The package is built and installed for real, by uv and setuptools without a network, into a folder of its own.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bonn_qat.studies.comparison import PAGE, read_comparison

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "binary-quantiles"
version = "1.0"
dependencies = ["bonn-qat"]

[project.entry-points.bonn_qat]
quantiles = "binary_quantiles"

[tool.setuptools]
py-modules = ["binary_quantiles"]
"""

MODULE = '''\
"""Binary kernels whose scale is a quantile of the latent magnitudes, which a few large weights do not move."""

from bonn_qat import BonnQatError, Scheme, hookimpl
from bonn_qat.functional import ste_sign
from bonn_qat.quantizers import SteSign, WeightQuantizer


class QuantileWeight(WeightQuantizer):
    """``alpha * sign(W)``, alpha a quantile of ``|W|`` over each output filter."""

    def __init__(self, weight, *, quantile=0.5):
        super().__init__()
        if not 0 <= quantile <= 1:
            raise BonnQatError(f"the option quantile of the scheme 'quantile' must be 0 to 1; got {quantile!r}")
        self.quantile = quantile

    def quantize(self, x):
        alpha = x.detach().abs().flatten(1).quantile(self.quantile, dim=1)
        alpha = alpha.reshape(-1, *[1] * (x.ndim - 1))
        return alpha * ste_sign(x), alpha


@hookimpl
def bonn_qat_schemes():
    yield Scheme(
        name="quantile",
        title="Quantile",
        reference="A. Stranger, unpublished",
        weight=QuantileWeight,
        activation=SteSign,
    )
'''

COMMAND = "import sys; from bonn_qat.cli import main; sys.exit(main())"
TINY = ["--train-images", "64", "--test-images", "32", "--epochs", "1", "-b", "16"]


@pytest.fixture
def python(run_scripts, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a Python that has ``path`` on its path, but not the folder it runs in."""

    def run(code: str, *arguments: str, path: Path | None = None, plugins: str | None = None) -> tuple[int, str, str]:
        environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
        for variable, value in (("PYTHONPATH", path and str(path)), ("BONN_QAT_PLUGINS", plugins)):
            environment.pop(variable, None)
            if value is not None:
                environment[variable] = value
        script = tmp_path / "script.py"
        script.write_text(code, encoding="utf-8")
        (done,) = run_scripts([str(script), *arguments], cwd=Path.cwd(), env=environment)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the stranger's package is installed into, and nothing else."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (source / "binary_quantiles.py").write_text(MODULE, encoding="utf-8")
    done = subprocess.run(
        [
            sys.executable, "-m", "uv", "pip", "install", "--no-config", "--offline", "--no-deps",
            "--no-build-isolation", "--cache-dir", str(tmp_path_factory.mktemp("cache")),
            "--python", sys.executable, "--target", str(target), str(source),
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (target / "binary_quantiles.py").read_text(encoding="utf-8") == MODULE
    return target


def test_it_is_listed_with_its_options_as_soon_as_it_is_installed(installed, python):
    code, printed, errors = python(COMMAND, "schemes", path=installed)
    assert code == 0, errors
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("quantile"))
    assert lines[start].rstrip().split(maxsplit=2) == ["quantile", "1/1", "A. Stranger, unpublished"]
    assert lines[start + 1].strip() == "options: quantile=0.5, clip=1.0"
    assert any(line.startswith("bonn  ") for line in lines)  # it adds, it replaces nothing


def test_it_is_compared_by_name_and_stands_in_the_report(installed, python, tmp_path):
    output = tmp_path / "results"
    arguments = ["compare", "--schemes", "bonn,quantile", *TINY, "--output", str(output)]
    code, printed, errors = python(COMMAND, *arguments, path=installed, plugins="quantiles")
    assert code == 0, errors
    assert "Quantile" in printed
    comparison = read_comparison(output)
    assert not comparison.missing
    assert not comparison.failures
    ours, theirs = comparison.results
    assert (theirs.scheme, theirs.title, theirs.bits) == ("quantile", "Quantile", "1/1")
    assert 0 <= theirs.top1 <= 100
    assert "Quantile" in (output / PAGE).read_text(encoding="utf-8")
    # A scale for each of 16 to 64 filters, where BONN has one for each layer.
    assert theirs.size["mbit"] > ours.size["mbit"]


USE = """
import timm, torch
import bonn_qat, bonn_qat.models
from bonn_qat import plugins

network = timm.create_model("wrn10_16", num_classes=10, in_chans=1)
model = bonn_qat.binarize(network, "quantile")
layer = model.get_submodule(model.binarization.binary[0])
value, scale = layer.weight_quant.quantize(layer.weight)
ordered = layer.weight.detach().abs().flatten(1).sort(1).values  # 144 magnitudes of each filter
median = (ordered[:, 71] + ordered[:, 72]) / 2
print(type(layer.weight_quant).__module__, tuple(scale.shape), torch.allclose(scale.flatten(), median))
loss = bonn_qat.Objective(model)(torch.randn(4, 1, 8, 8), torch.arange(4)).total
loss.backward()
print(len(value.unique()), bool(layer.weight.grad.any()), bonn_qat.summary(model, (1, 8, 8)).compression > 1)

largest = bonn_qat.binarize(network, plugins.find_scheme("quantile").configure({"quantile": 1.0}))
layer = largest.get_submodule(largest.binarization.binary[0])
print(torch.equal(layer.weight_quant.quantize(layer.weight)[1], layer.weight.abs().amax((1, 2, 3), keepdim=True)))
try:
    plugins.find_scheme("quantile").configure({"quantile": 2.0})
except bonn_qat.BonnQatError as error:
    print(error)
"""


def test_it_binarizes_a_model_by_name_and_takes_its_option(installed, python):
    code, printed, errors = python(USE, path=installed)
    assert code == 0, errors
    assert printed.splitlines() == [
        "binary_quantiles (16, 1, 1, 1) True",
        "32 True True",
        "True",
        "the option quantile of the scheme 'quantile' must be 0 to 1; got 2.0",
    ]


def test_without_the_package_its_name_is_an_error_that_lists_the_known_ones(python, tmp_path):
    output = tmp_path / "results"
    code, printed, errors = python(COMMAND, "compare", "--schemes", "quantile", *TINY, "--output", str(output))
    assert (code, printed) == (2, "")
    words, _, known = errors.rstrip("\n").partition("known: ")
    assert words.startswith("bonn-qat: unknown scheme 'quantile'; ")
    assert {"bonn", "xnor", "bireal", "pcnn", "float"} <= set(known.split(", "))
    assert "quantile" not in known
    assert not output.exists()
