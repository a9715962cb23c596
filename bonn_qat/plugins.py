"""Who is there: default plugins, installed ones by entry point, and what they offer by name."""

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar, cast

import pluggy

from bonn_qat import hookspecs
from bonn_qat.errors import PluginConflict, UnknownName
from bonn_qat.regularizers import Regularizer
from bonn_qat.scheme import Scheme

DEFAULT_PLUGINS = ("bonn_qat.bonn", "bonn_qat.layers")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def create_manager(*, entry_points: bool = True) -> pluggy.PluginManager:
    """A fresh plugin manager with the default plugins and, if asked, every installed one.

    The environment variable ``BONN_QAT_PLUGINS``, a comma-separated list of entry point names, restricts
    the installed plugins to those; empty means none. Raises PluginConflict when a plugin implements a hook
    that does not exist or lacks its arguments, and UnknownName for a listed plugin that is not installed.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for dotted in DEFAULT_PLUGINS:
        manager.register(importlib.import_module(dotted), name=dotted)
    try:
        if entry_points:
            _load_installed(manager)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        # pluggy's own words name the plugin unless it got as far as being registered.
        name = manager.get_name(error.plugin)
        words = "; ".join(str(error).splitlines())
        raise PluginConflict(f"plugin {name!r}: {words}" if name else words) from error
    return manager


def _load_installed(manager: pluggy.PluginManager) -> None:
    entries = importlib.metadata.entry_points(group=hookspecs.PROJECT)
    # pluggy would pass over the second of two entry points of one name without a word.
    for entry in entries:
        owners = sorted({other.dist.name for other in entries if other.name == entry.name and other.dist})
        if len(owners) > 1:
            raise PluginConflict(
                f"two plugins have the entry point {entry.name!r}: {' and '.join(owners)}; uninstall one"
            )
    wanted = os.environ.get("BONN_QAT_PLUGINS")
    if wanted is None:
        manager.load_setuptools_entrypoints(hookspecs.PROJECT)
        return
    for name in dict.fromkeys(filter(None, (part.strip() for part in wanted.split(",")))):
        if not manager.load_setuptools_entrypoints(hookspecs.PROJECT, name=name):
            raise UnknownName("plugin in BONN_QAT_PLUGINS", name, {entry.name for entry in entries})


@functools.cache
def manager() -> pluggy.PluginManager:
    """The process's plugin manager, made at its first use."""
    return create_manager()


def installed(pm: pluggy.PluginManager | None = None) -> list[str]:
    """The installed distributions whose plugins are loaded, with their versions."""
    found = (pm or manager()).list_plugin_distinfo()
    return sorted({f"{distribution.project_name} {distribution.version}" for _, distribution in found})


def schemes(pm: pluggy.PluginManager | None = None) -> dict[str, Scheme]:
    """Every offered scheme by name. Raises PluginConflict if two plugins offer one name."""
    return _offers("scheme", (pm or manager()).hook.bonn_qat_schemes)


def regularizers(pm: pluggy.PluginManager | None = None) -> dict[str, type[Regularizer]]:
    """Every offered regularizer class by name. Raises PluginConflict if two plugins offer one name."""
    return _offers("regularizer", (pm or manager()).hook.bonn_qat_regularizers)


def find_scheme(scheme: str | Scheme, pm: pluggy.PluginManager | None = None) -> Scheme:
    """The scheme of that name (a Scheme is its own answer). Raises UnknownName."""
    return scheme if isinstance(scheme, Scheme) else _find("scheme", scheme, schemes(pm))


def find_regularizer(name: str, pm: pluggy.PluginManager | None = None) -> type[Regularizer]:
    """The regularizer class of that name. Raises UnknownName."""
    return _find("regularizer", name, regularizers(pm))


_Found = TypeVar("_Found")


def _find(kind: str, name: str, offers: dict[str, _Found]) -> _Found:
    if name not in offers:
        raise UnknownName(kind, name, offers)
    return offers[name]


def _offers(kind: str, hook: pluggy.HookCaller) -> dict[str, Any]:
    found: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for implementation in hook.get_hookimpls():
        items: Iterable[_Named] = cast(Any, implementation.function)()
        for item in items:
            if item.name in found:
                first, second = owner[item.name], implementation.plugin_name
                raise PluginConflict(
                    f"two plugins offer the {kind} {item.name!r}: {first} and {second}; uninstall one, "
                    "or name the plugins to load in BONN_QAT_PLUGINS"
                )
            found[item.name], owner[item.name] = item, implementation.plugin_name
    return found
