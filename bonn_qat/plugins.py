"""Plugins: load the built-in and the installed ones, and look up schemes and regularizers by name.

A plugin is a module with hooks (:mod:`bonn_qat.hookspecs`). What happens to a faulty one:

- It cannot be imported, has no hook, or one that does not exist, takes other arguments or is no plain function, has the
  entry point name of another plugin, raises where it offers schemes or regularizers, or offers something else: it is
  unloaded, and a :class:`BrokenPlugin` warning says why. Everything else keeps working. An unknown name mentions the
  plugins that are broken.
- An observer raises or calls ``sys.exit``: a warning says so once for each of its hooks, and the training continues.
- A quantizer or regularizer of its raises: :func:`culprit` names the plugin, and only runs that need it fail.
- ``bonn_qat_binarize_layer`` raises, or two plugins offer one name and that name is asked for: an error names them,
  because any other answer could be the wrong network.
"""

import functools
import importlib
import importlib.metadata
import inspect
import itertools
import os
import re
import traceback
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pluggy
import torch
from torch import nn

from bonn_qat import hookspecs
from bonn_qat.errors import (
    BonnQatError,
    InvalidRecipe,
    PluginConflict,
    PluginError,
    UnknownName,
    is_out_of_memory,
)
from bonn_qat.files.plain import one_line
from bonn_qat.hookspecs import Pretrained
from bonn_qat.regularizers import Regularizer
from bonn_qat.scheme import Scheme

DEFAULT_PLUGINS = ("bonn_qat.bonn", "bonn_qat.layers")
OBSERVERS = ("bonn_qat_before_", "bonn_qat_after_", "bonn_qat_describe")  # how the timeline hooks' names begin
_FAULTS = (Exception, SystemExit)  # what a plugin may raise; an interruption is the user's
_TERMINATED = 128 + 15  # the exit code that SIGTERM becomes, which is none of the plugin's
_MOST_OFFERS = 1000


class BrokenPlugin(UserWarning):
    """A plugin that was skipped, or an observer that raised."""


