"""From YAML files and `key=value` overrides to a typed config, with hydra's compose API.

hydra puts files and overrides together, and nothing else: no working directory changes, no output
folders, no logging. What cannot be read ends there; then every value is put into the schema, so
that all that is wrong with them comes at once, with the file it stands in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, ValidationError
from omegaconf.errors import OmegaConfBaseException
from omegaconf.omegaconf import register_default_resolvers

from qlora_builders.config.checks import check, check_values, required
from qlora_builders.config.overrides import key_of, known_keys, no_value, parse_override
from qlora_builders.config.own_files import (
    GLOBAL,
    Keys,
    OwnConfig,
    all_groups,
    check_references,
    config_folders,
    groups,
    node_at,
    own_configs,
    path_of,
)
from qlora_builders.config.sections import knobs
from qlora_builders.config.shipped import demo_path, shipped_dir
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError, did_you_mean
from qlora_builders.files.outputs import write_whole

_MARK = "\0{"  # for ${ while hydra merges: it would write some of them out
_FOREIGN_RESOLVERS = (
    "oc.create",
    "oc.decode",
    "oc.deprecated",
    "oc.dict.keys",
    "oc.dict.values",
    "oc.env",
    "oc.select",
    "hydra",
    "python_version",
)
# of hydra and OmegaConf, for what a config holds
_REFUSALS = (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError)


def compose(
    verb: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None
) -> Any:
    """The checked config of a verb: an instance of its root in `schema.py`.

    Args:
        verb: a key of `VERBS`.
        overrides: `key=value` and `group=option`, as on the command line.
        config_dir: a folder with more configs, in the same groups as the shipped ones.

    Raises:
        ConfigError: with everything that is wrong with files, overrides or values.
    """
    cfg, problems = draft(verb, overrides, config_dir=config_dir)
    if problems:
        raise ConfigError(*problems)
    return cfg


def draft(
    verb: str,
    overrides: Sequence[str] = (),
    *,
    config_dir: str | Path | None = None,
    for_run: bool = True,
) -> tuple[Any, list[str]]:
    """The config of a verb without the values that are wrong, and everything that is wrong.

    What follows from a mistake is not listed beside it: whoever writes `data.trian` need not hear
    that data.train is missing.

    Args:
        for_run: what a run needs has to be there.

    Raises:
        ConfigError: if there is no such verb, or files or overrides cannot be read.
    """
    tree, problems, open_keys = _compose(verb, overrides, config_dir)
    try:
        cfg = to_config(tree)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error

    def note(found: Sequence[str]) -> None:
        about = [re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w.])") for key in open_keys]
        problems.extend(text for text in found if not any(key.search(text) for key in about))

    if open_keys & set(groups(verb)):  # what their files set is not known
        note(check_values(cfg))
        return cfg, problems
    note(check(cfg))
    if for_run and VERBS[verb].needs_files:
        open_keys |= {text.partition("=")[0] for text in check_values(cfg)}
        note(required(cfg))
    return cfg, problems


def compose_tree(
    verb: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None
) -> DictConfig:
    """The composed config before what it may hold together is checked.

    Raises:
        ConfigError: with everything that is wrong with files, overrides or single values.
    """
    tree, problems, _ = _compose(verb, overrides, config_dir)
    if problems:
        raise ConfigError(*problems)
    return tree


def _compose(
    verb: str, overrides: Sequence[str], config_dir: str | Path | None
) -> tuple[DictConfig, list[str], set[str]]:
    """The config, what is wrong with single overrides and values, and the keys without theirs."""
    if verb not in VERBS:
        raise ConfigError(f"no config for {verb!r}{did_you_mean(verb, VERBS)}")
    folders = config_folders(config_dir)
    choices: dict[str, str] = {}
    typed: list[tuple[Keys, Any]] = []
    problems: list[str] = []
    open_keys: set[str] = set()
    for override in overrides:
        try:
            key, value, is_choice = parse_override(override, verb, folders)
        except _REFUSALS as error:
            problems += getattr(error, "problems", [_first_line(error, None)])
            open_keys.add(key_of(override))
        else:
            if is_choice:
                choices[key] = value
            else:
                typed.append((path_of(key), value))
    own: dict[str, OwnConfig] = {}
    try:
        own = own_configs(folders, [f"{group}/{option}" for group, option in choices.items()])
        for name, one in own.items():
            _check_own(f"{name}.yaml: ", one.keys, verb)
        tree = _merged(verb, choices, own)
    except RecursionError as error:
        circle = ", ".join(f"{name}.yaml" for name in own)
        raise ConfigError(f"{circle}: their defaults lead back to themselves") from error
    except _REFUSALS as error:
        names = ", ".join(f"{name}.yaml" for name in own)
        said = getattr(error, "problems", None) or [f"{names}: {_first_line(error, None)}"]
        raise ConfigError(*problems, *said) from error
    for path, value in typed:
        _put(tree, path, value)

    def where(path: Keys) -> str:
        """`experiment/mine.yaml: ` where the value is from there."""
        if any(path[: len(other)] == other or other[: len(path)] == path for other, _ in typed):
            return ""
        files = [name for name, one in own.items() if node_at(one.keys, path)[1] == len(path)]
        return f"{files[-1]}.yaml: " if files else ""

    check_references(tree, where)
    cfg = OmegaConf.structured(VERBS[verb].root)
    with _own_resolvers():
        for key, problem in _fill(cfg, tree, verb):
            problems.append(where(path_of(key)) + problem)
            open_keys.add(key)
    open_keys |= set(re.findall(r"did you mean '([^']+)'", "\n".join(problems)))
    return cfg, problems, open_keys


def _merged(verb: str, choices: Mapping[str, str], own: Mapping[str, OwnConfig]) -> dict[str, Any]:
    """What files say, put together by hydra; nothing of it is checked or resolved."""
    store = ConfigStore.instance()
    before = GlobalHydra.instance().hydra, store.repo
    GlobalHydra.instance().clear()
    store.repo = {**store.repo, **{group: {} for group in all_groups()}}
    try:
        for name, one in own.items():
            group, _, option = name.rpartition("/")
            store.store(option, _map_text(one.tree, "${", _MARK), group=group, package=one.package)
        shipped = str(shipped_dir("configs"))
        with hydra.initialize_config_dir(config_dir=shipped, version_base="1.3"):
            words = [f"{group}={option}" for group, option in choices.items()]
            merged = hydra.compose(VERBS[verb].primary, overrides=words)
    finally:
        GlobalHydra.instance().hydra, store.repo = before
    tree: Any = _map_text(OmegaConf.to_container(merged), _MARK, "${")
    return tree


def _map_text(tree: Any, old: str, new: str) -> Any:
    """With another text in all values, such as one that means nothing to OmegaConf for `${`."""
    if isinstance(tree, dict):
        return {key: _map_text(value, old, new) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_text(value, old, new) for value in tree]
    return tree.replace(old, new) if isinstance(tree, str) else tree


def _put(tree: Any, path: Keys, value: Any) -> None:
    """Set a value; the keys of a mapping go beside those that are there."""
    node, end = node_at(tree, path)
    if isinstance(node, dict) and isinstance(value, dict) and end == len(path):
        for key, inner in value.items():
            _put(node, (key,), inner)
        return
    *above, last = path
    for part in above:
        inner = tree[int(part)] if isinstance(tree, list) else tree.get(part)
        if not isinstance(inner, dict | list):
            inner = tree[int(part) if isinstance(tree, list) else part] = {}
        tree = inner
    tree[int(last) if isinstance(tree, list) else last] = value


def _fill(cfg: DictConfig, tree: Mapping[str, Any], verb: str) -> Iterator[tuple[str, str]]:
    """Put every value into the schema; gives the key of each that does not fit, and why.

    Its place keeps the default.
    """
    root = VERBS[verb].root
    for key, value in _leaves(tree, root, ""):
        if key not in knobs(root):
            yield key, no_value(key, value, verb)
            continue
        try:
            OmegaConf.update(cfg, key, value, merge=False)
        except _REFUSALS as error:
            yield key, _first_line(error, key)


def _leaves(tree: Mapping[str, Any], section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every value of a tree by its key; whole mappings only where the schema has no section."""
    hints = get_type_hints(section)
    for name, value in tree.items():
        inner = hints.get(str(name))
        if is_dataclass(inner) and isinstance(value, dict):
            yield from _leaves(value, inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_own(where: str, tree: Any, verb: str) -> None:
    """What has to be right in a file before hydra merges it with others.

    It cannot merge a list with the keys of a section, and does not say which.
    """
    check_references(tree, lambda _: where)
    leaves = knobs(VERBS[verb].root)
    problems = []
    for key in known_keys(verb):
        node, end = node_at(tree, path_of(key))
        takes_keys = key not in leaves or get_origin(leaves[key].type) is dict
        if takes_keys and isinstance(node, list) and end == len(path_of(key)):
            problems.append(f"{where}{key} takes keys and values, not a list")
    if problems:
        raise ConfigError(*problems)


def to_config(tree: DictConfig) -> Any:
    """Resolve every interpolation and turn the tree into dataclass instances.

    Raises:
        ConfigError: for one that leads nowhere.
    """
    try:
        with _own_resolvers():
            return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error, error.full_key)) from error


