"""Validate plain data against a dataclass: recipes, studies, results, comparisons, checkpoints, headers of files.

msgspec's errors name neither the key of a mapping (``$.failures[...]``) nor the value, so they would need this
walk over the data once more; pydantic takes longer to import than a whole ``bonn-qat --help``.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe, UnknownName
from bonn_qat.files.plain import from_toml, read_text, shown

T = TypeVar("T")
_LARGEST_TOML = 2**16  # bytes


def read_toml(path: str | Path, kind: str) -> dict[str, Any]:
    """The table in a TOML file of at most 64 KiB. Raises InvalidRecipe naming the file, called ``kind``."""
    try:
        return from_toml(read_text(path, _LARGEST_TOML))
    except OSError as error:
        raise InvalidRecipe(f"cannot read the {kind} {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRecipe(f"{path} is not TOML: {error}") from error


def read_as(cls: type[T], content: Any) -> T:
    """Make an instance of the dataclass ``cls`` from the content of a file that a person wrote.

    Fields are str, int, float, bool, Any, other dataclasses, and lists, tuples and mappings of these. An int may stand
    for a float and a list for a tuple; a bool is not a number. A field with a default may be missing. Errors call the
    data by the name of its class: a recipe, an arm.

    >>> @dataclass
    ... class Arm:
    ...     label: str
    ...     weights: tuple[float, ...] = ()
    >>> read_as(Arm, {"label": "x", "weights": [1]})
    Arm(label='x', weights=(1.0,))

    Raises UnknownName for a key that ``cls`` does not have, InvalidRecipe for a missing key or a value of another type.
    """
    made: T = _instance(cls, content, None)
    return made


def read_own(cls: type[T], content: Any, wrong: str) -> T:
    """:func:`read_as` for a file that bonn-qat wrote: ints stay ints, and values must pass :func:`check_values`.

    Raises InvalidData that begins with ``wrong``, such as ``"x.json is not a comparison"``.
    """
    try:
        made: T = _instance(cls, content, "")
    except BonnQatError as error:
        raise InvalidData(f"{wrong}: {error}") from error
    return made


@dataclass(frozen=True)
class Allowed:
    """The values of a field, in words and as a condition: ``Annotated[int, Allowed("above 0", lambda n: n > 0)]``."""

    words: str
    holds: Callable[[Any], bool]

    def __call__(self, name: str, value: Any) -> str | None:
        return None if self.holds(value) else f"{name} is {shown(value)}; allowed: {self.words}"


Line = Annotated[str, Allowed("characters that can be printed", str.isprintable)]


@dataclass(frozen=True)
class OneOf:
    """The names that a field may have: ``Annotated[str, OneOf(("sgd", "adam"))]``."""

    names: Collection[str]

    def __call__(self, name: str, value: Any) -> str | None:
        if value not in self.names:
            raise UnknownName(name, value, self.names)
        return None


def check_values(instance: Any, where: str = "", path: str = "") -> None:
    """Check the fields of a dataclass with the functions in their ``Annotated`` hints, such as :class:`Allowed`.

    Each is given the field's name, with ``path`` before it and ``where`` behind it, and its value; it returns what is
    wrong, or None. Raises InvalidRecipe with what is wrong.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        for rule in getattr(hint, "__metadata__", ()):
            if wrong := rule(f"{path}{name}{where}", getattr(instance, name)):
                raise InvalidRecipe(wrong)


@functools.cache
def _hints(cls: Any) -> Mapping[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _instance(cls: Any, content: Mapping[str, Any], path: str | None) -> Any:
    # `path` leads to `content` in a file that bonn-qat wrote; None in one that a person wrote.
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls) if f.init}
    missing = [name for name, is_needed in known.items() if is_needed and name not in content]
    if path is not None:
        if odd := sorted([*missing, *(content.keys() - known)]):
            whose = f"the keys of {path[:-1]}" if path else "its keys"
            raise InvalidRecipe(f"{whose} differ in {shown(odd)}")
        made = cls(**{key: _value(f"{path}{key}", value, _hints(cls)[key], "") for key, value in content.items()})
        check_values(made, path=path)
        return made
    kind = cls.__name__.strip("_").lower()
    kind = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    for key in content:
        if key not in known:
            raise UnknownName(f"key of {kind}", key, known)
    if missing:
        raise InvalidRecipe(f"{missing[0]} of {kind} is missing")
    return cls(**{key: _value(key, value, _hints(cls)[key], f" of {kind}") for key, value in content.items()})


def _value(name: str, value: Any, hint: Any, of: str) -> Any:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return _value(name, value, inner[0], of)
    if origin is Any or (value is None and type(None) in inner):
        return value
    if type(None) in inner:  # X | None
        return _value(name, value, inner[0], of)
    if is_dataclass(origin) and _is_table(value):
        return _instance(origin, value, None if of else f"{name}.")
    if origin in (tuple, list, Sequence) and isinstance(value, list | tuple):
        items = [_value(f"{name}.{place}", item, inner[0], of) for place, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping) and _is_table(value):
        return {key: _value(f"{name}.{shown(key)[1:-1]}", item, inner[1], of) for key, item in value.items()}
    if origin in (str, int, bool) and isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
        return value
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if of else value
    raise InvalidRecipe(f"{name}{of} is {shown(value)}; a value of type {_type_name(origin, inner)} is needed")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _type_name(origin: Any, inner: tuple[Any, ...]) -> str:
    if origin in (tuple, list, Sequence):
        return "array of tables" if is_dataclass(inner[0]) else "list"
    return "table" if origin in (dict, Mapping) or is_dataclass(origin) else str(origin.__name__)
