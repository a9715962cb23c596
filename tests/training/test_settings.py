import pytest

from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.scheme import Stage
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.settings import with_settings

STAGED = Recipe(stages=(Stage(share=0.25), Stage(share=0.75, regularizers={"kernel": 1e-4})))


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("lr=0.5", "lr", 0.5),
        ("epochs = 7", "epochs", 7),
        ("weight_decay=0", "weight_decay", 0.0),
        ("augment=false", "augment", False),
        ("milestones=[20, 40]", "milestones", (20, 40)),
        ('skip=["layer1.*"]', "skip", ("layer1.*",)),
        ("model=resnet18", "model", "resnet18"),
        ('model="resnet18"', "model", "resnet18"),
        ("latents=0.01", "latents", "0.01"),
        ("checkpoint=a=b.safetensors", "checkpoint", "a=b.safetensors"),
        ("checkpoint=", "checkpoint", ""),
        ("scheme_options.granularity=plane", "scheme_options", {"granularity": "plane"}),
        ("scheme_options={clip = 0.5, granularity = 'plane'}", "scheme_options", {"clip": 0.5, "granularity": "plane"}),
        ("regularizer_options.kernel.nu=1e-3", "regularizer_options", {"kernel": {"nu": 1e-3}}),
        ("stages=[{share = 1.0, weights = 'float'}]", "stages", (Stage(weights="float"),)),
    ],
)
def test_a_setting_is_a_key_of_the_recipe_and_a_value_as_in_toml(setting: str, field: str, value: object) -> None:
    changed = with_settings(STAGED, [setting])
    assert getattr(changed, field) == value
    assert {**changed.to_dict(), field: None} == {**STAGED.to_dict(), field: None}


def test_dots_lead_into_tables_and_lists_and_leave_what_is_beside() -> None:
    settings = ["stages.0.share=0.5", "stages.1.share=0.5", "stages.1.regularizers.feature=1e-3"]
    first, second = with_settings(STAGED, settings).stages
    assert first == Stage(share=0.5)
    assert second == Stage(share=0.5, regularizers={"kernel": 1e-4, "feature": 1e-3})
    twice = with_settings(Recipe(), ["scheme_options.a=1", "scheme_options.b=x", "scheme_options.a=2"])
    assert twice.scheme_options == {"a": 2, "b": "x"}


def test_no_setting_changes_nothing() -> None:
    assert with_settings(STAGED, []) == STAGED


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("lr", InvalidRecipe, "the setting 'lr' is not of the form KEY=VALUE"),
        ("=1", InvalidRecipe, "the setting '=1' is not of the form KEY=VALUE"),
        ("lrr=1", UnknownName, "unknown key of a recipe 'lrr'; did you mean 'lr'"),
        ("option.clip=1", UnknownName, "unknown key of a recipe 'option'; did you mean '.*scheme_options"),
        ("lr=fast", InvalidRecipe, "lr of a recipe is 'fast'; a value of type float is needed"),
        ("lr=0", InvalidRecipe, "lr in the recipe is 0.0; allowed: a number above 0"),
        ("lr.scale=1", InvalidRecipe, r"lr\.scale cannot be set: lr in the recipe is 0\.05 and not a table"),
        ("schedule=cosin", UnknownName, "unknown schedule in the recipe 'cosin'; did you mean 'cosine'"),
        ("stages.2.share=1", UnknownName, "unknown entry of stages in the recipe '2'; known: 0, 1"),
        ("stages.0.shar=1", UnknownName, "unknown key of a stage 'shar'; did you mean 'share'"),
        ("stages.0.share=0.5", InvalidRecipe, r"the shares of the stages add up to 1\.25, not to 1"),
    ],
)
def test_what_a_recipe_does_not_allow_is_named(setting: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        with_settings(STAGED, [setting])
