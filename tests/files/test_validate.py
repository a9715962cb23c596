"""One validator: which values a field takes, and what is said of the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from bonn_qat.errors import InvalidData, InvalidRecipe, UnknownName
from bonn_qat.files.validate import Allowed, OneOf, check_values, read_as, read_own


@dataclass(frozen=True, kw_only=True)
class Leaf:
    number: Annotated[int, Allowed("at least 1", lambda n: n >= 1)] = 1
    word: str = ""


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """With a field of each kind."""

    needed: float
    flag: bool = False
    maybe: int | None = None
    pair: tuple[float, ...] = ()
    items: Sequence[Mapping[str, float]] = ()
    leaves: tuple[Leaf, ...] = ()
    by_name: Mapping[str, Leaf] = field(default_factory=dict)
    kind: Annotated[str, OneOf(("red", "blue"))] = "red"
    any: Any = None


def test_values_become_those_of_the_fields():
    found = read_as(_Arm, {
        "needed": 1, "flag": True, "maybe": None, "pair": [1, 2.5], "items": [{"a": 1}], "leaves": [{"number": 3}],
        "by_name": {"x": {"word": "y"}}, "any": [{}],
    })  # fmt: skip
    assert found == _Arm(
        needed=1.0, flag=True, pair=(1.0, 2.5), items=[{"a": 1.0}], leaves=(Leaf(number=3),),
        by_name={"x": Leaf(word="y")}, any=[{}],
    )  # fmt: skip
    assert isinstance(found.needed, float)
    assert isinstance(found.pair, tuple)
    assert [isinstance(read(1).needed, int) for read in (
        lambda n: read_as(_Arm, {"needed": n}), lambda n: read_own(_Arm, {"needed": n}, "x")
    )] == [False, True]  # fmt: skip
    assert read_as(_Arm, {"needed": 0.5}) == read_own(_Arm, {"needed": 0.5}, "x") == _Arm(needed=0.5)


@pytest.mark.parametrize(
    ("change", "wanted", "own"),
    [
        ({"needed": "1"}, "needed of an arm is '1'; a value of type float is needed", "needed is '1'; a value of type"),
        ({"needed": True}, "needed of an arm is True; a value of type float", "needed is True; a value of type float"),
        ({"flag": 1}, "flag of an arm is 1; a value of type bool", "flag is 1; a value of type bool"),
        ({"maybe": 1.0}, "maybe of an arm is 1.0; a value of type int", "maybe is 1.0; a value of type int"),
        ({"maybe": False}, "maybe of an arm is False; a value of type int", "maybe is False; a value of type int"),
        ({"pair": "ab"}, "pair of an arm is 'ab'; a value of type list", "pair is 'ab'; a value of type list"),
        ({"pair": [1, None]}, "pair.1 of an arm is None; a value of type float", "pair.1 is None; a value of type"),
        ({"items": {}}, "items of an arm is {}; a value of type list", "items is {}; a value of type list"),
        ({"items": [{"a": "b"}]}, "items.0.a of an arm is 'b'; a value", "items.0.a is 'b'; a value of type float"),
        ({"leaves": {}}, "leaves of an arm is {}; a value of type array of tables", "leaves is {}; a value of type"),
        ({"leaves": [3]}, "leaves.0 of an arm is 3; a value of type table", "leaves.0 is 3; a value of type table"),
        ({"leaves": [{"number": "x"}]}, "number of a leaf is 'x'; a value", "leaves.0.number is 'x'; a value of type"),
        ({"leaves": [{"numbr": 1}]}, "unknown key of a leaf 'numbr'; did you mean 'number'?",
         "the keys of leaves.0 differ in ['numbr']"),
        ({"by_name": {"a\n": {"word": 1}}}, "word of a leaf is 1", r"by_name.a\n.word is 1; a value of type str"),
        ({"by_name": {1: {}}}, "by_name of an arm is {1: {}}; a value of type table", "by_name is {1: {}}; a value of"),
        ({"flg": 1}, "unknown key of an arm 'flg'; did you mean 'flag'?", "its keys differ in ['flg']"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, wanted, own):
    content = {"needed": 1.0, **change}
    with pytest.raises((InvalidRecipe, UnknownName)) as caught:
        read_as(_Arm, content)
    assert str(caught.value).startswith(wanted)
    with pytest.raises(InvalidData) as caught:
        read_own(_Arm, content, "x.json is none")
    assert str(caught.value).startswith(f"x.json is none: {own}")


def test_a_missing_key_is_told():
    with pytest.raises(InvalidRecipe, match=r"^needed of an arm is missing$"):
        read_as(_Arm, {})
    with pytest.raises(InvalidData, match=r"^x: its keys differ in \['needed'\]$"):
        read_own(_Arm, {}, "x")


def test_values_that_are_not_allowed_are_told():
    with pytest.raises(InvalidData, match=r"^x: by_name\.a\.number is 0; allowed: at least 1$"):
        read_own(_Arm, {"needed": 1, "by_name": {"a": {"number": 0}}}, "x")
    with pytest.raises(InvalidData, match=r"^x: unknown kind 'rd'; did you mean 'red'\?"):
        read_own(_Arm, {"needed": 1, "kind": "rd"}, "x")
    with pytest.raises(UnknownName, match="unknown kind in the recipe 'green'"):
        check_values(_Arm(needed=1.0, kind="green"), " in the recipe")
