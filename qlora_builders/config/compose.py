"""From YAML files and `key=value` overrides to a typed config, with hydra's compose API.

Only the composition is hydra's: no working directory changes, no output folders, no logging. What
the user wrote is compared with the schema first, so that a typo is named with its nearest valid
spelling; what hydra and OmegaConf still refuse is translated into the same kind of message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, ValidationError
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from omegaconf.omegaconf import register_default_resolvers
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]  # a dependency of omegaconf

from qlora_builders.config.checks import check, check_values, required
from qlora_builders.config.overrides import (
    OVERRIDE,
    groups,
    key_of,
    prepare_override,
    primary_config,
    quote,
    unknown_key,
    values_of_file,
)
from qlora_builders.config.own_files import GLOBAL, check_own_files, texts_of
from qlora_builders.config.references import RefusedError, Text, check_references, path_of, texts
from qlora_builders.config.schema import ROOTS, WITHOUT_FILES
from qlora_builders.config.shipped import demo_path, shipped_dir
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
    """The checked config of a verb: an instance of its root in `schema.ROOTS`.

    Args:
        verb: a key of `ROOTS`.
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
    known: dict[str, list[str]] | None = None,
) -> tuple[Any, list[str]]:
    """The config of a verb without the overrides that are wrong, and everything that is wrong.

    Where they are not all right, each override is judged by itself, and each value of a file too.
    Then all that are left are checked together. What follows from a mistake is not listed beside
    it: whoever writes `data.trian` need not hear that data.train is missing.

    Args:
        for_run: what a run needs has to be there.
        known: overrides that are wrong, with their messages: those of earlier calls, to which this
            one adds. Saves the jobs of a sweep from finding the same mistake again.

    Raises:
        ConfigError: if there is no such verb, or `config_dir` cannot be used.
    """
    drafting = Drafting(verb, _folders_of(verb, config_dir), {} if known is None else known)
    drafting.add_what_is_right(sorted(overrides, key=lambda one: not drafting.is_group(one)))
    problems = drafting.all_problems(for_run and verb not in WITHOUT_FILES)
    return drafting.cfg, problems


class Drafting:
    """A config that grows by overrides, as long as they are right.

    Attributes:
        problems: one message for each thing that is wrong with those left out.
    """

    def __init__(self, verb: str, folders: Sequence[Path], known: dict[str, list[str]]) -> None:
        self.verb, self.folders, self._known = verb, folders, known
        self.problems: list[str] = []
        self._taken: list[str] = []
        self._open: set[str] = set()  # keys without the value that they were to have
        self._lacks_a_file = False  # so that any key may be without
        self.cfg: Any = None

    def is_group(self, override: str) -> bool:
        return key_of(override) in groups(self.verb)

    def add_what_is_right(self, overrides: Sequence[str], where: str = "") -> None:
        """Take those that are right, groups first as hydra does; note what is wrong with others."""
        for override in overrides:
            if override in self._known:
                self._note(override, self._known[override])
        overrides = [one for one in overrides if one not in self._known]
        try:
            self._add(overrides)
        except ConfigError as error:
            if len(overrides) > 1:
                half = len(overrides) // 2
                self.add_what_is_right(overrides[:half], where)
                self.add_what_is_right(overrides[half:], where)
            else:
                self._take_apart(overrides[0], where, error)

    def _add(self, overrides: Sequence[str]) -> None:
        with _translated_errors(self.verb):
            prepared = [prepare_override(one, self.verb, self.folders) for one in overrides]
        tree = _compose_prepared(self.verb, [*self._taken, *prepared], self.folders)
        self.cfg = to_config(tree)
        self._taken += prepared

    def _take_apart(self, override: str, where: str, error: ConfigError) -> None:
        """Take what is right in a file that is wrong; note an override that is no file."""
        before = len(self.problems)
        if self.is_group(override) and not isinstance(error, RefusedError):
            values = values_of_file(override, self.verb, self.folders)
            self.add_what_is_right(values, where=f"{override.replace('=', '/')}.yaml: ")
        if len(self.problems) == before:
            file = self._own_file(override)
            if file is not None and file.name not in str(error) and not where:
                where = f"{file.parent.name}/{file.name}: "
            self._known[override] = [where + problem for problem in error.problems]
            self._note(override, self._known[override])

    def _own_file(self, override: str) -> Path | None:
        """Of the user's: the config that a group's override names."""
        group, _, option = override.partition("=")
        files = [folder / group / f"{option}.yaml" for folder in self.folders[1:]]
        return next((f for f in files if self.is_group(override) and f.is_file()), None)

    def _note(self, override: str, problems: Sequence[str]) -> None:
        self.problems += problems
        self._lacks_a_file |= self.is_group(override)
        near = re.findall(r"did you mean '([^']+)'", "\n".join(problems))
        self._open |= {key_of(override), *near}

    def all_problems(self, for_run: bool) -> list[str]:
        """`problems`, and what the checks say of all that was taken.

        What follows from a mistake is not listed beside it.
        """
        if self.cfg is None:  # nothing was right
            self._add([])
        if self._lacks_a_file:
            return self.problems + self._of_other_keys(check_values(self.cfg))
        wrong = self.problems + self._of_other_keys(check(self.cfg))
        if not for_run:
            return wrong
        self._open |= {text.partition("=")[0] for text in check_values(self.cfg)}
        return wrong + self._of_other_keys(required(self.cfg))

    def _of_other_keys(self, found: Sequence[str]) -> list[str]:
        about = [re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w.])") for key in self._open]
        return [text for text in found if not any(key.search(text) for key in about)]


