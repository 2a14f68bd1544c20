"""Config nodes with a `component:` key become objects: a row of the table, or what a user allows.

A config file may come from anywhere, and most of what can be imported was not written to be called
by a stranger: a row of the table is one class, and a path is checked before anything is imported.
Outside the table it needs a prefix from the command line (`--allow PREFIX`), and what it leads to
must itself be defined below that prefix: `mine.os.system` is refused although it starts well.
Nothing in a config adds a prefix, and a node's arguments are one mapping until the component itself
is called, so that no key of a node is ever an argument of ours.
"""

from __future__ import annotations

import importlib
import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qlora_builders.config.overrides import OTHER_NAMES
from qlora_builders.errors import ConfigError, did_you_mean, nearest, optional_import

# kind -> the arguments of such a component that the run gives, and no config
GIVEN: dict[str, tuple[str, ...]] = {
    "optimizer": ("params",),
    "logger": ("run_dir", "first_step", "config"),
}
_TORCH = (
    "AdamW", "Adam", "SGD", "Adafactor", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adadelta",
    "Adamax", "ASGD", "Rprop", "Muon",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A class that is meant to be named.

    Attributes:
        kind: a key of `GIVEN`: what it is used as.
        extra: what installs the package it is in, where that is optional.
    """

    path: str
    kind: str
    extra: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


TABLE: dict[str, Row] = {
    row.path: row
    for row in (
        *(Row(f"torch.optim.{name}", "optimizer") for name in _TORCH),
        Row("bitsandbytes.optim.AdamW8bit", "optimizer", "bitsandbytes"),
        Row("bitsandbytes.optim.PagedAdamW", "optimizer", "bitsandbytes"),
        Row("bitsandbytes.optim.PagedAdamW8bit", "optimizer", "bitsandbytes"),
        Row("torchao.optim.AdamW8bit", "optimizer", "torchao"),
        Row("qlora_builders.training.loggers.TensorBoardLogger", "logger"),
        Row("qlora_builders.training.loggers.WandbLogger", "logger"),
    )
}

_REFUSALS = (TypeError, ValueError, RuntimeError)  # whose text says enough
_OWN = __name__.partition(".")[0]
_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=())


@contextmanager
def allow_prefixes(prefixes: Sequence[str]) -> Iterator[None]:
    """Also allow components below these packages, within the `with` block.

    Raises:
        ConfigError: for what is no package, and for this one, where the table has the last word.
    """
    for prefix in prefixes:
        parts = prefix.removesuffix(".").split(".")
        if not all(part.isidentifier() for part in parts):
            raise ConfigError(f"--allow {prefix!r} is not a package, such as my_package.optimizers")
        if parts[0] == _OWN:
            raise ConfigError(
                f"--allow {prefix!r}: what configs may name of {_OWN} they may name without; allow "
                "a package of your own"
            )
    extra = tuple(prefix.removesuffix(".") + "." for prefix in prefixes)
    token = _allowed.set(_allowed.get() + extra)
    try:
        yield
    finally:
        _allowed.reset(token)


def instantiate(
    node: Mapping[str, Any],
    kind: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    key: str,
) -> Any:
    """Call the component that `node` names.

    Args:
        node: `component` is the dotted path; the other keys are keyword arguments.
        kind: what it is to be, a key of `GIVEN`.
        args, kwargs: what the run gives, such as the parameters of an optimizer.
        key: the node's full config key, for error messages.

    Raises:
        ConfigError: for a path that is neither in the table nor allowed, or that leads nowhere, for
            an argument that the component does not take or the run gives, and for whatever the call
            raises.
        ImportError: if the component's package is optional and missing.
    """
    component, arguments = resolve_component(node, kind, key=key)
    try:
        return component(*args, **{**arguments, **(kwargs or {})})
    except ImportError:
        raise
    except Exception as error:  # a constructor checks its arguments, or stumbles over them
        reason = error if isinstance(error, _REFUSALS) else repr(error)
        raise ConfigError(f"{key}: {node['component']} refuses its arguments: {reason}") from error


def resolve_component(
    node: Mapping[str, Any], kind: str, *, key: str
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
    arguments = {name: value for name, value in node.items() if name != "component"}
    _check_names(arguments, kind, key)
    row = TABLE.get(path)
    if row is None:
        component = _locate(path, f"{key}.component", kind)
    elif row.kind != kind:
        raise ConfigError(
            f"{key}.component={path!r} is a component of kind {row.kind}, and this is a place for "
            f"kind {kind}{nearest_row(path, kind)}"
        )
    else:
        name = path.removesuffix(f".{row.name}")
        module = optional_import(name, row.extra) if row.extra else importlib.import_module(name)
        component = getattr(module, row.name)
    _check_keywords(component, path, arguments, key)
    return component, arguments


def _check_names(arguments: Mapping[Any, Any], kind: str, key: str) -> None:
    """What no component takes from a config, whatever its signature says."""
    for name in arguments:
        if name in GIVEN[kind]:
            raise ConfigError(f"{key}.{name} is given by the run; take it out of the config")
        public = isinstance(name, str) and name.isidentifier() and not name.startswith("_")
        if not public or keyword.iskeyword(name):
            raise ConfigError(f"{key}: {name!r} is not the name of an argument")


def _locate(path: str, key: str, kind: str) -> Callable[..., Any]:
    """Import and walk a dotted path, staying inside the allowed prefixes at every step."""
    allow = _allowed.get()
    if not _inside(path, allow):
        beside = f" nor inside {', '.join(allow)}" if allow else ""
        raise ConfigError(
            f"{key}={path!r} is no {kind} that a config may name{beside}{nearest_row(path, kind)}; "
            "--allow PREFIX on the command line adds a package"
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
    given = {name for names in GIVEN.values() for name in names}
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in named:
            options = [option for option in named if option not in given]
            other = OTHER_NAMES.get(name, "").rpartition(".")[2]
            near = did_you_mean(other if other in options else name, options)
            raise ConfigError(f"{key}.{name} is not an argument of {path}{near}")


def _home(found: Any) -> str:
    """Where an object says it is defined; a value without a home counts as its type's."""
    return str(getattr(found, "__module__", None) or type(found).__module__)


def _inside(path: str, allow: Sequence[str]) -> bool:
    return any(path.startswith(prefix) for prefix in allow)


def nearest_row(path: str, kind: str) -> str:
    """`; did you mean 'torch.optim.AdamW'?`, by the whole path or by the class's name alone."""
    rows = [row for row in TABLE.values() if row.kind == kind]
    name = nearest(path.rpartition(".")[2], [row.name for row in rows])
    same_name = [row.path for row in rows if row.name == name]
    return did_you_mean(path, same_name or [row.path for row in rows])
