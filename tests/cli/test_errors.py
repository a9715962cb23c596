"""Every error for users: a test provokes it, its message is one line, and docs/errors.md, generated here, lists it.

python tests/cli/test_errors.py
"""

import contextlib
import errno
import functools
import importlib
import io
import os
import re
import shlex
import signal
import sys
import tempfile
import urllib.error
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import cli, errors, plugins
from bonn_qat.errors import BonnQatError, InvalidData, InvalidModel, InvalidRecipe, UnknownName
from bonn_qat.exporting.export import PackageMissing
from bonn_qat.files.tensors import dump_tensors, read_tensors
from bonn_qat.training.checkpoint import write_state
from bonn_qat.training.data import load
from bonn_qat.training.network import build, weights_header
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.resume import capture
from bonn_qat.training.trainer import Trainer

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
Content = str | bytes | Callable[[], bytes]
Patch = Callable[[pytest.MonkeyPatch], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a user gives, and what comes of it.

    ``gives`` are arguments of the command, or an expression of Python; ``when`` are words on the rest. ``names`` is
    what the message names of it. ``files`` are there before, by their paths in the working directory, and ``patch``
    makes the system fail where it cannot be made to. ``plugins`` are those that are installed. ``varies`` are
    expressions for what of the message is another library's, or another machine's: each becomes "...".
    """

    gives: str
    names: str
    when: str = ""
    files: Mapping[str, Content] = field(default_factory=dict)
    patch: Patch = lambda monkeypatch: None
    plugins: str = ""
    varies: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """The exit code, or the name of the exception."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Command(Case):
    """A command that ends with an exit code."""

    code: int = 2
    program: str = "bonn-qat"

    @property
    def outcome(self) -> str:
        return str(self.code)


@dataclass(frozen=True, kw_only=True)
class Call(Case):
    """A call that raises an exception."""

    error: type[BonnQatError]

    @property
    def outcome(self) -> str:
        return self.error.__name__


class Net(nn.Module):
    """Three convolutions and a classifier, for images (3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        logits: Tensor = self.fc(self.conv3(x).relu().mean((2, 3)))
        return logits


SIZE = (3, 8, 8)
RUN = "bonn-0.01-seed0"
UNFINISHED = f"results/runs/{RUN}.unfinished.safetensors"
RECIPE = Recipe.default("digits")
TINY = "--train-images 16 --test-images 8 --epochs 1 -b 8"
MANIFEST = (
    '{{"format": 1, "data": {{"name": "digits", "classes": 10, "train": 9, "test": 9, "image": [1, 8, 8]}}, '
    '"planned": {planned}, "failures": {{}}}}'
)


def digits() -> Any:
    return load("digits", train_images=16, test_images=8)


def binary() -> nn.Module:
    torch.manual_seed(0)
    return bonn_qat.binarize(Net(), input_size=SIZE)


@functools.cache
def weights(scheme: str = "bonn") -> bytes:
    """What a comparison leaves beside a result."""
    recipe, data = replace(RECIPE, latents="0.01"), digits()
    header = weights_header(replace(recipe, scheme=scheme), data)
    return dump_tensors(build(recipe, data).state_dict(), header)


@functools.cache
def unfinished(lr: float = RECIPE.lr) -> bytes:
    """What the command with TINY leaves of a run when it is stopped at once."""
    recipe, data = replace(RECIPE, epochs=1, batch_size=8, train_images=16, test_images=8, lr=lr), digits()
    run = Trainer(build(recipe, data), recipe, data, torch.device("cpu"), task=nn.CrossEntropyLoss())
    with tempfile.TemporaryDirectory() as folder:
        return write_state(Path(folder) / "state", capture(run)).read_bytes()


@functools.cache
def packed() -> bonn_qat.PackedModel:
    return bonn_qat.pack(binary().eval(), SIZE)


def packed_file(**changes: object) -> bytes:
    """A packed network's file, with ``changes`` in its header."""
    with tempfile.TemporaryDirectory() as folder:
        tensors, header = read_tensors(packed().save(Path(folder) / "packed"))
    return dump_tensors(tensors, header | changes)


def plugin(name: str, source: str) -> dict[str, Content]:
    """An installed distribution with a plugin, as files."""
    return {
        f"{name}.py": source,
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/entry_points.txt": f"[bonn_qat]\n{name} = {name}\n",
    }


KNOWN = (r"(?<=known: ).*",)
HOOK = "from bonn_qat import Scheme, hookimpl\nfrom bonn_qat.bonn import BONN\n\n@hookimpl\ndef {}:\n    return {}\n"


def raises(target: str, error: BaseException) -> Patch:
    """``target``, a dotted name, raises ``error``."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return lambda monkeypatch: monkeypatch.setattr(target, fail)


def full(number: int) -> Patch:
    """No checkpoint can be written, for that reason of the system's."""

    def fail(path: Path, content: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return lambda monkeypatch: monkeypatch.setattr("bonn_qat.files.tensors.write_bytes", fail)


def killed(number: int) -> Patch:
    """The signal comes where the training would begin."""
    return lambda monkeypatch: monkeypatch.setattr(
        "bonn_qat.studies.run.train", lambda *args, **kwargs: os.kill(os.getpid(), number)
    )


def absent(package: str) -> Patch:
    return lambda monkeypatch: monkeypatch.setitem(sys.modules, package, None)


COMMANDS: Mapping[str, tuple[Command, ...]] = {
    "The command line and recipes": (
        Command(gives="trains-of-thought", names="trains-of-thought"),
        Command(gives="train --learning-rate 1", names="--learning-rate"),
        Command(gives="train --epochs few", names="--epochs", varies=(r"(?<=: ).*",)),
        Command(gives="train --scheme bon", names="'bon'"),
        Command(gives="train --scheme xnor", names="xnor", when="without `bonn-qat-baselines`"),
        Command(gives="train --scheme bonn:klip=1", names="klip"),
        Command(gives="train --scheme xnor:gradient=plan", names="plan", plugins="baselines.xnor"),
        Command(gives="train --model wrn01_16", names="wrn01_16", varies=KNOWN),
        Command(gives="train --epochs 0", names="epochs in the recipe is 0"),
        Command(gives="train --set lr", names="'lr'"),
        Command(gives="train --set lrr=1", names="lrr", varies=KNOWN),
        Command(gives="train --set lr=fast", names="fast"),
        Command(gives="train --lr 0.1 --set lr=0.2", names="--lr"),
        Command(gives="compare --set seed=3", names="seed"),
        Command(gives="""train --set 'stages=[{regularizers={kernle=1e-4}}]'""", names="kernle"),
        Command(gives="train --recipe none.toml", names="none.toml"),
        Command(
            gives="train --recipe a.toml", names="a.toml", when="no TOML in it", files={"a.toml": "lr = "},
            varies=(r"(?<=TOML: ).*",),
        ),
        Command(
            gives="train --recipe a.toml", names="a.toml", when="a key of 31 parts in it",
            files={"a.toml": "a." * 30 + "a = 1"},
        ),
        Command(
            gives="train --recipe a.toml", names="'x'", when="`epochs = 'x'` in it", files={"a.toml": "epochs = 'x'"},
        ),
        Command(
            gives="train --recipe a.toml", names="0.5", when="one stage with `share = 0.5` in it",
            files={"a.toml": "[[stages]]\nshare = 0.5\n"},
        ),
        Command(gives="compare --cores-per-run 2", names="--cores-per-run"),
        Command(gives="compare --ray local", names="bonn-qat[ray]", when="without Ray", patch=absent("ray")),
        Command(gives="reproduce tabel3", names="tabel3"),
        Command(gives="reproduce table3 --scale 2", names="scale is 2"),
        Command(gives="reproduce table3 --set seed=3", names="seed=3"),
    ),
    "Data": (
        Command(gives="train --data digit", names="digit"),
        Command(gives="train --data no/such/folder", names="no/such/folder"),
        Command(
            gives="train --data pictures", names="pictures", when="no folders in it", files={"pictures/a.txt": ""},
            varies=(r"(?<=class: ).*",),
        ),
        Command(
            gives="train --data pictures", names="pictures/val/c", when="`train` has no class `c`",
            files={f"pictures/{name}/1.png": "1" for name in ("train/a", "train/b", "val/a", "val/c")},
        ),
        Command(
            gives="train --data pictures", names="pictures/a/1.png", when="an empty file",
            files={"pictures/a/1.png": "", "pictures/b/1.png": "1"},
        ),
        Command(
            gives="train --data pictures --model wrn10_16 --epochs 1 -b 4 --output results", names="pictures/b/1.png",
            when="which is no picture", code=1, files={f"pictures/{name}/1.png": "1" for name in ("a", "b")},
        ),
        Command(
            gives="train --data cifar10 --data-dir data", names="not in data", when="not there, and no network",
            patch=raises("torchvision.datasets.CIFAR10.download", urllib.error.URLError("no network")),
        ),
        Command(gives="train --train-images 99999", names="99999"),
        Command(gives="train", names="scikit-learn", when="without scikit-learn", patch=absent("sklearn.datasets")),
        Command(gives="reproduce table2", names="table2", plugins="baselines.float,baselines.xnor,baselines.bireal"),
    ),
    "Results and checkpoints": (
        Command(gives="train --output a", names="to a:", when="which is a file", files={"a": ""}),
        Command(
            gives=f"train --output results {TINY}", names="results", when="which holds other runs",
            files={"results/comparison.json": MANIFEST.format(planned="[]")},
        ),
        Command(gives="compare --resume nowhere", names="nowhere"),
        Command(gives="compare --resume results --lr 0.1", names="--lr"),
        Command(
            gives="compare --resume results", names="results", when="of an earlier version",
            files={"results/comparison.json": MANIFEST.format(planned=f'["{RUN}"]')},
        ),
        Command(
            gives="report results", names="results/comparison.json", when="the file was damaged",
            files={"results/comparison.json": '{"format": 1'}, varies=(r"(?<=JSON: ).*",),
        ),
        Command(
            gives=f"train {TINY} --lr 1e30 --output results", names="1e+30", code=1,
            varies=(r"(?<=epoch 1: ).*(?=; try)",),
        ),
        Command(
            gives=f"train {TINY} --output results", names=RUN, when="too little memory", code=1,
            patch=raises("bonn_qat.studies.run.train", MemoryError()),
        ),
        Command(
            gives=f"train {TINY} --set model_options.depht=3 --output results", names="'depht'", code=1,
            varies=(r"(?<=TypeError: ).*",),
        ),
        Command(gives=f"train {TINY} --set checkpoint=a.safetensors --output results", names="a.safetensors"),
        Command(
            gives=f"train {TINY} --set checkpoint=a.safetensors --output results", names="a.safetensors", code=1,
            when="of another network", files={"a.safetensors": lambda: dump_tensors({"head.weight": torch.ones(1)})},
            varies=(r"(?<=WideResNet: ).*",),
        ),
        Command(
            gives=f"train {TINY} --output results", names=UNFINISHED, code=1, when="the checkpoint was altered",
            files={UNFINISHED: lambda: unfinished().replace(b'"seconds', b'"Seconds')},
        ),
        Command(
            gives=f"train {TINY} --output results", names=UNFINISHED, code=1, when="the checkpoint is another run's",
            files={UNFINISHED: lambda: unfinished(lr=0.1)},
        ),
        Command(
            gives=f"train {TINY} --output results", names="results", code=3, when="the disk is full",
            patch=full(errno.ENOSPC),
        ),
        Command(
            gives=f"train {TINY} --output results", names=UNFINISHED, code=3, when="the disk cannot be written",
            patch=full(errno.EROFS),
        ),
        Command(
            gives="export a.safetensors --format onnx --output a", names="a.safetensors", when="of another program",
            files={"a.safetensors": lambda: dump_tensors({"head.weight": torch.ones(1)})},
        ),
        Command(
            gives="export a.safetensors --format onnx --output a", names="a.safetensors", when="not finished",
            files={"a.safetensors": unfinished},
        ),
        Command(
            gives="export a.safetensors --format onnx --output a", names="xnor",
            when="of a scheme that is not installed",
            files={"a.safetensors": lambda: weights("xnor")},
        ),
        Command(gives="export a.safetensors --scheme xnor --format onnx --output a", names="a.safetensors"),
    ),
    "Exports": (
        Command(gives="export wrn10_16 --format onxx --output a", names="onxx"),
        Command(
            gives="export wrn10_16 --format onnx --output a", names="'onnx'", when="without onnxscript",
            patch=absent("onnxscript"),
        ),
        Command(
            gives="export wrn10_16 --format wasm --output a", names="'wasm'", when="without ziglang",
            patch=absent("ziglang"),
        ),
        Command(gives="export wrn10_16 --img-size 32 --format c --output 1net", names="'1net'"),
        Command(
            gives="export birealnet18 --scheme bonn:shortcut=block --format onnx --output a", names="'shortcut'",
        ),
        Command(
            gives="export wrn10_16 --scheme adabin --img-size 32 --format qonnx --output a", names="adabin",
            plugins="baselines.adabin",
        ),
    ),
    "Plugins": (
        Command(
            gives="schemes", names="baselines.xnro", when="`BONN_QAT_PLUGINS=baselines.xnro`",
            plugins="baselines.xnro", varies=(r" or 'baselines.*",),
        ),
        Command(
            gives="summary wrn10_16 --scheme best", names="mine", when="a plugin with a hook that does not exist",
            plugins="mine", files=plugin("mine", HOOK.format("bonn_qat_scheme()", "[]")),
        ),
        Command(
            gives="summary wrn10_16 --scheme best", names="mine", when="a plugin that cannot be imported",
            plugins="mine", files=plugin("mine", "import best"),
        ),
        Command(
            gives="summary wrn10_16", names="bonn_qat.bonn and mine", when="a plugin that offers `bonn` too",
            plugins="mine", files=plugin("mine", HOOK.format("bonn_qat_schemes()", "[BONN]")),
        ),
        Command(
            gives="summary wrn10_16", names="mine", when="a plugin whose `bonn_qat_binarize_layer` raises",
            plugins="mine", files=plugin("mine", HOOK.format("bonn_qat_binarize_layer(layer)", "layer.size")),
        ),
        Command(
            gives="summary wrn10_16 --scheme best", names="first 1.0 and second 1.0", plugins="first",
            when="two distributions with one entry point",
            files={
                **plugin("first", ""),
                **plugin("second", ""),
                "second-1.0.dist-info/entry_points.txt": "[bonn_qat]\nfirst = second\n",
            },
        ),
    ),
    "MLflow": (
        Command(program="python -m bonn_qat_mlflow", gives="sync none", names="none"),
        Command(
            program="python -m bonn_qat_mlflow", gives="sync results", names="comparison.json", when="no plan in it",
            files={"results/comparison.json": "{}\n"},
        ),
    ),
    "Interruptions and several processes": (
        Command(
            gives=f"train {TINY} --output results", names="results", code=130, when="Ctrl-C",
            patch=killed(signal.SIGINT),
        ),
        Command(
            gives=f"train {TINY} --output results", names="results", code=143, when="SIGTERM",
            patch=killed(signal.SIGTERM),
        ),
        Command(
            gives="reproduce table3 --scale 0.01 --output results", names="results", code=130, when="Ctrl-C",
            patch=raises("bonn_qat.studies.reproduce.reproduce", KeyboardInterrupt()),
        ),
        Command(
            gives=f"compare {TINY} --jobs 2 --output results", names="jobs is 2", when="of two processes of torchrun",
            patch=lambda monkeypatch: monkeypatch.setattr("bonn_qat.distributed.world", lambda: 2),
        ),
    ),
}  # fmt: skip


def staged() -> nn.Module:
    """A network in the first of two stages of its training."""
    model = binary()
    layer: Any = model.conv2
    layer.enter(bonn_qat.Stage(weights="float"))
    return model


THINGS: Mapping[str, Callable[[], object]] = {
    "bonn_qat": lambda: bonn_qat,
    "torch": lambda: torch,
    "model": Net,
    "binary": binary,
    "staged": staged,
    "images": lambda: torch.zeros(4, *SIZE),
    "targets": lambda: torch.tensor([0, 3, 9, 1]),
    "packed": packed,
    "digits": digits,
    "nn": lambda: nn,
}

CALLS: Mapping[str, tuple[Call, ...]] = {
    "binarize": (
        Call(gives='bonn_qat.binarize(model, "bon")', names="'bon'", error=UnknownName),
        Call(gives='bonn_qat.binarize("resnet18")', names="resnet18", error=InvalidModel),
        Call(gives="bonn_qat.binarize(model, input_size=16)", names="got 16", error=InvalidModel),
        Call(gives="bonn_qat.binarize(binary)", names="Net", error=InvalidModel),
        Call(gives="bonn_qat.binarize(nn.Conv2d(3, 8, 3))", names="Conv2d", error=InvalidModel),
        Call(gives='bonn_qat.binarize(model, skip="layer1")', names="layer1", error=UnknownName),
        Call(
            gives='bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), include="1")', names="'1'",
            error=InvalidModel,
        ),
        Call(
            gives="bonn_qat.binarize(model, input_size=(1, 8, 8))", names="(1, 8, 8)", error=InvalidModel,
            varies=(r"(?<=8\): ).*(?=; give)",),
        ),
        Call(gives='bonn_qat.binarize(model, example_inputs="images")', names="str", error=InvalidModel),
        Call(gives="bonn_qat.binarize(model, example_inputs=images.double())", names="float64", error=InvalidModel),
        Call(
            gives="bonn_qat.binarize(model, example_inputs=targets)", names="int64 (B)", error=InvalidModel,
            varies=(r"(?<=B\): ).*(?=; give)",),
        ),
        Call(gives="bonn_qat.summary(model)", names="Net", error=InvalidModel),
    ),
    "Losses": (
        Call(gives="bonn_qat.KernelLoss(model)", names="Net", error=InvalidModel),
        Call(gives="bonn_qat.FeatureLoss(binary)(targets)", names="features", error=InvalidModel,
             when="before a forward pass"),
        Call(
            gives='bonn_qat.FeatureLoss(binary, ignore_index="255")', names="got '255'", error=InvalidRecipe,
        ),
        Call(gives='bonn_qat.Objective(binary, regularizers={"kernle": 1.0})', names="kernle", error=UnknownName),
        Call(
            gives='bonn_qat.Objective(binary, options={"kernel": {"mu": 1}})', names="'kernel'", error=InvalidRecipe,
            varies=(r"(?<=fit: ).*",),
        ),
        Call(gives="bonn_qat.Objective(binary)(images, targets + 5)", names="14", error=InvalidData),
        Call(
            gives="bonn_qat.Objective(binary)(images, torch.full((4, 10), 0.1))", names="(4, 10)", error=InvalidData,
        ),
        Call(gives="bonn_qat.Objective(binary)(images / 0, targets)", names="step 1", error=InvalidData),
        Call(gives="bonn_qat.Objective(binary, lambda *_: 0)(images, targets)", names="type int", error=InvalidModel),
    ),
    "Recipes and training": (
        Call(gives="bonn_qat.Stage(share=2)", names="got 2", error=InvalidRecipe),
        Call(gives='bonn_qat.Recipe.from_dict({"optimiser": "sgd"})', names="optimiser", error=UnknownName,
             varies=KNOWN),
        Call(gives="bonn_qat.train(model, bonn_qat.Recipe(), digits)", names="Net", error=InvalidModel),
    ),
    "Packed networks and exports": (
        Call(gives="bonn_qat.pack(model.eval(), (3, 8, 8))", names="Net", error=InvalidModel),
        Call(gives="bonn_qat.pack(staged.eval(), (3, 8, 8))", names="conv2", error=InvalidModel),
        Call(
            gives="bonn_qat.pack(bonn_qat.binarize("
            "nn.Sequential(nn.Conv3d(3, 3, 1), nn.Conv3d(3, 9, 3), nn.Conv3d(9, 3, 1))))",
            names="1 is a BinaryConv3d", error=InvalidModel,
        ),
        Call(gives="bonn_qat.pack(binary, (3, 2, 8, 8))", names="(3, 2, 8, 8)", error=InvalidModel),
        Call(gives="packed(images, images)", names="2 by position", error=InvalidData),
        Call(gives='bonn_qat.export(model, "a", "pt2", input_size=(3, 8, 8))', names="Net", error=InvalidModel),
        Call(gives="packed(images[:, :, :4])", names="(4, 3, 4, 8)", error=InvalidData),
        Call(gives='bonn_qat.PackedModel.load("a.safetensors")', names="a.safetensors", error=InvalidData),
        Call(
            gives='bonn_qat.PackedModel.load("a.safetensors")', names="a.safetensors", error=InvalidData,
            when="cut off", files={"a.safetensors": lambda: packed_file()[:1000]}, varies=(r"(?<=file: ).*",),
        ),
        Call(
            gives='bonn_qat.PackedModel.load("a.safetensors")', names="a.safetensors", error=InvalidData,
            when="altered", files={"a.safetensors": lambda: packed_file(name="Other")},
        ),
        Call(
            gives='bonn_qat.PackedModel.load("a.safetensors")', names="a.safetensors", error=InvalidData,
            when="by another version", files={"a.safetensors": lambda: packed_file(format=9)},
        ),
        Call(
            gives='bonn_qat.PackedModel.load("a.safetensors")', names="a.safetensors", error=InvalidData,
            when="no packed network", files={"a.safetensors": lambda: dump_tensors({"a": torch.ones(1)})},
        ),
    ),
}  # fmt: skip

CASES: Mapping[str, tuple[Case, ...]] = {**COMMANDS, **CALLS}
ALL = [case for cases in CASES.values() for case in cases]


class Told(NamedTuple):
    """The message, and the exit code or the name of the exception."""

    message: str
    outcome: str


def told(case: Case, directory: Path) -> Told:
    """Provoke the error of ``case`` in an empty ``directory``. Raises whatever is not told as it should be."""
    with _alone(case, directory):
        raw = _run(case) if isinstance(case, Command) else _call(case)
    message = raw.message.replace(str(directory), "DIR")
    for expression in case.varies:
        message, count = re.subn(expression, lambda match: re.sub(r"\S.*", "...", match[0]), message)
        assert count, f"{expression} is nowhere in {message}"
    return raw._replace(message=message)


@contextlib.contextmanager
def _alone(case: Case, directory: Path) -> Iterator[None]:
    """In ``directory`` with the files of ``case``, its patch, and no other plugins than its own."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.chdir(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore", plugins.BrokenPlugin)
        monkeypatch.setenv("BONN_QAT_PLUGINS", "")
        plugins.manager.cache_clear()
        for name, content in case.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = content() if callable(content) else content
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        monkeypatch.syspath_prepend(str(directory))
        monkeypatch.setenv("BONN_QAT_PLUGINS", case.plugins)
        plugins.manager.cache_clear()
        case.patch(monkeypatch)
        try:
            yield
        finally:
            plugins.manager.cache_clear()
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(directory)):
                    del sys.modules[name]


def _run(case: Command) -> Told:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _program(case.program)(shlex.split(case.gives))
    told_out, told_err = (re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()) for stream in (out, err))  # without colours
    message = told_err
    if not message:  # a run that failed, among the results
        message = "".join(line for line in told_out.splitlines(keepends=True) if line.startswith("failed: "))
    return Told(message.removeprefix("bonn-qat: ").removesuffix("\n"), str(code))


def _program(name: str) -> Callable[[list[str]], int]:
    found: Callable[[list[str]], int] = cli.main
    if name != "bonn-qat":
        found = importlib.import_module(f"{name.rpartition(' ')[2]}.__main__").main
    return found


class _Things(dict[str, object]):
    """THINGS, each made when it is first named."""

    def __missing__(self, name: str) -> object:
        if name not in THINGS:
            raise KeyError(name)
        self[name] = THINGS[name]()
        return self[name]


def _call(case: Case) -> Told:
    try:
        eval(case.gives, {}, _Things())
    except BonnQatError as error:
        return Told(str(error), type(error).__name__)
    raise AssertionError(f"{case.gives} raises nothing")


INTRODUCTION = """\
# Errors

Every error that bad input can cause: the input, the message, and the exit code of the command or the exception of the
call. A test provokes each of them, and `python tests/cli/test_errors.py` writes this page; `...` stands for text of
other libraries and for text that differs between machines.

A command prints its message as one line on stderr, prefixed with `bonn-qat: `. If a run fails, the others continue,
and the reasons are printed on stdout below the table. `python -m bonn_qat_mlflow sync`, which sends what was not
logged during the training, has the same exit codes and no prefix.

| exit code | meaning |
|---|---|
| 0 | success, or another process is working on the remaining runs |
| 1 | a run, a benchmark or a plugin failed, memory ran out, another process of the group ended, or the MLflow \
store cannot be reached; the reason is printed |
| 2 | invalid or missing input; nothing was run |
| 3 | results can no longer be written, for example on a full disk, or were removed; finished runs are kept, continue \
with `--resume` |
| 130 | Ctrl-C, after the current step of the run; continue with `--resume` |
| 143 | SIGTERM, after the current step of the run; continue with `--resume` |

Every error about the input is a `bonn_qat.BonnQatError`; an error about a file that cannot be written is an `OSError`.

| exception | is also | |
|---|---|---|
{exceptions}

## Commands
"""

CALLED = """\
## In Python

`model` is a float network, `binary` the same network binarized, `staged` one in a training stage with float weights,
and `packed` a packed one. All take images of shape (3, 8, 8) and have ten classes; `images` is a batch of four.
"""


# Those of bonn_qat.errors, and what is raised by a public function of another module.
EXCEPTIONS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BonnQatError)]
EXCEPTIONS = [*EXCEPTIONS[1:], PackageMissing]


def page(cells: Mapping[str, tuple[str, str]]) -> str:
    """The page with these second and third cells, by the first one."""
    parts = [INTRODUCTION.format(exceptions="\n".join(map(_exception, EXCEPTIONS)))]
    for section, cases in CASES.items():
        if section == next(iter(CALLS)):
            parts.append(CALLED)
        rows = [_row(given(case), *cells[given(case)]) for case in cases]
        head = _row("given", "message", "exception" if section in CALLS else "exit code")
        parts.append("\n".join([f"### {section}", "", head, "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def _exception(kind: type[BonnQatError]) -> str:
    others = [base.__name__ for base in kind.__bases__ if base is not BonnQatError]
    first_line = str(kind.__doc__).partition("\n")[0]
    return _row(_code(f"{kind.__module__}.{kind.__name__}"), ", ".join(map(_code, others)), first_line)


def given(case: Case) -> str:
    """The first cell of the row."""
    shown = f"{case.program} {case.gives}" if isinstance(case, Command) else case.gives
    return ", ".join(filter(None, (_code(shown.replace(f" {TINY}", "")), case.when)))


def cells(found: Told) -> tuple[str, str]:
    """The other cells."""
    return _code(found.message), found.outcome if found.outcome.isdigit() else _code(found.outcome)


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}".replace("|", r"\|")


def _row(*row: str) -> str:
    return f"| {' | '.join(row)} |"


def on_the_page() -> list[tuple[str, str, str]]:
    """The rows of the page's tables of errors."""
    below = PAGE.read_text(encoding="utf-8").partition("\n### ")[2]
    rows = [line.removeprefix("| ").removesuffix(" |") for line in below.splitlines() if line.startswith("| `")]
    return [(first, second, third) for first, second, third in (row.split(" | ") for row in rows)]


@pytest.mark.parametrize("case", ALL, ids=lambda case: re.sub(r"[^\w.=-]+", "-", given(case)).strip("-"))
def test_an_error_is_told_as_the_page_says(case: Case, tmp_path: Path) -> None:
    found = told(case, tmp_path)
    assert "\n" not in found.message
    assert "Traceback" not in found.message
    assert case.names in found.message
    assert found.outcome == case.outcome
    assert (given(case), *cells(found)) in on_the_page(), "run: python tests/cli/test_errors.py"


def test_the_page_has_a_row_for_each_case_and_no_other() -> None:
    rows = on_the_page()
    assert [first for first, _, _ in rows] == [given(case) for case in ALL], "run: python tests/cli/test_errors.py"
    found = {first: (second, third) for first, second, third in rows}
    assert PAGE.read_text(encoding="utf-8") == page(found), "run: python tests/cli/test_errors.py"


def test_no_row_is_there_twice() -> None:
    assert len({given(case) for case in ALL}) == len(ALL)


def test_every_exit_code_of_the_page_has_a_row() -> None:
    documented = re.findall(r"^\| (\d+) \|", INTRODUCTION, re.MULTILINE)
    provoked = {str(case.code) for cases in COMMANDS.values() for case in cases}
    assert set(documented) == provoked | {"0"}


if __name__ == "__main__":
    written = {}
    for case in ALL:
        with tempfile.TemporaryDirectory() as folder:
            written[given(case)] = cells(told(case, Path(folder).resolve()))
    PAGE.write_text(page(written), encoding="utf-8")
