import dataclasses
from pathlib import Path

import pytest

from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.scheme import Stage
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.schedule import lr_factor, stage_of


def test_dict_and_recipe_are_inverse() -> None:
    recipe = Recipe(epochs=3, stages=(Stage(share=0.5, regularizers={"kernel": 1e-4}), Stage(share=0.5)), skip=("a.*",))
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_toml_is_read_with_stages(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("lr = 1\nmilestones = [3, 6]\n[[stages]]\nshare = 1\nregularizers = { kernel = 1e-3 }\n")
    recipe = Recipe.from_toml(path)
    assert (recipe.lr, recipe.milestones, recipe.stages[0].regularizers) == (1.0, (3, 6), {"kernel": 1e-3})


@pytest.mark.parametrize("data", ["digits", "cifar10", "cifar100", "fashion-mnist", "somewhere/else"])
def test_every_kind_of_data_has_a_default_recipe(data: str) -> None:
    assert Recipe.default(data).data == data


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ({"epochz": 3}, UnknownName, "unknown key of a recipe 'epochz'; did you mean 'epochs'"),
        ({"stages": [{"sher": 1.0}]}, UnknownName, "unknown key of a stage 'sher'; did you mean 'share'"),
        ({"schedule": "cosin"}, UnknownName, "did you mean 'cosine'"),
        ({"epochs": "3"}, InvalidRecipe, "epochs of a recipe is '3'; a value of type int is needed"),
        ({"augment": 1}, InvalidRecipe, "a value of type bool is needed"),
        ({"epochs": True}, InvalidRecipe, "a value of type int is needed"),
        ({"epochs": 0}, InvalidRecipe, "epochs in the recipe is 0; allowed: at least 1"),
        ({"lr": float("nan")}, InvalidRecipe, "lr in the recipe is nan"),
        ({"latents": "small"}, InvalidRecipe, "'scheme', 'float', 'equal-output' or a standard deviation above 0"),
        ({"stages": [{"share": 0.5}]}, InvalidRecipe, "add up to 0.5, not to 1"),
        ({"stages": [{"share": 1.5}]}, InvalidRecipe, "above 0 and at most 1; got 1.5"),
        ({"stages": 3}, InvalidRecipe, "array of tables"),
    ],
)
def test_bad_recipes_are_told_in_one_line(content: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        Recipe.from_dict(content)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_recipes_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match=r"cannot read the recipe .*none\.toml"):
        Recipe.from_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("lr = = 1")
    with pytest.raises(InvalidRecipe, match=r"bad\.toml is not TOML"):
        Recipe.from_toml(tmp_path / "bad.toml")


def test_step_schedule_multiplies_by_gamma_after_each_milestone() -> None:
    recipe = Recipe(epochs=10, schedule="step", milestones=(3, 6), gamma=0.2)
    assert [lr_factor(recipe, epoch) for epoch in (0, 2.9, 3, 5.9, 6, 9)] == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.04])


def test_one_cycle_peaks_at_the_end_of_the_warmup_and_ends_at_zero() -> None:
    recipe = Recipe(epochs=10, schedule="one_cycle", warmup=0.3)
    factors = [lr_factor(recipe, epoch / 10) for epoch in range(101)]
    assert max(factors) == factors[30] == 1
    assert factors[100] == pytest.approx(0)
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "one_cycle", "step"])
def test_the_rate_is_never_negative_or_above_the_recipe(schedule: str) -> None:
    recipe = Recipe(epochs=7, schedule=schedule, milestones=(2,))
    assert all(0 <= lr_factor(recipe, epoch / 10) <= 1 for epoch in range(70))


def test_stages_share_the_epochs_in_order() -> None:
    stages = (Stage(share=0.8), Stage(share=0.2))
    assert [stage_of(stages, epoch, 10) for epoch in range(1, 11)] == [0] * 8 + [1] * 2
    assert stage_of(stages, 1, 1) == 0


def test_names_tell_runs_apart() -> None:
    base = Recipe()
    others = [dataclasses.replace(base, **change) for change in ({"seed": 1}, {"scheme": "xnor"}, {"latents": "float"})]
    assert len({recipe.name for recipe in [base, *others]}) == 4


def test_factors_let_a_later_stage_start_higher_again() -> None:
    recipe = Recipe(epochs=10, schedule="step", milestones=(3, 6, 8), factors=(0.2, 0.1, 0.02))
    assert [lr_factor(recipe, epoch) for epoch in (0, 2.9, 3, 6, 8, 9.9)] == [1, 1, 0.2, 0.1, 0.02, 0.02]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"milestones": (3, 6), "factors": (0.1,)},
            r"factors in the recipe is \(0.1,\); allowed: one for each milestone",
        ),
        ({"milestones": (3,), "factors": (0.0,)}, "factors in the recipe is .*numbers above 0"),
        ({"gamma": 1e300, "milestones": (1, 2)}, "gamma in the recipe is 1e[+]300; allowed: a number whose power"),
        ({"regularizer_options": {"kernel": 3}}, "regularizer_options.kernel in the recipe is 3; allowed: a table"),
        ({"validation_images": -1}, "validation_images in the recipe is -1; allowed: at least 0"),
        ({"compile": "fast"}, "unknown compile in the recipe 'fast'"),
        ({"precision": "bfloat"}, "unknown precision in the recipe 'bfloat'; did you mean 'bfloat16'"),
    ],
)
def test_impossible_ways_to_train_are_told(changes: dict[str, object], words: str) -> None:
    with pytest.raises((InvalidRecipe, UnknownName), match=words):
        Recipe(**changes)  # type: ignore[arg-type]
