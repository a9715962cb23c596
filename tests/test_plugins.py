"""Plugins: which are loaded, and what happens when they are broken or clash.

The plugins here are installed for real, as a module and a ``dist-info`` folder on the path.
"""

import importlib.metadata
import re
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pluggy
import pytest

from bonn_qat import KernelLoss, cli, hookimpl, plugins
from bonn_qat.bonn import BONN
from bonn_qat.errors import BonnQatError, InvalidRecipe, PluginConflict, UnknownName

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


def test_another_process_loads_the_same_plugins_by_name_with_or_without_their_observers(
    install: Callable[[str, str], None],
):
    observing = """
    @hookimpl
    def bonn_qat_after_epoch():
        raise AssertionError
    """
    for name in ("one", "two", "three"):
        install(name, SCHEME.format(name=name) + observing)
    manager = plugins.create_manager()
    manager.unregister(name="two")
    assert sorted(plugins.entry_points(manager)) == ["one", "three"]
    for observes in (True, False):
        again = plugins.create_manager(entry_points=plugins.entry_points(manager), observes=observes)
        assert set(plugins.schemes(again)) == {"bonn", "one", "three"}
        assert len(again.hook.bonn_qat_after_epoch.get_hookimpls()) == 2 * observes
    with pytest.raises(UnknownName, match="unknown plugin 'four'"):
        plugins.create_manager(entry_points=["one", "four"])
    assert names(plugins.create_manager(entry_points=[])) == set(plugins.DEFAULT_PLUGINS)


