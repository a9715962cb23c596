"""The site of the documentation: ``tox -e docs``.

The source directory is the root of the repository, so that the links in the pages hold here as on a forge.
"""

import inspect
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

project = "bonn-qat"
copyright = "the authors of bonn-qat, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_click", "sphinx_copybutton"]
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
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

nitpicky = True
nitpick_ignore_regex = [  # the types in signatures: other libraries', and our own that nobody makes
    ("py:(class|obj|exc|data)", r"(?!bonn_qat).*"),
    ("py:class", r"bonn_qat\.(engine|files|runtime|studies|tables)\..*|bonn_qat.scheme.PReLU"),
]
suppress_warnings = ["ref.python"]  # a field called "type", where a signature has Python's
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True


def _adapt(app: Sphinx, name: str, text: list[str]) -> None:
    """Where a forge would show a folder, lead to its page; put pages that a page lists below it in the sidebar."""
    text[0] = re.sub(r"(?<=\]\()((?:\.\./)*)(?:\.\.|\.\./README\.md)(?=\))", r"\1../docs/index.md", text[0])
    text[0] = text[0].replace("](../plugins/bonn-qat-runtime)", "](../plugins/bonn-qat-runtime/README.md)")
    if name in CHILDREN:
        text[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{CHILDREN[name]}\n```\n"


def _missing(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    if not any(lines) and what != "attribute" and str(getattr(thing, "__module__", "")).startswith("bonn_qat"):
        logging.getLogger(__name__).warning("%s has no docstring", name)


def _inherited(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    return True if not getattr(thing, "__doc__", None) and inspect.getdoc(thing) else None


def setup(app: Sphinx) -> None:
    """Adapt the pages; let a public name without a docstring fail the build."""
    app.connect("source-read", _adapt)
    app.connect("autodoc-process-docstring", _missing)
    app.connect("autodoc-skip-member", _inherited)
