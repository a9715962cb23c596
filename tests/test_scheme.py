"""Schemes as data: options of quantizers and weights of regularizers."""

import copy
import dataclasses
import math

import pytest
import timm
import torch
from torch import nn

from bonn_qat import binarize
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.objective import Objective
from bonn_qat.quantizers import BonnWeight, SteSign
from bonn_qat.scheme import NONLINEARITIES, Scheme, Stage
from bonn_qat.studies.compare import plan
from bonn_qat.training.recipe import Recipe

PLAIN = Scheme(name="plain", title="", reference="", weight=BonnWeight, activation=SteSign)
STAGED = dataclasses.replace(
    BONN,
    stages=(
        Stage(share=0.5, regularizers={"center": 1e-2, "kernel": 1e-5}, weights="float", activations="relu"),
        Stage(share=0.2, lr_scale=0.1),
        Stage(share=0.3, regularizers={"kernel": 1e-4, "feature": 1e-3}, recompute_norms=True),
    ),
)


def test_the_options_name_every_regularizer_with_its_last_weight():
    assert {name: BONN.options[name] for name in ("kernel", "feature")} == {"kernel": 1e-4, "feature": 1e-3}
    assert {name: STAGED.options[name] for name in ("kernel", "feature", "center")} == {
        "kernel": 1e-4, "feature": 1e-3, "center": 1e-2
    }  # fmt: skip
    assert not {"kernel", "feature"} & dataclasses.replace(BONN, stages=(Stage(),)).options.keys()


@pytest.mark.parametrize("weight", [0, 0.0, 2, 0.5])
def test_a_weight_is_set_where_the_regularizer_is_and_nowhere_else(weight):
    scheme = STAGED.configure({"kernel": weight})
    assert [dict(stage.regularizers) for stage in scheme.stages] == [
        {"center": 1e-2, "kernel": weight}, {}, {"kernel": weight, "feature": 1e-3}
    ]  # fmt: skip
    assert scheme.options["kernel"] == weight
    assert scheme.regularizers["kernel"] == weight
    for own, other in zip(STAGED.stages, scheme.stages, strict=True):
        assert dataclasses.replace(other, regularizers=own.regularizers) == own


def test_no_option_changes_nothing():
    assert STAGED.configure({}) == STAGED


def test_every_option_can_be_set_to_itself():
    scheme = BONN.configure(BONN.options)
    assert scheme.options == BONN.options
    assert scheme.stages == BONN.stages


@pytest.mark.parametrize("weight", [-1e-9, math.inf, math.nan, True, "1e-4", None])
def test_a_weight_that_is_none_is_told(weight):
    with pytest.raises(InvalidRecipe, match=r"the weight of the regularizer 'feature' must be .* at least 0; got"):
        BONN.configure({"feature": weight})


def test_a_regularizer_that_no_stage_has_is_told():
    with pytest.raises(UnknownName, match=r"unknown option of the scheme 'bonn' 'kernle'; did you mean 'kernel'"):
        BONN.configure({"kernle": 0})
    with pytest.raises(UnknownName, match="option of the scheme 'bonn' 'center'"):
        BONN.configure({"center": 0})


