"""From YAML files and `key=value` overrides to a typed config, with hydra's compose API.

hydra puts files and overrides together, and nothing else: no working directory changes, no output
folders, no logging. What cannot be read ends there; then every value is put into the schema, so
that all that is wrong with them comes at once, with the file it stands in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, ValidationError
from omegaconf.errors import OmegaConfBaseException
from omegaconf.omegaconf import register_default_resolvers
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]  # a dependency of omegaconf

from qlora_builders.config.checks import check, check_values, required
from qlora_builders.config.knobs import knobs
from qlora_builders.config.overrides import (
    OVERRIDE,
    all_groups,
    groups,
    key_of,
    known_keys,
    no_value,
    prepare_override,
    quote,
)
from qlora_builders.config.own_files import GLOBAL, check_own_files, own_texts, shipped_texts
from qlora_builders.config.references import Text, check_references, path_of, texts
from qlora_builders.config.shipped import demo_path, shipped_dir
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError, did_you_mean, expand_home
from qlora_builders.files.outputs import fault_of_path, write_whole

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
# of hydra, OmegaConf and the YAML reader, for what a config holds
_REFUSALS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError)


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
    prepared: list[str] = []
    problems: list[str] = []
    open_keys: set[str] = set()
    for override in overrides:
        try:
            prepared.append(prepare_override(override, verb, folders))
        except ConfigError as error:
            problems += error.problems
            open_keys.add(key_of(override))
        except _REFUSALS as error:
            problems.append(_translate(error))
            open_keys.add(key_of(override))
    own = own_texts(folders, prepared)
    typed = [text for one in prepared for text in _texts_of(one)]
    check_references([*shipped_texts(folders[0]), *own, *typed])
    lists = {problem: None for text in own for problem in _list_for_keys(text, verb)}
    if lists:
        raise ConfigError(*problems, *lists)
    try:
        tree = _merged(verb, prepared, folders)
    except _REFUSALS as error:
        raise ConfigError(*problems, _in_file(_translate(error), folders, prepared)) from error
    cfg = OmegaConf.structured(VERBS[verb].root)
    _register_resolvers()
    with _no_foreign_resolvers():
        for key, problem in _fill(cfg, tree, verb):
            problems.append(
                _file_of(key, own, [key_of(one) for one in prepared if one.startswith("++")])
                + problem
            )
            open_keys.add(key)
    open_keys |= set(re.findall(r"did you mean '([^']+)'", "\n".join(problems)))
    return cfg, problems, open_keys


def _merged(verb: str, prepared: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """What files and overrides say, put together by hydra; nothing of it is checked."""
    main, *others = (str(folder) for folder in folders)
    search = [f"hydra.searchpath=[{','.join(quote('file://' + o) for o in others)}]"]
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with (
            hydra.initialize_config_dir(config_dir=main, version_base="1.3"),
            _no_foreign_resolvers(),
        ):
            words = [*prepared, *(search if others else [])]
            merged = hydra.compose(VERBS[verb].primary, overrides=words)
    finally:
        GlobalHydra.instance().hydra = previous
    tree: Any = OmegaConf.to_container(merged)
    return tree


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


def _in_file(problem: str, folders: Sequence[Path], prepared: Sequence[str]) -> str:
    """With the user's file that it must be from, if it does not name one."""
    names = [f"{one.replace('=', '/', 1)}.yaml" for one in prepared if not one.startswith("++")]
    own = [name for name in names if any((folder / name).is_file() for folder in folders[1:])]
    return f"{own[0]}: {problem}" if len(own) == 1 and ".yaml" not in problem else problem


def _file_of(key: str, own: Sequence[Text], typed: Iterable[str]) -> str:
    """`experiment/mine.yaml: ` where the value of a key is from there."""
    path = path_of(key)
    if any(path_of(other)[: len(path)] == path for other in typed):
        return ""
    files = [text.where for text in own if text.path[: len(path)] == path]
    return f"{files[-1]}: " if files else ""


def _list_for_keys(text: Text, verb: str) -> Iterator[str]:
    """hydra cannot merge a list with the keys of a section, and does not say which."""
    leaves = knobs(VERBS[verb].root)
    for end in range(1, len(text.path)):
        key = ".".join(text.path[:end])
        takes_keys = key not in leaves or get_origin(leaves[key].type) is dict
        if text.path[end] == "0" and takes_keys and key in known_keys(verb):
            yield f"{text.where}: {key} takes keys and values, not a list"


def _texts_of(override: str) -> Iterator[Text]:
    match = OVERRIDE.fullmatch(override)
    return texts(match[3], override, path_of(match[2])) if match else iter(())


def to_config(tree: DictConfig) -> Any:
    """Resolve every interpolation and turn the tree into dataclass instances.

    Raises:
        ConfigError: for one that leads nowhere.
    """
    try:
        with _no_foreign_resolvers():
            return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error, error.full_key)) from error


def save_config(cfg: Any, path: str | Path) -> None:
    """Write a config as YAML, in one step: a half-written file never has the final name."""
    write_whole(Path(path), to_yaml(cfg).encode())


def to_yaml(cfg: Any) -> str:
    """A config as the YAML that `save_config` writes and `--print-config` shows: an experiment."""
    return f"{GLOBAL}\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def config_folders(config_dir: str | Path | None = None) -> list[Path]:
    """The shipped folder and the user's own, which may add configs but not replace any.

    Raises:
        ConfigError: if `config_dir` is not a folder, or has a file with a shipped one's name, too
            many aliases.
    """
    shipped = shipped_dir("configs")
    if config_dir is None:
        return [shipped]
    fault = fault_of_path(str(config_dir))
    if fault:
        raise ConfigError(f"--config-dir={config_dir} {fault}")
    own = expand_home(config_dir, ConfigError).resolve()
    if not own.is_dir():
        raise ConfigError(f"--config-dir {str(config_dir)!r} is not a folder")
    check_own_files(own, shipped)
    return [shipped, own]


def _translate(error: Exception) -> str:
    """One readable line from what hydra, OmegaConf and the YAML reader say of files."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML: {error.problem}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option}: no such config{did_you_mean(option, error.options or [])}"
    file = re.search(r"In '([^']+)'", str(error))
    where = f"{file[1]}.yaml: " if file else ""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    name = re.search(r"Could not override '([^']+)'", str(error))
    if cause is None and name:
        return f"{where}unknown group {name[1]!r}{did_you_mean(name[1], all_groups())}"
    return where + _first_line(cause or error, cause and cause.full_key)


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
def _no_foreign_resolvers() -> Iterator[None]:
    """Without those of OmegaConf and hydra (`oc.env`, `oc.decode` ...): a config may come from
    anywhere, and is not to read the environment into a file."""
    for name in _FOREIGN_RESOLVERS:
        OmegaConf.clear_resolver(name)
    try:
        yield
    finally:
        register_default_resolvers()


def _register_resolvers() -> None:
    """Again at each call: the registry belongs to the whole process. `now` is hydra's own."""
    resolvers = {"demo": lambda name: str(demo_path(name)), "demo_eval": _demo_eval}
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