class Manager(pluggy.PluginManager):
    """pluggy's manager, with ``distributions``, plugin -> name and version, and ``broken``, plugin -> reason.

    While ``observes`` is False, plugins are registered without their timeline hooks.
    """

    def __init__(self, *, observes: bool = True) -> None:
        super().__init__(hookspecs.PROJECT)
        self.observes = observes
        self.distributions: dict[str, str] = {}
        self.broken: dict[str, str] = {}
        self._complained: set[tuple[str, str]] = set()
        self._tried: set[tuple[str, str]] = set()
        self.asked = ""  # the plugin that is being asked what it offers

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> pluggy.HookimplOpts | None:
        """As pluggy's, which calls it for each attribute of a plugin; None is for one that is no hook."""
        return super().parse_hookimpl_opts(plugin, name) if self.observes or not name.startswith(OBSERVERS) else None

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """As pluggy's. Raises PluginError for a plugin that does so when it is asked what it offers."""
        if self.asked:
            raise PluginError(f"it unregisters {name or self.get_name(plugin)!r}")
        return super().unregister(plugin, name)

    def try_out(self, plugin: str, offer: Any) -> None:
        """Call the factories of a scheme that the plugin offers, once. Raises what they raise."""
        if isinstance(offer, Scheme) and (plugin, offer.name) not in self._tried:
            with torch.random.fork_rng(devices=[]):
                _ = offer.bits, offer.options, offer.output and offer.output(1)
            self._tried.add((plugin, offer.name))

    def skip(self, plugin: str, reason: str) -> None:
        """Unload ``plugin``, if it is loaded, and warn."""
        if self.has_plugin(plugin):
            self.unregister(name=plugin)
        self.broken[plugin] = reason
        warnings.warn(f"{self.describe(plugin)} is skipped: {reason}", BrokenPlugin, stacklevel=2)

    def complain(self, plugin: str, hook: str, error: BaseException) -> None:
        """Warn, once for each hook, that an observer raised."""
        if (plugin, hook) not in self._complained:
            self._complained.add((plugin, hook))
            words = f"{self.describe(plugin)} failed in {hook}; the run continues without it: {_words_of(error)}"
            warnings.warn(words, BrokenPlugin, stacklevel=2)

    def describe(self, plugin: str) -> str:
        """The plugin, and the distribution that it is from where that is known."""
        distribution = self.distributions.get(plugin)
        return f"the plugin {plugin!r}" + (f" of {distribution}" if distribution else "")

    def callers(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The plugins that have ``hook``, in pluggy's order, each with its function, which ignores other arguments."""
        for found in reversed(getattr(self.hook, hook).get_hookimpls()):
            yield found.plugin_name, functools.partial(_call, found)


def _call(found: pluggy.HookImpl, **arguments: Any) -> Any:
    return found.function(**{name: arguments[name] for name in found.argnames})


def _words_of(error: BaseException) -> str:
    try:
        words = one_line(error) or "no message"
    except Exception:  # the plugin's own exception
        words = "its message cannot be read"
    return f"{type(error).__name__}: {words}"


def _is_fault(error: BaseException) -> bool:
    return not (isinstance(error, SystemExit) and error.code == _TERMINATED)


def create_manager(*, entry_points: bool | Sequence[str] = True, observes: bool = True) -> Manager:
    """A new plugin manager with the built-in plugins and, by default, every installed one.

    The environment variable ``BONN_QAT_PLUGINS``, a comma-separated list of entry point names, restricts the installed
    plugins to those; empty means none. A sequence of names as ``entry_points`` does the same. Unless it ``observes``,
    no plugin is called at the timeline hooks. Warns of BrokenPlugin. Raises UnknownName for a listed plugin that is not
    installed.

    >>> sorted(schemes(create_manager(entry_points=False)))
    ['bonn']
    """
    manager = Manager(observes=observes)
    manager.add_hookspecs(hookspecs)
    for dotted in DEFAULT_PLUGINS:
        manager.register(importlib.import_module(dotted), name=dotted)
    if entry_points is True:
        listed = os.environ.get("BONN_QAT_PLUGINS")
        names = None if listed is None else list(filter(None, (part.strip() for part in listed.split(","))))
        _load_installed(manager, names, "plugin in BONN_QAT_PLUGINS")
    elif entry_points:
        _load_installed(manager, entry_points, "plugin")
    return manager


def _load_installed(manager: Manager, wanted: Sequence[str] | None, kind: str) -> None:
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in _entry_points() if wanted is None or wanted else ():
        found.setdefault(entry.name, []).append(entry)
    for name in found if wanted is None else dict.fromkeys(wanted):
        if name not in found:
            raise UnknownName(kind, name, found)
        manager.distributions[name] = " and ".join(sorted(map(_owner, found[name])))
        if len(found[name]) > 1:
            manager.skip(name, f"{len(found[name])} distributions have this entry point; uninstall all but one")
            continue
        try:
            manager.register(found[name][0].load(), name=name)
        except _FAULTS as error:
            if not _is_fault(error):
                raise
            manager.skip(name, _words_of(error))
            continue
        if reason := _unfit(manager, name):
            manager.skip(name, reason)


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    try:
        yield from importlib.metadata.entry_points(group=hookspecs.PROJECT)
    except Exception:  # one of the installed distributions has a damaged list
        for distribution in importlib.metadata.distributions():
            try:
                yield from distribution.entry_points.select(group=hookspecs.PROJECT)
            except Exception as error:
                words = f"a distribution whose entry points cannot be read is left out: {_words_of(error)}"
                warnings.warn(words, BrokenPlugin, stacklevel=2)


def _owner(entry: importlib.metadata.EntryPoint) -> str:
    try:
        return f"{entry.dist.name} {entry.dist.version}"  # type: ignore[union-attr]
    except Exception:  # its metadata are damaged
        return "an unknown distribution"


def _unfit(manager: Manager, name: str) -> str:
    """What is wrong with the hooks of a loaded plugin; empty if nothing is."""
    callers = manager.get_hookcallers(manager.get_plugin(name)) or []
    docs = "; docs/plugins.md lists the hooks"
    if unknown := [caller.name for caller in callers if not caller.has_spec()]:
        return f"unknown hook {', '.join(map(repr, unknown))}{docs}"
    if not callers and manager.observes:
        return f"it has no hook; mark its functions with bonn_qat.hookimpl{docs}"
    for caller in callers:
        (found,) = (f for f in caller.get_hookimpls() if f.plugin_name == name)
        is_wrapper = found.hookwrapper or found.wrapper
        if is_wrapper or inspect.iscoroutinefunction(found.function) or inspect.isasyncgenfunction(found.function):
            return f"{caller.name} is no plain function, but {'a wrapper' if is_wrapper else 'async'}"
        if inspect.isgeneratorfunction(found.function) and caller.name not in dict(_KINDS.values()):
            return f"{caller.name} is a generator, of which nothing would run; leave out yield"
    return ""


@functools.cache
def manager() -> Manager:
    """The plugin manager of this process, created at first use."""
    return create_manager()


def _checked(pm: pluggy.PluginManager | None) -> Manager:
    pm = pm or manager()
    if not isinstance(pm, Manager):
        raise TypeError(f"pm comes from bonn_qat.plugins.create_manager(); got {pm!r}")
    return pm


def installed(pm: pluggy.PluginManager | None = None) -> list[str]:
    """The installed distributions whose plugins are loaded, with their versions."""
    pm = _checked(pm)
    return sorted({distribution for name, distribution in pm.distributions.items() if pm.has_plugin(name)})


def entry_points(pm: pluggy.PluginManager | None = None) -> list[str]:
    """The names by which :func:`create_manager` loads the same installed plugins in another process."""
    pm = _checked(pm)
    return [name for name in pm.distributions if pm.has_plugin(name)]


def faults(pm: pluggy.PluginManager | None = None) -> list[str]:
    """What is wrong with the plugins, a line for each: those that are broken, and names that several offer."""
    pm = _checked(pm)
    conflicts = [
        _conflict(kind, name, offers)
        for kind in _KINDS
        for name, offers in _offers(kind, pm).items()
        if len(offers) > 1
    ]
    return _broken(pm) + conflicts


def schemes(pm: pluggy.PluginManager | None = None) -> dict[str, Scheme]:
    """Every scheme by name, except names that several plugins offer. Warns of BrokenPlugin."""
    return _unique("scheme", pm)


def regularizers(pm: pluggy.PluginManager | None = None) -> dict[str, type[Regularizer]]:
    """Every regularizer class by name, except names that several plugins offer. Warns of BrokenPlugin."""
    return _unique("regularizer", pm)


def pretrained(pm: pluggy.PluginManager | None = None) -> dict[str, Pretrained]:
    """All trained networks by name, without those that several plugins offer under one name."""
    return _unique("pretrained network", pm)


def find_scheme(scheme: str | Scheme, pm: pluggy.PluginManager | None = None) -> Scheme:
    """The scheme of that name; a Scheme is returned as it is.

    Raises UnknownName, PluginConflict if several plugins offer the name, and InvalidRecipe for anything that is not a
    name.

    >>> find_scheme("bonn").title
    'BONN'
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise InvalidRecipe(f"a scheme is a name, such as 'bonn', or a bonn_qat.Scheme; got {scheme!r}")
    return _find("scheme", scheme, pm)  # type: ignore[no-any-return]


def find_regularizer(name: str, pm: pluggy.PluginManager | None = None) -> type[Regularizer]:
    """The regularizer class of that name. Raises UnknownName, and PluginConflict if several plugins offer it."""
    return _find("regularizer", name, pm)  # type: ignore[no-any-return]


def find_pretrained(name: str, pm: pluggy.PluginManager | None = None) -> Pretrained:
    """The trained network of that name. Raises UnknownName, and PluginConflict if several plugins offer it."""
    return _find("pretrained network", name, pm)  # type: ignore[no-any-return]


def _offers(kind: str, pm: Manager) -> dict[str, dict[str, Any]]:
    """Name -> plugin -> what that offers by the name."""
    hook, base = _KINDS[kind]
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for implementation in getattr(pm.hook, hook).get_hookimpls():
        plugin = implementation.plugin_name
        pm.asked = plugin
        try:
            items = list(itertools.islice(implementation.function(), _MOST_OFFERS + 1))
            if len(items) > _MOST_OFFERS:
                raise ValueError(f"it offers more than {_MOST_OFFERS:,}")
            for index, item in enumerate(items):
                _check(kind, item, base)
                pm.try_out(plugin, item)
                if any(item.name == other.name for other in items[:index]):
                    raise ValueError(f"it offers the {kind} {item.name!r} twice")
        except _FAULTS as error:
            pm.asked = ""
            if plugin in DEFAULT_PLUGINS or not _is_fault(error):
                raise
            pm.skip(plugin, f"{hook}: {_words_of(error)}")
        else:
            for item in items:
                found[item.name][plugin] = item
        finally:
            pm.asked = ""
    return found


def _check(kind: str, item: Any, base: type) -> None:
    is_class = base is Regularizer
    if not (isinstance(item, type) and issubclass(item, base) if is_class else isinstance(item, base)):
        what = "a subclass" if is_class else "an instance"
        raise TypeError(f"it offers {item!r}, which is not {what} of bonn_qat.{base.__name__}")
    name = getattr(item, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise TypeError(f"the name of a {kind} consists of letters, digits, '-', '_' and '.'; got {name!r}")
    if inspect.isabstract(item):
        raise TypeError(f"the {kind} {name!r} lacks {', '.join(sorted(item.__abstractmethods__))}")


_KINDS: Mapping[str, tuple[str, type]] = {
    "scheme": ("bonn_qat_schemes", Scheme),
    "regularizer": ("bonn_qat_regularizers", Regularizer),
    "pretrained network": ("bonn_qat_pretrained", Pretrained),
}


def _unique(kind: str, pm: pluggy.PluginManager | None) -> dict[str, Any]:
    offers = _offers(kind, _checked(pm))
    return {name: item for name, offer in offers.items() if len(offer) == 1 for item in offer.values()}


def _find(kind: str, name: str, pm: pluggy.PluginManager | None) -> Any:
    pm = _checked(pm)
    offers = _offers(kind, pm)
    if name not in offers:
        broken = "; ".join(_broken(pm))
        raise UnknownName(kind, name, offers, f"; broken plugins, which may offer it: {broken}" if broken else "")
    if len(offers[name]) > 1:
        raise PluginConflict(_conflict(kind, name, offers[name]))
    return next(iter(offers[name].values()))


def _broken(pm: Manager) -> list[str]:
    return [f"{pm.describe(name)}: {reason}" for name, reason in pm.broken.items()]


def _conflict(kind: str, name: str, plugins: Mapping[str, Any]) -> str:
    *others, last = plugins
    return (
        f"several plugins offer the {kind} {name!r}: {', '.join(others)} and {last}; uninstall all but one, "
        "or name the plugins to load in BONN_QAT_PLUGINS"
    )


def binarize_layer(
    pm: pluggy.PluginManager | None, scheme: Scheme, name: str, layer: nn.Module, parent: nn.Module, channels: int
) -> nn.Module | None:
    """The first answer to ``bonn_qat_binarize_layer``, or None without one.

    Raises PluginError, which names the plugin, for an exception there or an answer that is not a module, and every
    BonnQatError with the plugin's name.
    """
    pm, hook = _checked(pm), "bonn_qat_binarize_layer"
    for plugin, call in pm.callers(hook):
        own = plugin in DEFAULT_PLUGINS
        who = f"the scheme {scheme.name!r}" if own else pm.describe(plugin)
        try:
            found = call(scheme=scheme, name=name, layer=layer, parent=parent, channels=channels)
        except BonnQatError as error:
            if not own:
                error.args = (f"{who}: {error}",)
            raise
        except _FAULTS as error:
            if is_out_of_memory(error) or not _is_fault(error):
                raise
            if own and (maker := _raiser(error, pm)):
                who = f"{who} of {pm.describe(maker[0])}"
            raise PluginError(f"{name}: {who} failed in {hook}: {_words_of(error)}") from error
        if isinstance(found, nn.Module):
            return found
        if found is not None:
            raise PluginError(f"{name}: {who} returned {found!r} from {hook}, which is not a module")
    return None


def culprit(error: BaseException, pm: pluggy.PluginManager | None = None) -> str | None:
    """A line on the plugin whose code raised ``error``, which is named with its place; None if it was none's."""
    pm = _checked(pm)
    plugin = _raiser(error, pm)
    if plugin is None:
        return None
    name, place = plugin
    return f"{pm.describe(name)} failed in {place}: {_words_of(error)}"


def _raiser(error: BaseException, pm: Manager) -> tuple[str, str] | None:
    """The plugin with the innermost frame, by its module or else by its package, and that frame's file and line."""
    own = hookspecs.__name__.partition(".")[0]
    modules = {
        name: found.__name__ if isinstance(found, types.ModuleType) else type(found).__module__
        for name, found in pm.list_name_plugin()
    }
    for parts in (None, 1):
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
            here = str(frame.f_globals.get("__name__")).split(".")[:parts]
            for name, module in modules.items():
                if here[0] != own and here == module.split(".")[:parts]:
                    return name, f"{frame.f_code.co_filename}:{line}"
    return None


class Observers:
    """The timeline hooks of ``pm``, each a method. An exception in an observer becomes a warning.

    >>> Observers(create_manager(entry_points=False)).bonn_qat_describe(directory=None)
    []
    """

    def __init__(self, pm: pluggy.PluginManager | None = None) -> None:
        self._pm = _checked(pm)

    def __getattr__(self, hook: str) -> Callable[..., list[Any]]:
        def tell(**arguments: Any) -> list[Any]:
            answers: list[Any] = []
            for plugin, call in self._pm.callers(hook):
                try:
                    answers.append(call(**arguments))
                except _FAULTS as error:
                    if not _is_fault(error):
                        raise
                    self._pm.complain(plugin, hook, error)
            return [answer for answer in answers if answer is not None]

        return tell
