"""What the files of --config-dir may hold: keys, values, and lists of the defaults they start from.

hydra's files can do more: move to other places of the config (`@package`, `group@place`), search
more folders, configure hydra itself, read its environment. A folder may come from anywhere, so what
nobody needs for a config of ours is refused. What is wrong with a file is one message, and its size
is bounded, but for those that come with the package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf
from omegaconf import OmegaConf

from qlora_builders.config.references import RefusedError, Text, path_of, texts
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.confined.process import Limits, OverrunError, RaisedError, ask
from qlora_builders.errors import ConfigError

GLOBAL = "# @package _global_"  # the first line of an experiment: its keys have full names
_HEADER = re.compile(r"^\s*#\s*@", re.MULTILINE)  # as hydra reads it
_NAME = re.compile(r"/?\w[\w.+-]*(/\w[\w.+-]*)*")
_KEY = re.compile(r"[A-Za-z]\w*")
_MOST_VALUES = 100_000  # a rule for every slot of the largest Llama takes some 5,000
_MOST_BYTES = 5 * 10**6
LIMITS = Limits(seconds=20.0)  # 100,000 values take 5


def check_own_files(own: Path, shipped: Path) -> None:
    """
    Raises:
        ConfigError: for a file that leads out of the folder, or has a name of ours or of hydra's.
    """
    for entry in _entries(own):
        inside = entry.relative_to(own)
        if entry.is_symlink() and (entry.is_dir() or not _target(entry).is_relative_to(own)):
            raise ConfigError(f"{str(entry)!r} is a link out of its folder; put a copy there")
        if entry.suffix != ".yaml" or entry.is_dir():
            continue
        if not entry.is_file():
            raise ConfigError(f"{str(entry)!r} is no file that can be read; take it out")
        if (shipped / inside).exists():
            raise ConfigError(f"{str(entry)!r} has the name of a shipped config; rename it")
        if inside.parts[0].removesuffix(".yaml") == "hydra":
            raise ConfigError(f"{str(entry)!r} has the name of a part of hydra; rename it")


def _target(link: Path) -> Path:
    """Itself for a link in a circle, where `Path.resolve` raises."""
    return Path(os.path.realpath(link))


def own_texts(folders: Sequence[Path], overrides: Iterable[str]) -> list[Text]:
    """Every value of the user's files that these `group=option` choose, and of those that they
    start from.

    Raises:
        RefusedError: if one holds what a config may not; of what else is wrong whoever reads it
            says more.
    """
    found: list[Text] = []
    for folder in folders[1:]:
        for file in _chosen(folder, overrides):
            for problem in _problems(file):
                raise RefusedError(f"{file.relative_to(folder)}: {problem}")
            found += _texts_of_file(folder, file)
    return found


def _chosen(folder: Path, overrides: Iterable[str]) -> list[Path]:
    """Files by `group=option`, and all that may be meant by the defaults of those."""
    left = [override.replace("=", "/", 1) for override in overrides]
    files: dict[Path, None] = {}
    while left:
        file = folder / f"{left.pop().strip('/')}.yaml"
        if file in files or not os.path.isfile(file):  # False for names too long, too
            continue
        check_bounded(file)
        files[file] = None
        group = file.parent.relative_to(folder).as_posix()
        for chosen, options in _defaults(_tree(file)):
            for option in options:
                name = f"{chosen}/{option}" if chosen else option
                left += [name, f"{group}/{name}"]
    return list(files)


@cache
def shipped_texts(folder: Path) -> tuple[Text, ...]:
    """Every value of the shipped files that have interpolations."""
    files = [file for file in _yaml_files(folder) if "${" in file.read_text("utf-8")]
    return tuple(text for file in files for text in _texts_of_file(folder, file))


def _texts_of_file(folder: Path, file: Path) -> list[Text]:
    tree = _tree(file)
    if isinstance(tree, str):
        tree = {tree: None}  # as OmegaConf reads it
    if not isinstance(tree, dict):
        return []
    name = file.relative_to(folder)
    is_global = file.read_text("utf-8").startswith(GLOBAL)
    path = () if is_global or len(name.parts) == 1 else path_of(name.parts[0])
    return list(texts(tree, str(name), path))


def _yaml_files(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.suffix == ".yaml" and entry.is_file()]


def _entries(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in sorted([*folders, *files]))


def _tree(file: Path) -> Any:
    """None for what is no YAML."""
    try:
        return yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
        return None


def _problems(file: Path) -> Iterator[str]:
    tree = _tree(file)
    if not isinstance(tree, dict):
        return
    text = file.read_text("utf-8")
    if _HEADER.search(text.removeprefix(GLOBAL)):
        yield f"has a line '# @...' that is not {GLOBAL!r} at its start; take it out"
    if "hydra" in tree:
        yield "the key 'hydra' is of hydra's own settings, which qlora has none of; take it out"
    for chosen, options in _defaults(tree):
        for name in (chosen, *options):
            if name and not _is_plain(name):
                yield (
                    f"defaults: {name!r} is no config of a group, such as demo_qlora in "
                    "- demo_qlora, or lora in - override /method: lora"
                )
    yield from _of_keys(tree, "")


def _defaults(tree: Any) -> Iterator[tuple[str, list[str]]]:
    """(group, options) of each entry: `override /method: lora`, or `demo_qlora` without a group."""
    entries = tree.get("defaults") if isinstance(tree, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
        for group, option in pairs:
            options = option if isinstance(option, list) else [option]
            name = re.sub(r"^((override|optional)\s+)+", "", str(group).strip())
            yield name, [one for one in options if isinstance(one, str) and one != "_self_"]


def _is_plain(name: str) -> bool:
    """Not `../other`, `file:///etc`, `group@place`, `${key}`, nor a group of hydra's."""
    plain = _NAME.fullmatch(name) and ".." not in name
    return bool(plain) and name.strip("/").split("/")[0] != "hydra"


