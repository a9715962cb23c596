"""Links between the documents lead somewhere, and the map of the package is complete."""

import re
from pathlib import Path

import pytest

import bonn_qat

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in ROOT.rglob("*.md") if not re.search(r"/\.", f"/{page.relative_to(ROOT)}"))


def targets(text: str) -> list[str]:
    """Targets of the Markdown links and images in ``text`` that are files, without anchors."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


def test_links_are_found():
    assert targets("[a](b.md#c) `[d](e)` ![f](g.svg) [h](https://i) [j](#k)") == ["b.md", "g.svg"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page):
    missing = [target for target in targets(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()]
    assert not missing


def test_the_index_lists_every_decision_record():
    folder = ROOT / "docs" / "adr"
    listed = targets((folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(path.name for path in folder.glob("0*.md"))


def test_the_map_names_every_folder_and_top_level_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = Path(bonn_qat.__file__).parent
    rooms = {path.relative_to(package).with_suffix("").parts[0] for path in package.rglob("*.py")}
    assert not {room for room in rooms if f"`{room}`" not in text}
