"""The site of the documentation: ``tox -e docs``.

The source directory is the root of the repository, so that the links in the pages hold here as on a forge.
"""

import dataclasses
import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

project = "bonn-qat"
copyright = "the authors of bonn-qat, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_click", "sphinx_copybutton", "sphinx_llms_txt"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "docs/notebooks/*_nb.py",
    "benchmarks/README.md",
    "plugins/*/README.md",
    "plugins/bonn-qat-weights/cards/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [".*", "build", "results", "mlruns", "tests"]  # nothing to look for

CHILDREN = {"docs/adr/README": "0*", "docs/pretrained": "../plugins/bonn-qat-weights/cards/*"}

html_theme = "furo"
html_title = "bonn-qat"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]

myst_heading_anchors = 4
nb_custom_formats = {"_nb.py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "auto"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"

nitpicky = True
nitpick_ignore_regex = [  # the types in signatures: other libraries', and our own that nobody makes
    ("py:(class|obj|exc|data)", r"(?!bonn_qat).*"),
    ("py:class", r"bonn_qat\.(engine|files|runtime|studies|tables)\..*|bonn_qat.scheme.PReLU"),
]
suppress_warnings = ["ref.python"]  # a field called "type", where a signature has Python's
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def _adapt(app: Sphinx, name: str, text: list[str]) -> None:
    """Let links lead to pages where a forge would show a folder, and show titles where it shows the names of files."""
    page = re.sub(r"(?<=\]\()((?:\.\./)*)(?:\.\.|\.\./README\.md)(?=\))", r"\1../docs/index.md", text[0])
    page = page.replace("](../plugins/bonn-qat-runtime)", "](../plugins/bonn-qat-runtime/README.md)")
    text[0] = re.sub(r"\[[\w./-]+\.md\]\(", "[](", page)
    if name in CHILDREN:
        text[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{CHILDREN[name]}\n```\n"


def _signature(app: Sphinx, what: str, name: str, thing: Any, options: Any, given: str, returned: str) -> Any:
    """Of a dataclass, give the fields without the checks in their types, and defaults that Sphinx can read."""
    if not (given and dataclasses.is_dataclass(thing)):
        return given, returned
    hints = typing.get_type_hints(thing)
    fields = list(inspect.signature(thing).parameters.values())
    shown = ["*"] if fields[0].kind is inspect.Parameter.KEYWORD_ONLY else []
    for field in fields:
        hint = stringify_annotation(getattr(hints[field.name], "type", hints[field.name]), "smart")
        default = getattr(field.default, "__name__", None) or re.sub("<.*>", "...", repr(field.default))
        shown.append(f"{field.name}: {hint}" + (f" = {default}" if field.default is not field.empty else ""))
    return f"({', '.join(shown)})", returned


def _complain(app: Sphinx, what: str, name: str, thing: Any, *_: Any) -> bool | None:
    """Warn of a function or class of ours that neither says what it is nor overrides one that does."""
    if str(getattr(thing, "__doc__", "")).startswith("Alias for field number"):
        return True  # a field of a named tuple, which its class describes
    if inspect.isroutine(thing) or inspect.isclass(thing) or isinstance(thing, property):
        where = str((thing.fget if isinstance(thing, property) else thing).__module__)
        if where.startswith("bonn_qat") and name[0] != "_" and not inspect.getdoc(thing):
            logging.getLogger(__name__).warning("%s of %s has no docstring", name, where)
    return None


def _demo(app: Sphinx, error: Exception | None) -> None:
    """Put the page that runs networks in the browser beside the others, with its networks."""
    if not error:
        source, folder = Path(app.confdir, "demo"), Path(app.outdir, "docs", "demo")
        shutil.copytree(
            source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "nets", "__pycache__")
        )
        subprocess.run([sys.executable, source / "make.py", "--output", folder / "nets"], check=True)


def setup(app: Sphinx) -> None:
    """Adapt the pages; let a public name without a docstring fail the build."""
    app.connect("source-read", _adapt)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _complain)
    app.connect("autodoc-skip-member", _complain)
    app.connect("build-finished", _demo)
