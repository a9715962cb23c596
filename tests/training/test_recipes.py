from pathlib import Path

import pytest

from bonn_qat.training.network import check
from bonn_qat.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("bonn_qat/training/recipes/*.toml"), *ROOT.glob("benchmarks/recipes/*.toml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_run(path: Path) -> None:
    check(Recipe.from_toml(path))