def compose_tree(
    verb: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None
) -> DictConfig:
    """The composed config before its interpolations are resolved and its values checked.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    folders = _folders_of(verb, config_dir)
    with _translated_errors(verb):
        prepared = [prepare_override(override, verb, folders) for override in overrides]
    return _compose_prepared(verb, prepared, folders)


def _folders_of(verb: str, config_dir: str | Path | None) -> list[Path]:
    if verb not in ROOTS:
        raise ConfigError(f"no config for {verb!r}{did_you_mean(verb, ROOTS)}")
    return config_folders(config_dir)


def _compose_prepared(verb: str, prepared: Sequence[str], folders: Sequence[Path]) -> DictConfig:
    typed = [text for one in prepared for text in _texts_of(one)]
    check_references([*texts_of(folders, prepared), *typed])
    _register(verb)
    main, *others = (str(folder) for folder in folders)
    search = [f"hydra.searchpath=[{','.join(quote('file://' + o) for o in others)}]"]
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        initialized = hydra.initialize_config_dir(config_dir=main, version_base="1.3")
        with _translated_errors(verb), initialized, _no_foreign_resolvers():
            return hydra.compose(
                primary_config(verb), overrides=[*prepared, *(search if others else [])]
            )
    finally:
        GlobalHydra.instance().hydra = previous


def _texts_of(override: str) -> Iterator[Text]:
    match = OVERRIDE.fullmatch(override)
    return texts(match[3], override, path_of(match[2])) if match else iter(())


@contextmanager
def _translated_errors(verb: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (
        HydraException,
        OmegaConfBaseException,
        YAMLError,
        ValueError,
        TypeError,
        OSError,
    ) as error:
        raise ConfigError(_translate(error, verb)) from error


def to_config(tree: DictConfig) -> Any:
    """Resolve every interpolation and turn the tree into dataclass instances."""
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


def _translate(error: Exception, verb: str) -> str:
    """One readable line from hydra's and OmegaConf's exceptions."""
    if isinstance(error, OverrideParseException):
        override = str(error.override).lstrip("+")
        if override.endswith(","):
            return f"cannot read the override {override!r}: remove the comma at its end"
        return (
            f"cannot read the override {override!r}: quote text with commas, braces,"
            " brackets or colons, as in components='[{match: \"layers.[0-3].**\", kind: linear}]'"
        )
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML: {error.problem}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        near = did_you_mean(option, error.options or [])
        return f"{group}={option}: no such config{near}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    file = re.search(r"In '([^']+)'", str(error))
    where = f"{file[1]}.yaml: " if file else ""
    if cause is None:
        name = re.search(r"Could not override '([^']+)'", str(error))
        if name:
            return f"{where}unknown group {name[1]!r}{did_you_mean(name[1], groups(verb))}"
        return where + _first_line(error, None)
    if isinstance(cause, ConfigKeyError) and cause.full_key:
        return where + unknown_key(str(cause.full_key), verb)
    key = cause.full_key
    merged = re.match(r"Error merging override \+*([\w.]+)=", str(error))
    if merged and not isinstance(key, str):  # the index of an element
        key = f"{merged[1]}[{key}]"
    return where + _first_line(cause, key or (merged and merged[1]))


def _first_line(error: BaseException, key: object) -> str:
    text = str(error).strip().splitlines()[0]
    if "Ambiguous value" in text:
        text += "; write [1,2] for a list, or add --multirun for a run with each"
    if isinstance(error, ValidationError):
        text = re.sub(r" of type '\w+'| \(type \w+\)", "", text)
        for kind, meaning in (("Integer", "whole number"), ("Float", "number")):
            text = text.replace(f"could not be converted to {kind}", f"is not a {meaning}")
        text = text.replace("is not a valid bool", "is neither true nor false")
        text = re.sub(r"field '.*' is not Optional", "null is not allowed here", text)
        text = re.sub(r"^Invalid value.*not a ListConfig.*", "takes a list, such as [a,b]", text)
        text = re.sub(r"^Cannot assign (\w+) to Dict.*", r"takes {key: value, ...}, not \1", text)
        text = re.sub(
            r"^(?:Merge error|Invalid type assigned): \w+ is not a subclass of \w+. value: (.*)",
            r"a section takes keys of its own, not \1",
            text,
        )
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


def _register(verb: str) -> None:
    """Schema and resolvers, again at each call: both registries belong to the whole process.

    `now`, which output_dir uses, is hydra's own.
    """
    name = primary_config(verb)
    ConfigStore.instance().store(f"{name}_schema", node=ROOTS[name], provider="qlora_builders")
    resolvers = {
        "demo": lambda name: str(demo_path(name)),
        "demo_eval": _demo_eval,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
