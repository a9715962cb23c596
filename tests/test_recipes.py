from pathlib import Path

import pytest

from bonn_qat.recipe import Recipe
from bonn_qat.train import check

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*ROOT.glob("bonn_qat/recipes/*.toml"), *ROOT.glob("benchmarks/recipes/*.toml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_run(path: Path) -> None:
    check(Recipe.from_toml(path))
