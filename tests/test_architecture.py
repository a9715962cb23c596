"""Import rules, the cost of importing the package, and docstrings of public names."""

import ast
import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bonn_qat

PACKAGE = Path(bonn_qat.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a room, which is a folder or a module at the top level, imports from lower ranks only, and rooms
# of one rank do not know each other. Imports inside functions are exempt: they postpone what is expensive, or reach
# for a host that may be absent.
RANKS = (
    ("errors", "engine", "modes", "environment", "conv_types"),
    ("files", "functional", "heads", "inputs", "plotting", "distributed"),
    ("quantizers", "runtime", "tables"),
    ("scheme", "regularizers"),
    ("hookspecs",),
    ("layers", "plugins", "bonn"),
    ("objective", "binarization"),
    ("inspection", "bop", "models", "adapters"),
    ("training", "packing"),
    ("bench", "exporting", "studies"),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
HOSTS = {
    "accelerate", "bonn_qat_runtime", "brevitas", "lightning", "matplotlib", "mlflow", "onnx", "onnxruntime", "qonnx",
    "ray", "sklearn", "timm", "torchao", "torchvision",
}  # fmt: skip


def room(path: Path) -> str:
    """The first part of a module's name below the package; a folder is one room."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement that importing the module runs: not what stands in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node):
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports; ``from bonn_qat import x`` counts as ``bonn_qat.x``."""
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "bonn_qat":
                yield from (f"bonn_qat.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def test_every_module_has_one_rank():
    assert {room(path) for path in FILES} == set(RANK)
    assert sum(map(len, RANKS)) == len(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_inwards(path):
    own = room(path)
    others = {name.split(".")[1] for name in imported(path) if name.startswith("bonn_qat.")} - {own}
    outward = {name for name in others if RANK[name] >= RANK[own]}
    assert not outward, f"{own} (rank {RANK[own]}) imports {sorted(outward)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_host_is_imported_where_it_is_adapted(path):
    hosts = {name.split(".")[0] for name in imported(path)} & HOSTS
    allowed = {"models": {"timm"}, "adapters": {path.stem}, "plotting": {"matplotlib"}}
    if path.name == "image_folder.py":  # which is imported where a folder is read
        hosts -= {"torchvision"}
    assert hosts <= allowed.get(room(path), set())


def test_functional_and_the_engine_need_torch_alone():
    for path in (PACKAGE / "functional.py", *(PACKAGE / "engine").glob("*.py")):
        own = {name.split(".")[0] for name in imported(path) if not name.startswith("bonn_qat.engine")}
        assert own - sys.stdlib_module_names <= {"torch"}


COSTLY = {*HOSTS, "torch", "numpy", "pluggy", "rich"}


@pytest.mark.parametrize("code", ["import bonn_qat", "import bonn_qat; bonn_qat.BonnQatError", "import bonn_qat.cli"])
def test_importing_the_package_or_the_command_line_loads_neither_torch_nor_a_host(code):
    code += "; import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert COSTLY & set(json.loads(done.stdout)) == set()


def test_the_lazy_names_are_those_that_type_checkers_see():
    block, _ = filter(is_type_checking, ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body)
    seen = {
        alias.asname or alias.name: (node.module.removeprefix("bonn_qat."), alias.name)
        for node in block.body
        for alias in node.names
    }
    assert seen == bonn_qat._HOME
    assert sorted(seen) == bonn_qat.__all__


def test_no_module_has_the_name_of_a_function():
    assert not set(bonn_qat.__all__) & set(RANK)


@pytest.mark.parametrize("name", ["functional", "quantizers", "plugins", "models", "adapters", "bench"])
def test_a_module_is_an_attribute_of_the_package(name):
    assert getattr(bonn_qat, name) is importlib.import_module(f"bonn_qat.{name}")


def test_a_misspelt_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'bonn_qat' has no attribute 'binarise'"):
        _ = bonn_qat.binarise
    assert {*bonn_qat.__all__, "__version__"} <= set(dir(bonn_qat))
    assert bonn_qat.__version__ == importlib.metadata.version("bonn-qat")


def test_every_public_name_exists_and_says_what_it_is():
    for name in bonn_qat.__all__:
        public = getattr(bonn_qat, name)
        if callable(public):
            assert public.__doc__, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_classes_and_functions_have_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = [] if ast.get_docstring(tree) or not tree.body else ["the module"]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        # What a hook is for stands at its specification.
        is_hook = node.name.startswith("bonn_qat_") and path.name != "hookspecs.py"
        if not is_hook and not ast.get_docstring(node):
            silent.append(node.name)
    assert not silent
