"""Settings: changes to a recipe, written as ``KEY=VALUE``."""

from collections.abc import Sequence
from typing import Any

from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.files import plain
from bonn_qat.training.recipe import Recipe


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A copy of ``recipe`` with each ``KEY=VALUE`` applied in turn, such as ``lr=0.1`` or ``milestones=[20, 40]``.

    KEY is a field of the recipe; dots lead into its tables and lists: ``scheme_options.granularity=plane``,
    ``stages.0.share=0.5``. VALUE is TOML, where the quotes of a string may be left out.

    >>> with_settings(Recipe(), ["lr=0.1", "scheme_options.granularity=plane"]).scheme_options
    {'granularity': 'plane'}

    Raises InvalidRecipe for a setting without a value, a key inside something that is neither a table nor a list, and
    values that the recipe does not allow; UnknownName for a field that it does not have.
    """
    content = recipe.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise InvalidRecipe(f"the setting {setting!r} is not of the form KEY=VALUE")
        path = key.strip().split(".")
        if path[0] not in content:
            raise UnknownName("key of a recipe", path[0], content)
        value = plain.toml_value(text.strip())
        if len(path) == 1 and isinstance(content[path[0]], str) and not isinstance(value, str):
            value = text.strip()
        content = _put(content, path, value, ())
    return Recipe.from_dict(content)


def _put(within: Any, path: Sequence[str], value: Any, above: tuple[str, ...]) -> Any:
    """A copy of ``within`` with ``value`` at ``path``; ``above`` is the path to ``within``, for errors."""
    if not path:
        return value
    first, *rest = path
    if isinstance(within, list):
        known = [str(index) for index in range(len(within))]
        if first not in known:
            raise UnknownName(f"entry of {'.'.join(above)} in the recipe", first, known)
        index = int(first)
        return [*within[:index], _put(within[index], rest, value, (*above, first)), *within[index + 1 :]]
    if not isinstance(within, dict):
        whole = ".".join((*above, *path))
        raise InvalidRecipe(f"{whole} cannot be set: {'.'.join(above)} in the recipe is {within!r} and not a table")
    return {**within, first: _put(within.get(first, {}), rest, value, (*above, first))}
