"""Config nodes with a `component:` key become objects, from an allow-list of packages only.

A config file may come from anywhere, so a dotted path in it is checked against the allow-list
before anything is imported, and what it leads to must itself be defined inside the allow-list:
`torch.optim.some_module.os.system` is refused although it starts well. More prefixes can be
allowed on the command line (`--allow PREFIX`), never by a config.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from qlora_builders.config.other_names import OTHER_NAMES
from qlora_builders.errors import ConfigError, did_you_mean, optional_import

ALLOWED_PREFIXES = ("qlora_builders.", "torch.optim.")
# Allowed by their exact names: optional packages, and the extra that installs each.
OPTIONAL_COMPONENTS = {
    "bitsandbytes.optim.AdamW8bit": "bitsandbytes",
    "bitsandbytes.optim.PagedAdamW": "bitsandbytes",
    "bitsandbytes.optim.PagedAdamW8bit": "bitsandbytes",
    "torchao.optim.AdamW8bit": "torchao",
}
_REFUSALS = (TypeError, ValueError, RuntimeError)  # whose text says enough
_RUNTIME = ("params", "optimizer")  # arguments that no config gives
_extra_prefixes: ContextVar[tuple[str, ...]] = ContextVar("extra_prefixes", default=())


@contextmanager
def allow_prefixes(prefixes: Sequence[str]) -> Iterator[None]:
    """Also allow components below these packages, within the `with` block."""
    extra = tuple(prefix.rstrip(".") + "." for prefix in prefixes)
    token = _extra_prefixes.set(_extra_prefixes.get() + extra)
    try:
        yield
    finally:
        _extra_prefixes.reset(token)


def instantiate(
    node: Mapping[str, Any],
    *args: Any,
    key: str,
    allow: Sequence[str] = ALLOWED_PREFIXES,
    **kwargs: Any,
) -> Any:
    """Call the component that `node` names.

    Args:
        node: `component` is the dotted path; the other keys are keyword arguments.
        args, kwargs: runtime arguments, such as the parameters of an optimizer.
        key: the node's full config key, for error messages.
        allow: prefixes a path may have, beside those of `allow_prefixes`.

    Raises:
        ConfigError: for a path outside the allow-list or that leads nowhere, for a keyword the
            component does not take, and for whatever the call raises.
        ImportError: if the component's package is optional and missing.
    """
    component, arguments = resolve_component(node, key=key, allow=allow)
    try:
        return component(*args, **arguments, **kwargs)
    except ImportError:
        raise
    except Exception as error:  # a constructor checks its arguments, or stumbles over them
        reason = error if isinstance(error, _REFUSALS) else repr(error)
        raise ConfigError(f"{key}: {node['component']} refuses its arguments: {reason}") from error


def resolve_component(
    node: Mapping[str, Any], *, key: str, allow: Sequence[str] = ALLOWED_PREFIXES
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The callable a node names and its keyword arguments, both checked, nothing called.

    Raises:
        ConfigError: as `instantiate`, except for the call.
    """
    path = node.get("component")
    if not isinstance(path, str):
        raise ConfigError(
            f"{key}.component={path!r} must be a dotted path, such as torch.optim.AdamW"
        )
    if path in OPTIONAL_COMPONENTS:
        module, _, name = path.rpartition(".")
        component = getattr(optional_import(module, OPTIONAL_COMPONENTS[path]), name)
    else:
        component = _locate(path, f"{key}.component", (*allow, *_extra_prefixes.get()))
    arguments = {str(name): value for name, value in node.items() if name != "component"}
    _check_keywords(component, path, arguments, key)
    return component, arguments


def _locate(path: str, key: str, allow: Sequence[str]) -> Callable[..., Any]:
    """Import and walk a dotted path, staying inside `allow` at every step."""
    if not _inside(path, allow):
        raise ConfigError(
            f"{key}={path!r} is outside the allowed packages: {', '.join(allow)};"
            " --allow PREFIX on the command line adds one"
        )
    parts = path.split(".")
    if not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise ConfigError(f"{key}={path!r} is not a dotted path of public names")
    found, depth = _import_longest(parts, key)
    for position in range(depth, len(parts)):
        name, parent = parts[position], ".".join(parts[:position])
        if not hasattr(found, name):
            public = [option for option in dir(found) if not option.startswith("_")]
            near = did_you_mean(name, public) if public else ""
            raise ConfigError(
                f"{key}={path!r}: {parent!r} has no {name!r}"
                + (near if near.startswith("; did") else "")
            )
        found = getattr(found, name)
        home = found.__name__ if isinstance(found, ModuleType) else _home(found)
        if not _inside(home + ".", allow):
            raise ConfigError(
                f"{key}={path!r} leads out of the allowed packages:"
                f" {parent}.{name} is defined in {home!r}"
            )
    if not callable(found):
        raise ConfigError(f"{key}={path!r} is a {type(found).__name__}, not a class or function")
    return found


def _import_longest(parts: list[str], key: str) -> tuple[Any, int]:
    """The module that the longest importable prefix names, and how many parts it takes."""
    path = ".".join(parts)
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise ConfigError(f"{key}={path!r}: importing {name!r} fails: {error}") from error
            if depth == 1:
                raise ConfigError(f"{key}={path!r}: there is no module {name!r}") from error
            return module, depth - 1
    return module, len(parts) - 1


def _check_keywords(
    component: Callable[..., Any], path: str, arguments: Mapping[str, Any], key: str
) -> None:
    try:
        parameters = inspect.signature(component).parameters.values()
    except ValueError:
        return  # some builtins have no signature; the call itself will say what is wrong
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in named:
            options = [option for option in named if option not in _RUNTIME]
            other = OTHER_NAMES.get(name, "").rpartition(".")[2]
            near = did_you_mean(other if other in options else name, options)
            raise ConfigError(f"{key}.{name} is not an argument of {path}{near}")


def _home(found: Any) -> str:
    """Where an object says it is defined; a value without a home counts as its type's."""
    return str(getattr(found, "__module__", None) or type(found).__module__)


def _inside(path: str, allow: Sequence[str]) -> bool:
    return any(path.startswith(prefix) for prefix in allow)