def _of_keys(tree: Any, where: str) -> Iterator[str]:
    nodes = tree if isinstance(tree, list) else [tree]
    for node in nodes:
        for key, value in node.items() if isinstance(node, dict) else ():
            if where == "" and key == "defaults":
                continue
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                yield (
                    f"{where}{key!r} is not the name of a key: letters, digits and _; a dot in it "
                    "is written as a section, such as training: {seed: 1}"
                )
                return
            if isinstance(value, dict | list):
                yield from _of_keys(value, f"{where}{key}.")
        if isinstance(node, list):
            yield from _of_keys(node, where)


def load_yaml(file: Path) -> Any:
    """What a YAML file says, as it is written.

    Raises:
        ConfigError: if it is not YAML, not UTF-8, nested too deeply or too large.
    """
    check_bounded(file)
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply") from None
    except (ValueError, TypeError) as error:  # such as !!int x
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{file}: not valid YAML: {reason}") from error


def check_bounded(file: Path) -> None:
    """What else is wrong with the file is for those who read it.

    Raises:
        ConfigError: if it is too large, nested too deeply, takes too long to read, or if its
            aliases stand for too many values, or for themselves.
    """
    if Path(os.path.realpath(file)).is_relative_to(shipped_dir("configs").resolve()):
        return
    try:
        size = file.stat().st_size
        text = file.read_text("utf-8") if size <= _MOST_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return
    if size > _MOST_BYTES:
        raise ConfigError(f"{file}: has {size:,} bytes; at most {_MOST_BYTES:,} are read")
    try:
        values = ask("yaml_values.count", text, _MOST_VALUES, limits=LIMITS).value
    except RaisedError as error:
        if error.kind == "RecursionError":
            raise ConfigError(f"{file}: nested too deeply") from None
        return
    except OverrunError as error:
        raise ConfigError(f"{file}: reading it {error}; write out what is needed") from error
    if values > _MOST_VALUES:
        raise ConfigError(
            f"{file}: with its aliases (*name) written out it has more than {_MOST_VALUES:,} "
            "values, or no end; write out what is needed"
        )
