"""One test for each hook, two that check that there is one, and what happens when a hook fails."""

import ast
import dataclasses
import inspect
import re
import warnings
from pathlib import Path

import pluggy
import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import Pretrained, Regularizer, Step, binarize, hookimpl, hookspecs, plugins
from bonn_qat.bonn import BONN
from bonn_qat.cli import runs
from bonn_qat.errors import InvalidModel, PluginError, UnknownName
from bonn_qat.layers import BinaryConv2d
from bonn_qat.objective import Objective
from bonn_qat.studies.compare import compare
from bonn_qat.training.data import TensorData
from bonn_qat.training.recipe import Recipe

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("bonn_qat_"))
PACKAGE = Path(bonn_qat.__file__).parent


@pytest.fixture
def pm() -> pluggy.PluginManager:
    return plugins.create_manager(entry_points=False)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(36, 2)
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_tested_and_asked(hook):
    assert inspect.getdoc(getattr(hookspecs, hook)), "a hook without a docstring"
    assert f"test_{hook}" in globals(), "a hook without a test in this file"
    asked = re.compile(rf'hook\.{hook}\b|Observers\(\)\.{hook}\b|"{hook}"')
    assert any(asked.search(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")), (
        "nobody calls the hook"
    )


def test_every_public_function_of_the_specifications_is_a_hook():
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions == set(HOOKS)


def test_bonn_qat_schemes(pm):
    mine = dataclasses.replace(BONN, name="mine", latent_std=0.5)

    class Plugin:
        @hookimpl
        def bonn_qat_schemes(self):
            yield mine

    assert plugins.schemes(pm) == {"bonn": BONN}
    pm.register(Plugin())
    assert plugins.schemes(pm) == {"bonn": BONN, "mine": mine}
    model = binarize(small(), "mine", pm=pm)
    assert model.binarization.scheme is mine
    assert model[2].weight.std().item() == pytest.approx(0.5)


def test_bonn_qat_regularizers(pm):
    class Size(Regularizer):
        """The size of the first weights."""

        name = "size"

        def loss(self, step: Step) -> Tensor:
            return next(self.model.parameters()).square().sum()

    class Plugin:
        @hookimpl
        def bonn_qat_regularizers(self):
            return [Size]

    pm.register(Plugin())
    assert plugins.find_regularizer("size", pm) is Size
    model = binarize(small(), pm=pm)
    objective = Objective(model, regularizers={"size": 0.5}, pm=pm)
    (term,) = (module for module in objective.modules() if isinstance(module, Size))
    assert term().item() == pytest.approx(0.5 * model[0].weight.square().sum().item())


def test_bonn_qat_pretrained(pm, tmp_path):
    one, other = (Pretrained(f"net.{tag}", tmp_path / tag) for tag in ("one", "other"))

    class Plugin:
        @hookimpl
        def bonn_qat_pretrained(self):
            return [one, other]

    assert plugins.pretrained(pm) == {}
    pm.register(Plugin())
    assert plugins.pretrained(pm) == {"net.one": one, "net.other": other}
    assert plugins.find_pretrained("net.other", pm) is other
    with pytest.raises(UnknownName, match=r"unknown pretrained network 'net.on'; did you mean 'net.one'"):
        plugins.find_pretrained("net.on", pm)


def test_bonn_qat_binarize_layer(pm):
    asked: list[str] = []

    class Plugin:
        @hookimpl
        def bonn_qat_binarize_layer(self, name: str, layer: nn.Module, parent: nn.Module):
            asked.append(name)
            assert parent.get_submodule(name) is layer
            return nn.Hardtanh() if name == "3" else None

    pm.register(Plugin())
    model = binarize(small(), pm=pm)
    assert asked == ["1", "2", "3", "4", "5"]  # not the first convolution and the classifier
    assert isinstance(model[3], nn.Hardtanh)
    assert isinstance(model[1], nn.PReLU)  # the default's answer, for the plugin gave none
    assert isinstance(model[2], BinaryConv2d)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (KeyError("key"), PluginError, "^2: the plugin 'clumsy' failed in bonn_qat_binarize_layer: KeyError: 'key'$"),
        (InvalidModel("not this"), InvalidModel, "^2: the plugin 'clumsy': not this; skip='2' leaves it float$"),
        (UnknownName("layer", "2", ["1"]), UnknownName, "^the plugin 'clumsy': unknown layer '2'; known: 1$"),
        (
            nn.ReLU,
            PluginError,
            "2: the plugin 'clumsy' returned <class .*ReLU.* from bonn_qat_binarize_layer.*not a module",
        ),
    ],
)
def test_an_error_of_binarize_layer_names_its_plugin_and_leaves_the_model_alone(pm, answer, error, words):
    class Clumsy:
        @hookimpl
        def bonn_qat_binarize_layer(self, name: str):
            if name == "2":
                if isinstance(answer, Exception):
                    raise answer
                return answer
            return None

    pm.register(Clumsy(), name="clumsy")
    model = small()
    before = list(model)
    with pytest.raises(error, match=words):
        binarize(model, pm=pm, inplace=True)
    assert list(model) == before


