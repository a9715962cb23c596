"""Plugins: which ones are loaded, and errors for clashing names and misspelled hooks.

The plugins here are installed for real, as a module and a ``dist-info`` folder on the path.
"""

import importlib.metadata
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from bonn_qat import KernelLoss, hookimpl, plugins
from bonn_qat.bonn import BONN
from bonn_qat.errors import BonnQatError, PluginConflict, UnknownName

SCHEME = """
    import dataclasses
    from bonn_qat import hookimpl
    from bonn_qat.bonn import BONN

    @hookimpl
    def bonn_qat_schemes():
        yield dataclasses.replace(BONN, name="{name}", title="Mine")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a plugin from source; what else is installed on the machine is out of sight."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("BONN_QAT_PLUGINS", raising=False)
    everywhere = importlib.metadata.distributions
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: everywhere(path=[str(tmp_path)]))

    def write(name: str, source: str, distribution: str | None = None) -> None:
        module = f"bonn_qat_test_{distribution or name}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bonn_qat]\n{name} = {module}\n")

    yield write
    for module in [m for m in sys.modules if m.startswith("bonn_qat_test_")]:
        del sys.modules[module]


def names(manager: object) -> set[str]:
    return {name for name, _ in manager.list_name_plugin()}  # type: ignore[attr-defined]


def test_a_fresh_manager_has_the_default_plugins_and_no_other(install: Callable[[str, str], None]):
    install("extra", SCHEME.format(name="extra"))
    manager = plugins.create_manager(entry_points=False)
    assert names(manager) == set(plugins.DEFAULT_PLUGINS)
    assert plugins.schemes(manager) == {"bonn": BONN}
    assert set(plugins.regularizers(manager)) == {"kernel", "feature", "center"}
    assert manager is not plugins.create_manager(entry_points=False)


def test_an_installed_plugin_is_found_by_its_entry_point(install: Callable[[str, str], None]):
    install("extra", SCHEME.format(name="extra"))
    manager = plugins.create_manager()
    assert names(manager) == {*plugins.DEFAULT_PLUGINS, "extra"}
    assert plugins.find_scheme("extra", manager).title == "Mine"
    assert plugins.find_scheme("bonn", manager) is BONN


def test_the_environment_restricts_the_installed_plugins(
    install: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
):
    install("one", SCHEME.format(name="one"))
    install("two", SCHEME.format(name="two"))
    monkeypatch.setenv("BONN_QAT_PLUGINS", "")
    assert names(plugins.create_manager()) == set(plugins.DEFAULT_PLUGINS)
    monkeypatch.setenv("BONN_QAT_PLUGINS", " two , two")
    assert names(plugins.create_manager()) == {*plugins.DEFAULT_PLUGINS, "two"}
    monkeypatch.setenv("BONN_QAT_PLUGINS", "tow")
    with pytest.raises(UnknownName, match="unknown plugin in BONN_QAT_PLUGINS 'tow'; did you mean 'two'"):
        plugins.create_manager()


@pytest.mark.parametrize(
    ("hook", "complaint"),
    [("bonn_qat_scheme()", "unknown hook 'bonn_qat_scheme'"), ("bonn_qat_schemes(model)", "declared in the hookimpl")],
    ids=["misspelt", "unknown argument"],
)
def test_a_hook_that_does_not_fit_names_its_plugin(
    hook: str, complaint: str, install: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
):
    install("typo", f"from bonn_qat import hookimpl\n@hookimpl\ndef {hook}:\n    return []\n")
    monkeypatch.setenv("BONN_QAT_PLUGINS", "typo")
    with pytest.raises(PluginConflict, match=r"[Pp]lugin 'typo'") as caught:
        plugins.create_manager()
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_entry_points_of_one_name_name_both_distributions(install: Callable[..., None]):
    install("same", SCHEME.format(name="one"), "first")
    install("same", SCHEME.format(name="two"), "second")
    with pytest.raises(PluginConflict, match=r"'same'.*bonn_qat_test_first and bonn_qat_test_second"):
        plugins.create_manager()


class Offers:
    def __init__(self, schemes: tuple[object, ...] = (), regularizers: tuple[object, ...] = ()) -> None:
        self._schemes, self._regularizers = schemes, regularizers

    @hookimpl
    def bonn_qat_schemes(self):
        return self._schemes

    @hookimpl
    def bonn_qat_regularizers(self):
        return self._regularizers


@pytest.mark.parametrize(
    ("offer", "find", "what"),
    [
        (Offers(schemes=(BONN,)), plugins.schemes, "scheme 'bonn'"),
        (Offers(regularizers=(KernelLoss,)), plugins.regularizers, "regularizer 'kernel'"),
    ],
    ids=["scheme", "regularizer"],
)
def test_two_offers_of_one_name_name_both_plugins(offer, find, what):
    manager = plugins.create_manager(entry_points=False)
    manager.register(offer, name="stranger")
    with pytest.raises(PluginConflict, match=f"two plugins offer the {what}") as caught:
        find(manager)
    assert "stranger" in str(caught.value)
    assert "bonn_qat.bonn" in str(caught.value)


def test_one_plugin_cannot_offer_a_name_twice():
    manager = plugins.create_manager(entry_points=False)
    manager.register(Offers(regularizers=(KernelLoss, KernelLoss)), name="twice")
    with pytest.raises(PluginConflict, match="'kernel'"):
        plugins.regularizers(manager)


def test_an_unknown_name_comes_with_near_ones():
    manager = plugins.create_manager(entry_points=False)
    with pytest.raises(UnknownName, match=r"unknown scheme 'bon'; did you mean 'bonn'\? known: bonn"):
        plugins.find_scheme("bon", manager)
    with pytest.raises(UnknownName, match="unknown regularizer 'kernels'; did you mean 'kernel'"):
        plugins.find_regularizer("kernels", manager)
    with pytest.raises(LookupError, match="unknown scheme 'zzz'; known: bonn"):
        plugins.find_scheme("zzz", manager)
    with pytest.raises(BonnQatError):
        plugins.find_scheme("zzz", manager)


def test_a_scheme_is_its_own_answer():
    assert plugins.find_scheme(BONN) is BONN


def test_the_process_has_one_manager():
    assert plugins.manager() is plugins.manager()
