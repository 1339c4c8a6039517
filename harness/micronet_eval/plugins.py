"""Finds plugins by the entry-point group `micronet_eval` and collects what they register."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import pluggy

from micronet_eval import hookspecs
from micronet_eval.errors import InputError

if TYPE_CHECKING:
    from micronet_eval.costs import Formula

Kind = Literal["pruner", "sparsifier", "quantizer", "task", "architecture", "cost", "executor"]
STRATEGIES: tuple[Kind, ...] = ("pruner", "sparsifier", "quantizer")
MOST_KNOWN = 20  # names that a message lists


@dataclass(frozen=True)
class Registered:
    """Something that a plugin registered, and the distribution that it comes from."""

    thing: Any
    package: str


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager, with every installed plugin loaded. Raises InputError where one cannot be imported."""
    plugins = pluggy.PluginManager(hookspecs.PROJECT)
    plugins.add_hookspecs(hookspecs)
    try:
        plugins.load_setuptools_entrypoints(hookspecs.PROJECT)
        plugins.check_pending()
    except Exception as error:  # whatever a foreign package raises while it is imported
        raise InputError(f"a plugin cannot be loaded: {type(error).__name__}: {error}") from error
    return plugins


@cache
def packages() -> Mapping[Any, tuple[str, str]]:
    """The name and version of the distribution that each plugin comes from, which are read from its metadata."""
    return {plugin: (dist.project_name, dist.version) for plugin, dist in manager().list_plugin_distinfo()}


def registered(kind: Kind) -> Mapping[str, Registered]:
    """All that is registered of one kind, by name. Raises InputError where two plugins use one name, or for no kind."""
    if kind not in get_args(Kind):
        raise InputError(unknown("kind", kind, get_args(Kind)))
    plugins = manager()
    found: dict[str, Registered] = {}
    for implementation in getattr(plugins.hook, f"micronet_register_{kind}s").get_hookimpls():
        package = " ".join(packages().get(implementation.plugin, (str(implementation.plugin_name),)))

        def register(name: str, thing: Any, package: str = package) -> None:
            if name in found:
                raise InputError(f"the {kind} {name!r} is registered by both {found[name].package} and {package}")
            found[name] = Registered(thing, package)

        try:
            implementation.function(register)
        except InputError:
            raise
        except Exception as error:  # whatever a foreign package raises
            raise InputError(f"{package} cannot register its {kind}s: {type(error).__name__}: {error}") from error
    return dict(sorted(found.items()))


def add_commands(cli: Any) -> None:
    """Lets every plugin add its commands to `cli`. Raises InputError where one fails."""
    for implementation in manager().hook.micronet_register_commands.get_hookimpls():
        try:
            implementation.function(cli)
        except Exception as error:  # whatever a foreign package raises
            name = implementation.plugin_name
            raise InputError(f"plugin {name} cannot add its commands: {type(error).__name__}: {error}") from error


def lookup(kind: Kind, name: str) -> Any:
    """What is registered under a name. Raises InputError that lists the nearest names, or says what it is instead."""
    known = registered(kind)
    if name not in known:
        others = [other for other in STRATEGIES if name in registered(other)] if kind in STRATEGIES else []
        if others:
            raise InputError(f"{name!a} is no {kind}, but a {' and a '.join(others)}")
        raise InputError(unknown(kind, name, known))
    return known[name].thing


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence about a name that is not known, with the nearest ones that are, or else the first ones."""
    known, told = list(known), f"unknown {kind} {name[:100]!a}"
    if near := difflib.get_close_matches(name, known, cutoff=0.5):
        return f"{told}; nearest: {', '.join(near)}"
    more = f" and {len(known) - MOST_KNOWN:,} more" if len(known) > MOST_KNOWN else ""
    return f"{told}; known: {', '.join(known[:MOST_KNOWN])}{more}" if known else f"{told}; none is known"


def check_options(builder: Callable[..., Any], options: Mapping[str, Any], before: str = "") -> None:
    """Looks at the options of an architecture before its builder does, by the signature that it has.

    Raises InputError that begins with `before` and names the option that is unknown, missing, or not of the type of its
    annotation: text is no number. What an annotation that pydantic does not know allows is left to the builder.
    """
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        parameters = inspect.signature(builder, eval_str=True).parameters
    except NameError:  # annotations that only a type checker can read
        parameters = inspect.signature(builder).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name, value in options.items():
        if name not in named:
            if takes_all:
                continue
            raise InputError(f"{before}field 'architecture.{name}': {unknown('option', name, named)}")
        annotation = named[name].annotation
        if annotation is inspect.Parameter.empty or isinstance(annotation, str):
            continue
        try:  # as JSON, which has no tuples: a list may be one
            TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            raise InputError(f"{before}field 'architecture.{name}': {error.errors()[0]['msg']}") from error
        except PydanticUserError:
            continue
    for name, parameter in named.items():
        if name not in options and parameter.default is parameter.empty:
            raise InputError(f"{before}field 'architecture.{name}': Field required (add this field)")


def formulas() -> Mapping[str, Formula]:
    """The built-in cost formulas and those of plugins. Raises InputError where a plugin overrides one of ours."""
    from micronet_eval.costs import FORMULAS, FREE

    added = registered("cost")
    if clash := sorted(set(added) & {*FORMULAS, *FREE}):
        raise InputError(f"{added[clash[0]].package} registers a cost for {clash[0]}, which micronet-eval defines")
    return {**FORMULAS, **{name: entry.thing for name, entry in added.items()}}


Register = Callable[[str, Any], None]