def test_an_error_of_a_schemes_own_code_names_the_scheme(pm):
    def nothing(channels: int) -> nn.Module:
        raise LookupError("there is none")

    with pytest.raises(PluginError, match=r"1: the scheme 'mine' failed in .*: LookupError: there is none"):
        binarize(small(), dataclasses.replace(BONN, name="mine", nonlinearity=nothing), pm=pm)
    for broken in (lambda: None, nothing):
        with pytest.raises(InvalidModel, match="2: the scheme 'mine' does not fit Conv2d"):
            binarize(small(), dataclasses.replace(BONN, name="mine", norm=broken), pm=pm)


class Observer:
    """Writes down what every moment of a run tells it; takes only the arguments that it needs."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    @hookimpl
    def bonn_qat_before_comparison(self, directory, recipes):
        self.seen.append(("before comparison", directory, len(recipes)))

    @hookimpl
    def bonn_qat_before_run(self, recipe):
        self.seen.append(("before run", recipe.name))

    @hookimpl
    def bonn_qat_after_epoch(self, epoch, metrics):
        self.seen.append(("after epoch", epoch, metrics))

    @hookimpl
    def bonn_qat_after_run(self, recipe, result):
        self.seen.append(("after run", recipe.name, result))

    @hookimpl
    def bonn_qat_after_comparison(self, directory, page):
        self.seen.append(("after comparison", directory, page))


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """What an observer sees of a comparison of two runs, of which the second diverges."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 8, 8), generator=generator, dtype=torch.uint8)
    batch = images, torch.arange(8) % 2
    data = TensorData("noise", batch, batch, classes=2, pad=0, flip=False)
    recipe = Recipe(data="noise", epochs=2, batch_size=4)
    observer = Observer()
    manager = plugins.create_manager(entry_points=False)
    manager.register(observer)
    diverging = dataclasses.replace(recipe, seed=1, lr=1e30)
    compare([recipe, diverging], data, tmp_path_factory.mktemp("hooks"), pm=manager)
    return observer.seen


def test_the_timeline_is_in_order(events):
    finished = ["before run", "after epoch", "after epoch", "after run"]
    failed = ["before run", "after run"]
    assert [event[0] for event in events] == ["before comparison", *finished, *failed, "after comparison"]


def test_bonn_qat_describe(tmp_path, capsys, monkeypatch):
    class Scribe:
        @hookimpl
        def bonn_qat_describe(self, directory):
            return f"writes to {directory.name}, [not] markup"

    manager = plugins.create_manager()
    manager.register(Scribe())
    monkeypatch.setattr(plugins, "manager", lambda: manager)
    runs.say_plugins(tmp_path)
    assert f"writes to {tmp_path.name}, [not] markup\n" in capsys.readouterr().out


def test_bonn_qat_before_comparison(events):
    _, directory, recipes = events[0]
    assert directory.is_dir()
    assert recipes == 2


def test_bonn_qat_before_run(events):
    assert events[1] == ("before run", "bonn-scheme-seed0")


def test_bonn_qat_after_epoch(events):
    (_, first, metrics), (_, second, _) = events[2:4]
    assert (first, second) == (1, 2)
    assert {"train/loss", "train/kernel", "test/top1"} <= set(metrics)


def test_bonn_qat_after_run(events):
    (_, name, report), (_, failed, nothing) = (event for event in events if event[0] == "after run")
    assert (name, failed) == ("bonn-scheme-seed0", "bonn-scheme-seed1")
    assert report["size"]["mbit"] > 0
    assert len(report["epochs"]) == 2
    assert nothing is None


def test_bonn_qat_after_comparison(events):
    _, directory, page = events[-1]
    assert page.parent == directory == events[0][1]
    assert page.exists()


def test_an_observer_that_raises_is_warned_of_once_and_stops_nothing(pm):
    class Noisy(Observer):
        @hookimpl
        def bonn_qat_after_epoch(self, epoch):
            self.seen.append(("after epoch", epoch, {}))
            raise ConnectionError("no route")

    noisy, quiet = Noisy(), Observer()
    pm.register(quiet, name="quiet")
    pm.register(noisy, name="noisy")
    observers = plugins.Observers(pm)
    words = "the plugin 'noisy' failed in bonn_qat_after_epoch; the run continues without it: ConnectionError: no route"
    with warnings.catch_warnings(record=True, action="always") as caught:
        for epoch in (1, 2):
            observers.bonn_qat_after_epoch(recipe=None, epoch=epoch, metrics={}, time=0.0)
        observers.bonn_qat_after_run(recipe=Recipe(), result=None)
    assert [str(warning.message) for warning in caught] == [words]
    assert [event[0] for event in noisy.seen] == [event[0] for event in quiet.seen]
    assert len(quiet.seen) == 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=["ctrl-c", "sigterm"])
def test_an_interruption_in_an_observer_is_no_fault_of_its(pm, stop):
    class Interrupted:
        @hookimpl
        def bonn_qat_before_run(self):
            raise stop

    pm.register(Interrupted())
    with pytest.raises(type(stop)):
        plugins.Observers(pm).bonn_qat_before_run(recipe=None, model=None, run_id="")


def test_a_forward_pass_and_a_loss_call_no_hook(pm):
    model = binarize(small(), pm=pm)
    objective = Objective(model, pm=pm)
    calls: list[str] = []
    undo = pm.add_hookcall_monitoring(lambda name, *_: calls.append(name), lambda *_: None)
    try:
        objective(torch.randn(2, 3, 9, 9), torch.tensor([0, 1]))
    finally:
        undo()
    assert calls == []