def save_config(cfg: Any, path: str | Path) -> None:
    """Write a config as YAML, in one step: a half-written file never has the final name."""
    write_whole(Path(path), to_yaml(cfg).encode())


def to_yaml(cfg: Any) -> str:
    """A config as the YAML that `save_config` writes and `--print-config` shows: an experiment."""
    return f"{GLOBAL}\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def _first_line(error: BaseException, key: object) -> str:
    text = str(error).strip().splitlines()[0]
    found = getattr(error, "full_key", None)
    key = f"{key}[{found}]" if isinstance(found, int) else found or key
    if isinstance(error, ValidationError):
        text = re.sub(r" of type '\w+'| \(type \w+\)", "", text)
        for kind, meaning in (("Integer", "whole number"), ("Float", "number")):
            text = text.replace(f"could not be converted to {kind}", f"is not a {meaning}")
        text = text.replace("is not a valid bool", "is neither true nor false")
        text = re.sub(r"field '.*' is not Optional", "null is not allowed here", text)
        text = re.sub(r"^Invalid value.*not a ListConfig.*", "takes a list, such as [a,b]", text)
        text = re.sub(r"^Cannot assign (\w+) to Dict.*", r"takes {key: value, ...}, not \1", text)
    text = text.replace(
        "Cannot merge DictConfig with ListConfig", "a list takes [a,b], not keys and values"
    )
    return f"{key}: {text}" if key else text


def _demo_eval(train: str) -> str | None:
    """The demo's eval rows say nothing about a model trained on other data."""
    return str(demo_path("eval.jsonl")) if train == str(demo_path("train.jsonl")) else None


@contextmanager
def _own_resolvers() -> Iterator[None]:
    """Without those of OmegaConf and hydra (`oc.env`, `oc.decode` ...): a config may come from
    anywhere, and is not to read the environment into a file. The registry is the whole process's.
    """
    for name in _FOREIGN_RESOLVERS:
        OmegaConf.clear_resolver(name)
    for name, resolver in (("demo", lambda name: str(demo_path(name))), ("demo_eval", _demo_eval)):
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    try:
        yield
    finally:
        register_default_resolvers()