def test_a_variant_without_losses_is_an_arm_of_its_own_and_trains_without():
    both, neither = plan(Recipe(), schemes=["bonn", "bonn:kernel=0+feature=0"])
    assert both.name != neither.name
    assert neither.scheme_spec == "bonn:feature=0+kernel=0"
    scheme: Scheme = BONN.configure(neither.scheme_options)
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)), nn.Flatten(), nn.Linear(3, 2))
    objective = Objective(binarize(network, scheme))
    assert all(regularizer.weight == 0 for regularizer in objective.regularizers.values())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("identity", lambda x: x),
        ("relu", lambda x: x.clamp(min=0)),
        ("hardtanh", lambda x: x.clamp(-1, 1)),
        ("prelu", lambda x: torch.where(x > 0, x, x / 4)),
    ],
)
def test_a_nonlinearity_can_be_named(name, function):
    x = torch.randn(2, 3, 4, 4)
    made = BONN.configure({"nonlinearity": name}).nonlinearity(3)
    torch.testing.assert_close(made(x), function(x))
    assert set(NONLINEARITIES) == {"identity", "relu", "hardtanh", "prelu"}
    model = binarize(timm.create_model("wrn10_16", num_classes=2), BONN.configure({"nonlinearity": name}))
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(model.layer1[0].act1(x), function(x))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"nonlinearity": "prleu"}, UnknownName, "nonlinearity of the scheme 'bonn' 'prleu'; did you mean 'prelu'"),
        ({"shortcut": "convs"}, UnknownName, "shortcut of the scheme 'bonn' 'convs'; did you mean 'conv'"),
        ({"shortcut": True}, UnknownName, "shortcut of the scheme 'bonn' 'True'; known: block, conv"),
        (
            {"norm_position": "before"},
            UnknownName,
            "norm_position of the scheme 'bonn' 'before'; did you mean 'before_",
        ),
        ({"projection": "conv_pool"}, UnknownName, "projection of the scheme 'bonn' 'conv_pool'; did you mean 'conv_"),
        ({"nonlinearity_position": "after"}, UnknownName, "nonlinearity_position of the scheme 'bonn' 'after'"),
        ({"latent_std": 0}, InvalidRecipe, "latent_std of .* must be a number above 0, or 'equal-output'; got 0"),
        ({"norm": "batch"}, InvalidRecipe, "norm of the scheme 'bonn' must be a class or function .*; got 'batch'"),
        (
            {"latent_std": "small"},
            InvalidRecipe,
            "latent_std of .* must be a number above 0, or 'equal-output'; got 'sm",
        ),
    ],
)
def test_an_option_of_the_scheme_itself_is_checked(options, error, words):
    with pytest.raises(error, match=words):
        BONN.configure(options)


def test_regularizers_fill_the_only_stage():
    scheme = dataclasses.replace(PLAIN, regularizers={"kernel": 1e-4})
    written = Scheme(
        name="plain", title="", reference="", weight=BonnWeight, activation=SteSign, regularizers={"kernel": 1e-4}
    )
    assert scheme == written
    assert scheme.stages == (Stage(regularizers={"kernel": 1e-4}),)
    assert scheme.regularizers == {"kernel": 1e-4}
    assert PLAIN.regularizers == {}
    assert scheme.options["kernel"] == 1e-4
    assert dataclasses.replace(scheme, latent_std=0.5).stages == scheme.stages
    assert dataclasses.replace(scheme, stages=STAGED.stages).regularizers == {"kernel": 1e-4, "feature": 1e-3}
    assert scheme.configure({"kernel": 2}).stages == (Stage(regularizers={"kernel": 2.0}),)
    assert copy.deepcopy(scheme) == scheme
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    assert list(Objective(binarize(network, scheme)).regularizers) == ["kernel"]


def test_regularizers_beside_stages_are_refused():
    with pytest.raises(InvalidRecipe, match=r"'plain' has both regularizers and stages; with stages, write Stage"):
        dataclasses.replace(PLAIN, regularizers={"kernel": 1e-4}, stages=STAGED.stages)
    with pytest.raises(InvalidRecipe, match="has both"):
        dataclasses.replace(STAGED, regularizers={"kernel": 1e-4})
    with pytest.raises(InvalidRecipe, match=r"map names to weights, such as .*; got \['kernel'\]"):
        dataclasses.replace(PLAIN, regularizers=["kernel"])
    with pytest.raises(InvalidRecipe, match="the weight of 'kernel' in a stage must be a number of at least 0; got -1"):
        dataclasses.replace(PLAIN, regularizers={"kernel": -1})


def test_a_scheme_knows_the_options_that_were_given():
    assert BONN.configure({"clip": 1.0, "nonlinearity": "prelu", "kernel": 1e-4}).given == frozenset()
    first = BONN.configure({"clip": 0.5, "shortcut": "block"})
    assert first.given == {"clip", "shortcut"}
    assert first.configure({"granularity": "plane"}).given == {"clip", "shortcut", "granularity"}
    assert dataclasses.replace(first, latent_std=1.0).given == {"clip", "shortcut"}


def test_a_float_scheme_takes_no_options():
    with pytest.raises(UnknownName, match="unknown option of the scheme 'float' 'shortcut'; known: none"):
        dataclasses.replace(PLAIN, name="float", weight=None, activation=None).configure({"shortcut": "block"})


@pytest.mark.parametrize("start", [None, "equal-output", 0.01, 1, 1e-5, 0.1 + 0.2, 1 / 3])
def test_a_start_in_words_is_the_latents_of_a_recipe(start):
    assert Recipe(latents=dataclasses.replace(BONN, latent_std=start).start).latent_std == start