HOOK = "from bonn_qat import Scheme, hookimpl\nfrom bonn_qat.quantizers import *\n@hookimpl\ndef {}:\n    {}\n"
OFFER = HOOK.format("bonn_qat_schemes()", "yield Scheme(name='mine', title='', reference='', {})")
REGULARIZER = (
    "from bonn_qat import Regularizer\nclass Mine(Regularizer):\n    name = {}\n    def loss(self, step): ...\n"
    + HOOK.format("bonn_qat_regularizers()", "{}")
)
FAULTS = {
    # It cannot be loaded.
    "import": ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    "name": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exit": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "exit 0": ("raise SystemExit(0)", "SystemExit: 0"),
    "syntax": ("def", "SyntaxError: invalid syntax"),
    "indentation": ("if True:\nx = 1", "IndentationError"),
    "encoding": ("x = '\0'", "SyntaxError"),
    "recursion": ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    "warning": ("raise DeprecationWarning('old')", "DeprecationWarning: old"),
    "lines": ("raise ValueError('one\\ntwo')", "ValueError: one two"),
    "no message": ("class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd", "Odd: its message cannot be read"),
    "memory": ("raise MemoryError", "MemoryError: no message"),
    # Its hooks are none.
    "empty": ("", "it has no hook; mark its functions with bonn_qat.hookimpl"),
    "unmarked": ("def bonn_qat_schemes(): return []", "it has no hook"),
    "misspelt": (HOOK.format("bonn_qat_scheme()", "return []"), "unknown hook 'bonn_qat_scheme'"),
    "argument": (HOOK.format("bonn_qat_schemes(model)", "return []"), "declared in the hookimpl"),
    "wrapper": (HOOK.format("bonn_qat_describe()", "yield").replace("@hookimpl", "@hookimpl(wrapper=1)"), "a wrapper"),
    "async": (HOOK.format("bonn_qat_after_run()", "pass").replace("def", "async def"), "no plain function, but async"),
    "generator": (HOOK.format("bonn_qat_after_run()", "yield"), "bonn_qat_after_run is a generator"),
    # What it offers is wrong.
    "raises": (HOOK.format("bonn_qat_schemes()", "yield 1 / 0"), "bonn_qat_schemes: ZeroDivisionError"),
    "exits": (HOOK.format("bonn_qat_schemes()", "raise SystemExit"), "bonn_qat_schemes: SystemExit: no message"),
    "exits 0": (HOOK.format("bonn_qat_regularizers()", "exit(0)"), "bonn_qat_regularizers: SystemExit: 0"),
    "calls itself": (HOOK.format("bonn_qat_schemes()", "return bonn_qat_schemes()"), "RecursionError"),
    "nothing": (HOOK.format("bonn_qat_schemes()", "pass"), "'NoneType' object is not iterable"),
    "endless": (HOOK.format("bonn_qat_schemes()", "while True: yield 0"), "it offers more than 1,000"),
    "rubbish": (HOOK.format("bonn_qat_schemes()", "yield 'bonn'"), "it offers 'bonn', which is not an instance of "),
    "bare": (HOOK.format("bonn_qat_schemes()", "return Scheme"), "TypeError: 'type' object is not iterable"),
    "number": (
        HOOK.format("bonn_qat_schemes()", "yield Scheme(name=3, title='', reference='', weight=None, activation=None)"),
        "the name of a scheme consists of letters, digits, '-', '_' and '.'; got 3",
    ),
    "no name": (OFFER.format("weight=None, activation=None").replace("'mine'", "''"), "'-', '_' and '.'; got ''"),
    "unknown field": (OFFER.format("weight=None, activation=None, bits=1"), "unexpected keyword argument 'bits'"),
    "missing field": (OFFER.format("weight=None"), "missing 1 required keyword-only argument: 'activation'"),
    "impossible field": (OFFER.format("weight=None, activation=None, latent_std=-1"), "the latent_std of the scheme"),
    "factory raises": (OFFER.format("weight=lambda w: 1 / 0, activation=SteSign"), "ZeroDivisionError"),
    "factory exits": (OFFER.format("weight=BonnWeight, activation=lambda c: exit()"), "SystemExit"),
    "factory of nothing": (OFFER.format("weight=BonnWeight, activation=lambda c: None"), "has no attribute 'bits'"),
    "no factory": (OFFER.format("weight=3, activation=SteSign"), "'int' object is not callable"),
    "factory of two": (OFFER.format("weight=lambda w, x: w, activation=SteSign"), "missing 1 required positional"),
    "output raises": (OFFER.format("weight=BonnWeight, activation=SteSign, output=lambda c: c.x"), "no attribute 'x'"),
    "class": (HOOK.format("bonn_qat_regularizers()", "yield Scheme"), "is not a subclass of bonn_qat.Regularizer"),
    "instance": (REGULARIZER.format("'mine'", "yield hookimpl"), "is not a subclass of bonn_qat.Regularizer"),
    "twice": (REGULARIZER.format("'mine'", "return [Mine, Mine]"), "it offers the regularizer 'mine' twice"),
    "nameless": (REGULARIZER.format("None", "return [Mine]"), "the name of a regularizer consists of"),
    "abstract": (
        "from bonn_qat import Regularizer\nclass Mine(Regularizer):\n    name = 'mine'\n"
        + HOOK.format("bonn_qat_regularizers()", "yield Mine"),
        "the regularizer 'mine' lacks loss",
    ),
    "unregisters": (
        "import gc\nfrom bonn_qat import plugins\n"
        "def found(): return [m for m in gc.get_objects() if type(m) is plugins.Manager]\n"
        + HOOK.format("bonn_qat_schemes()", "for m in found(): m.unregister(name='sound')"),
        "bonn_qat_schemes: PluginError: it unregisters 'sound'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_plugin_is_skipped_with_one_warning_that_names_it(fault: str, install: Callable[..., None]):
    source, words = FAULTS[fault]
    install("broken", source)
    install("sound", SCHEME.format(name="sound"))
    with warnings.catch_warnings(record=True, action="always") as caught:
        manager = plugins.create_manager()
        for _ in range(2):
            assert set(plugins.schemes(manager)) == {"bonn", "sound"}
            assert set(plugins.regularizers(manager)) == {"kernel", "feature", "center"}
    (warning,) = caught
    assert warning.category is plugins.BrokenPlugin
    assert str(warning.message).startswith("the plugin 'broken' of bonn_qat_test_broken 1.0 is skipped: ")
    assert words in str(warning.message)
    assert "\n" not in str(warning.message)
    assert names(manager) == {*plugins.DEFAULT_PLUGINS, "sound"}
    assert plugins.installed(manager) == ["bonn_qat_test_sound 1.0"]
    (line,) = plugins.faults(manager)
    assert line.startswith("the plugin 'broken' of bonn_qat_test_broken 1.0: ")
    with pytest.raises(
        UnknownName, match="known: bonn, sound; broken plugins, which may offer it: the plugin 'broken'"
    ):
        plugins.find_scheme("mine", manager)
    assert plugins.find_scheme("sound", manager).name == "sound"


def test_a_plugin_of_two_entry_points_is_loaded_once(install: Callable[..., None], tmp_path: Path):
    install("one", SCHEME.format(name="mine"))
    entry_points = tmp_path / "bonn_qat_test_one-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text("[bonn_qat]\none = bonn_qat_test_one\ntwo = bonn_qat_test_one\n")
    with pytest.warns(plugins.BrokenPlugin, match="the plugin 'two' of bonn_qat_test_one 1.0 is skipped: ValueError"):
        manager = plugins.create_manager()
    assert plugins.find_scheme("mine", manager).name == "mine"


def test_of_two_entry_points_of_one_name_neither_is_loaded(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    install("same", SCHEME.format(name="one"), "first")
    install("same", SCHEME.format(name="two"), "second")
    words = (
        "'same' of bonn_qat_test_(first|second) 1.0 and bonn_qat_test_(first|second) 1.0 is skipped: 2 distributions"
    )
    with pytest.warns(plugins.BrokenPlugin, match=words):
        assert set(plugins.schemes(plugins.create_manager())) == {"bonn"}
    monkeypatch.setenv("BONN_QAT_PLUGINS", "")  # as --no-plugins does
    assert plugins.faults(plugins.create_manager()) == []


def test_an_interruption_while_a_plugin_is_loaded_is_the_users(install: Callable[..., None]):
    for name, source in (("one", "raise KeyboardInterrupt"), ("two", "raise SystemExit(143)")):  # what SIGTERM becomes
        install(name, source)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            plugins.create_manager(entry_points=[name])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("broken = bonn_qat_test_broken:missing", "AttributeError: module 'bonn_qat_test_broken' has no attribute"),
        ("broken = bonn_qat_test_none", "ModuleNotFoundError"),
        ("broken = bonn_qat_test_broken:Hooks", "bonn_qat_schemes: TypeError"),
        ("broken = bonn_qat_test_broken:", "is skipped: "),
        ("broken = ", "is skipped: "),
        ("broken", "a distribution whose entry points cannot be read is left out"),
    ],
)
def test_a_wrong_entry_point_leaves_the_other_plugins(
    entry: str, words: str, install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hooks = "@hookimpl\n    def bonn_qat_schemes(self): return []"
    install("broken", f"from bonn_qat import hookimpl\nclass Hooks:\n    {hooks}\n".replace("\n    @", "\n    @"))
    install("sound", SCHEME.format(name="sound"))
    (tmp_path / "bonn_qat_test_broken-1.0.dist-info" / "entry_points.txt").write_text(f"[bonn_qat]\n{entry}\n")
    with pytest.warns(plugins.BrokenPlugin) as caught:
        assert set(plugins.schemes(plugins.create_manager())) == {"bonn", "sound"}
    assert len(caught) == 1
    assert words in str(caught[0].message)
    monkeypatch.setenv("BONN_QAT_PLUGINS", "")  # as --no-plugins does
    with warnings.catch_warnings(action="error"):
        assert set(plugins.schemes(plugins.create_manager())) == {"bonn"}


@pytest.mark.parametrize("attribute", ["", ":HOOKS"])
def test_a_plugin_is_a_module_or_an_instance(attribute: str, install: Callable[..., None], tmp_path: Path):
    source = textwrap.dedent(SCHEME.format(name="mine"))
    install("mine", source + "\nclass Hooks:\n    bonn_qat_schemes = staticmethod(bonn_qat_schemes)\nHOOKS = Hooks()\n")
    entry_points = tmp_path / "bonn_qat_test_mine-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text(f"[bonn_qat]\nmine = bonn_qat_test_mine{attribute}\n")
    assert plugins.find_scheme("mine", plugins.create_manager()).title == "Mine"


LOSS = """
from bonn_qat import Regularizer, Stage, hookimpl
from bonn_qat.bonn import BONN
from dataclasses import replace

class Mine(Regularizer):
    name = "mine"
    def {}

@hookimpl
def bonn_qat_regularizers():
    yield Mine

@hookimpl
def bonn_qat_schemes():
    yield replace(BONN, name="broken", stages=(Stage(regularizers={{"mine": 1.0}}),))
"""
QUANTIZER = """
from bonn_qat import hookimpl
from bonn_qat.bonn import BONN
from bonn_qat.quantizers import *
from dataclasses import replace

class Weight(BonnWeight):
    {}

@hookimpl
def bonn_qat_schemes():
    yield replace(BONN, name="broken", weight=Weight)
"""
OBSERVER = "from bonn_qat import hookimpl\nfrom bonn_qat.bonn import BONN\n@hookimpl\ndef bonn_qat_{}: {}\n" + (
    "@hookimpl\ndef bonn_qat_schemes():\n    import dataclasses\n    yield dataclasses.replace(BONN, name='broken')\n"
)
SIZE = "def __init__(self, weight):\n        super().__init__(weight)\n        if len(weight) > 2: "
IN_USE = {
    "loss raises": (LOSS.format("loss(self, step): raise KeyError('x')"), 1, "failed in .*: KeyError: 'x'"),
    "regularizer cannot be made": (LOSS.format("__init__(self, *_, **__): {}['x']\n    loss = 3"), 1, "KeyError: 'x'"),
    "factory exits later": (QUANTIZER.format(SIZE + "exit(0)"), 1, "SystemExit: 0"),
    "quantizer raises": (QUANTIZER.format("def constrain(self, latent): 1 / 0"), 1, "failed in .*: ZeroDivisionError"),
    "observer exits": (OBSERVER.format("after_epoch()", "exit(0)"), 0, ""),
    "observer says a number": (OBSERVER.format("describe()", "return 3"), 0, ""),
    "observer of a comparison": (OBSERVER.format("after_comparison(page)", "page.none"), 0, ""),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::bonn_qat.plugins.BrokenPlugin")
@pytest.mark.parametrize("fault", IN_USE)
def test_what_breaks_in_use_names_the_plugin_and_only_its_own_runs_fail(
    fault: str, install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, code, words = IN_USE[fault]
    install("broken", source)
    monkeypatch.setattr("bonn_qat.studies.figures.pictures", lambda _: [])
    monkeypatch.setattr(cli.options.console(), "_width", 1000)
    plugins.manager.cache_clear()
    sizes = ["--train-images", "8", "--test-images", "4", "--epochs", "1", "-b", "4"]
    try:
        assert cli.main(["compare", "--schemes", "broken,bonn", *sizes, "--output", str(tmp_path / "out")]) == code
    finally:
        plugins.manager.cache_clear()
    printed, told = capsys.readouterr()
    failed = re.findall(r"^failed: broken-0.01-seed0: (.*)$", printed, re.M)
    assert len(failed) == code
    assert all(re.search(words, line) and "the plugin 'broken' of bonn_qat_test_broken 1.0" in line for line in failed)
    assert "Traceback" not in told
    assert (tmp_path / "out" / "runs" / "bonn-0.01-seed0.json").exists()


def test_the_command_lists_what_works_and_says_what_is_broken(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    install("broken", "import nothing_of_this_name")
    install("other", SCHEME.format(name="bonn"))
    install("sound", SCHEME.format(name="sound"))
    plugins.manager.cache_clear()
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["--help"]) == 0  # loads no plugin, and so warns of none
    try:
        with pytest.warns(plugins.BrokenPlugin):
            assert cli.main(["schemes"]) == 0
    finally:
        plugins.manager.cache_clear()
    printed = capsys.readouterr().out
    assert re.search(r"^sound +1/1 ", printed, re.M)
    assert "not listed: the plugin 'broken' of bonn_qat_test_broken 1.0: ModuleNotFoundError" in printed
    assert "not listed: several plugins offer the scheme 'bonn': bonn_qat.bonn and other" in printed


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
    ("offer", "every", "find", "name", "what"),
    [
        (Offers(schemes=(BONN,)), plugins.schemes, plugins.find_scheme, "bonn", "scheme 'bonn'"),
        (
            Offers(regularizers=(KernelLoss,)), plugins.regularizers, plugins.find_regularizer, "kernel",
            "regularizer 'kernel'",
        ),
    ],
    ids=["scheme", "regularizer"],
)  # fmt: skip
def test_a_name_that_two_plugins_offer_is_an_error_where_it_is_asked_for(offer, every, find, name, what):
    manager = plugins.create_manager(entry_points=False)
    manager.register(offer, name="stranger")
    assert name not in every(manager)
    with pytest.raises(PluginConflict, match=f"several plugins offer the {what}") as caught:
        find(name, manager)
    assert "stranger" in str(caught.value)
    assert "bonn_qat.bonn" in str(caught.value)
    assert plugins.faults(manager) == [str(caught.value)]
    assert plugins.find_regularizer("feature", manager).name == "feature"


def test_one_plugin_cannot_offer_a_name_twice():
    manager = plugins.create_manager(entry_points=False)
    manager.register(Offers(regularizers=(KernelLoss, KernelLoss)), name="twice")
    with pytest.warns(plugins.BrokenPlugin, match="'twice' is skipped: .* it offers the regularizer 'kernel' twice"):
        assert plugins.find_regularizer("kernel", manager) is KernelLoss


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


@pytest.mark.parametrize("wrong", [3, None, BONN.weight])
def test_what_is_neither_a_name_nor_a_scheme_is_refused(wrong):
    with pytest.raises(InvalidRecipe, match=r"a scheme is a name, such as 'bonn', or a .*Scheme; got"):
        plugins.find_scheme(wrong)


def test_a_manager_of_pluggys_own_is_refused():
    with pytest.raises(TypeError, match=r"pm comes from bonn_qat.plugins.create_manager\(\)"):
        plugins.schemes(pluggy.PluginManager("bonn_qat"))


def test_the_process_has_one_manager():
    assert plugins.manager() is plugins.manager()
