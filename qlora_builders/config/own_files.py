"""The folders and files that configs come from, and what those of --config-dir may hold.

That is keys, values, and a list of the defaults they start from. hydra's files can do more: move to
other places of the config (`@package`, `group@place`), search more folders, configure hydra itself,
read its environment. A folder may come from anywhere, so hydra gets the keys and values alone, and
the size of a file is bounded, but for those that come with the package.

A value with `${...}` that names two others, each of which names two others, doubles with every
line, and OmegaConf writes all of it out. So it is counted before anything is resolved.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf
from omegaconf import OmegaConf

from qlora_builders.config.shipped import shipped_dir
from qlora_builders.config.verbs import VERBS
from qlora_builders.confined.process import Limits, OverrunError, RaisedError, ask
from qlora_builders.errors import ConfigError, did_you_mean, expand_home
from qlora_builders.files.outputs import fault_of_path

RESOLVERS = ("now", "demo", "demo_eval")
_OPEN = re.compile(r"(\\*)\$\{")
_KNOWN = re.compile(
    rf"\$\{{\s*(?:(?P<key>\w[\w-]*(?:\.[\w-]+|\[\d+\])*)\s*\}}|(?:{'|'.join(RESOLVERS)})\s*:)"
)
_COST = 100  # of an interpolation, in characters
_MOST = 1_000_000  # characters
_DEEPEST = 20


Keys = tuple[str, ...]


def path_of(key: str) -> Keys:
    """`loggers[0].name` -> ("loggers", "0", "name")"""
    return tuple(part for part in re.split(r"[.\[\]]", key) if part)


def leaves_of(tree: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(path, value) of all that is neither a mapping nor a list."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves_of(value, (*path, str(key)))
    else:
        yield path, tree


def node_at(tree: Any, path: Keys) -> tuple[Any, int]:
    """The last node on the way, and how many parts lead there: all of them if it is the one."""
    for end, part in enumerate(path):
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return tree, end
    return tree, len(path)


def check_references(tree: Any, where: Callable[[Keys], str]) -> None:
    """Count what all of a config stands for.

    Args:
        where: `"experiment/mine.yaml: "` for the path of a value.

    Raises:
        ConfigError: for an interpolation of another kind than `${key}` and those of `RESOLVERS`,
            and if they stand for too much, or for each other too often in a row.
    """
    known: dict[Keys, tuple[int, int]] = {}  # characters, and how many stand for each other

    def said(path: Keys) -> str:
        return f"{where(path)}{'.'.join(path)}"

    def size(path: Keys, value: Any, way: tuple[Keys, ...]) -> tuple[int, int]:
        text = str(value)
        if path in known or "${" not in text:
            return known.get(path, (len(text) + 1, 0))
        if path in way:
            raise ConfigError(
                f"{said(way[-1])}: Recursive interpolation detected: its ${{...}} leads back to "
                "itself"
            )
        total, depth = len(text), 0
        for key in _keys_in(text, said(path)):
            total += _COST
            for below in _target(tree, path_of(key)) if key else ():
                more, deep = size(*below, (*way, path)) if len(way) <= _DEEPEST else (0, _DEEPEST)
                total, depth = total + more, max(depth, deep + 1)
                if total > _MOST:
                    break
        if depth > _DEEPEST:
            raise ConfigError(
                f"{said(path)} is at the head of more than {_DEEPEST} ${{...}} that stand for each "
                "other; write out what is needed"
            )
        known[path] = total, depth
        return total, depth

    total = 0
    for path, value in leaves_of(tree):
        total += size(path, value, ())[0] if "${" in str(value) else 0
        if total > _MOST:
            raise ConfigError(
                f"{where(path)}what the ${{...}} of {'.'.join(path)} and others stand for is more "
                f"than {_MOST:,} characters; write out what is needed"
            )


def _keys_in(text: str, said: str) -> list[str]:
    """The keys that a text refers to; an empty one for a resolver."""
    opened = list(_OPEN.finditer(text))
    if all(len(match[1]) == 1 for match in opened):  # \${ is taken literally
        return []
    known = [_KNOWN.match(text, match.end() - 2) for match in opened]
    if None in known:
        raise ConfigError(
            f"{said} has a ${{...}} that is neither ${{key}} nor one of "
            f"{', '.join(f'${{{name}:...}}' for name in RESOLVERS)}; write \\${{ for the "
            "characters themselves"
        )
    return [match["key"] or "" for match in known if match]


def _target(tree: Any, path: Keys) -> Iterable[tuple[Keys, Any]]:
    """All that a key stands for; the whole of the text that its path leads through."""
    node, end = node_at(tree, path)
    if end == len(path):
        return leaves_of(node, path)
    return [] if isinstance(node, dict | list) else [(path[:end], node)]


GLOBAL = "# @package _global_"  # the first line of an experiment: its keys have full names
# GROUP=OPTION of other libraries -> what to write
OTHER_OPTIONS = {
    "data=alpaca": "data.columns.prompt=instruction data.columns.completion=output",
    "data=sharegpt": "data=chat",
    "method=dora": "method.use_dora=true",
    "method=loftq": "method.init_lora_weights=loftq",
    "method=pissa": "method.init_lora_weights=pissa",
    "method=rslora": "method.use_rslora=true",
}
_KEY = re.compile(r"[A-Za-z]\w*")
_MOST_VALUES = 100_000  # a rule for every slot of the largest Llama takes some 5,000
_MOST_BYTES = 5 * 10**6
LIMITS = Limits(seconds=20.0)  # 100,000 values take 5


def config_folders(config_dir: str | Path | None = None) -> list[Path]:
    """The shipped folder and the user's own, which may add configs but not replace any.

    Raises:
        ConfigError: if `config_dir` is not a folder; for a file in it that leads out of it, or has
            a name of ours or of hydra's.
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
    for parent, folders, files in os.walk(own):
        for entry in (Path(parent, name) for name in sorted([*folders, *files])):
            fault = _fault_of_entry(entry, own, shipped)
            if fault:
                raise ConfigError(f"{str(entry)!r} {fault}")
    return [shipped, own]


def _fault_of_entry(entry: Path, own: Path, shipped: Path) -> str | None:
    inside = entry.relative_to(own)
    target = Path(os.path.realpath(entry))  # itself for a link in a circle
    if entry.is_symlink() and (entry.is_dir() or not target.is_relative_to(own)):
        return "is a link out of its folder; put a copy there"
    if entry.suffix != ".yaml" or entry.is_dir():
        return None
    if not entry.is_file():
        return "is no file that can be read; take it out"
    if (shipped / inside).exists():
        return "has the name of a shipped config; rename it"
    if inside.parts[0].removesuffix(".yaml") == "hydra":
        return "has the name of a part of hydra; rename it"
    return None


def groups(verb: str) -> list[str]:
    """The groups in the defaults list of the verb's primary config."""
    primary = OmegaConf.load(shipped_dir("configs") / f"{VERBS[verb].primary}.yaml")
    return [str(name) for item in primary.defaults if not isinstance(item, str) for name in item]


def all_groups() -> list[str]:
    return sorted({name for verb in VERBS for name in groups(verb)})


def group_options(group: str, folders: Sequence[Path]) -> list[str]:
    """The options of a group: `method` -> full, lora, qlora."""
    found = {
        file.relative_to(folder / group).with_suffix("").as_posix()
        for folder in folders
        for file in (folder / group).rglob("*.yaml")
    }
    return sorted(found)


def fault_of_option(group: str, option: str, folders: Sequence[Path]) -> str | None:
    """What is wrong with `GROUP=OPTION`; None: there is such a config."""
    options = group_options(group, folders)
    if option in options:
        return None
    meant = OTHER_OPTIONS.get(f"{group}={option}")
    hint = f"; write {meant}" if meant else did_you_mean(option, options)
    if group == "experiment" and not hint.startswith("; did"):
        hint = "; 'qlora configs ls' lists those there are"
    if group == "experiment" and not folders[1:]:
        hint += "; one of your own, DIR/experiment/NAME.yaml, needs --config-dir DIR"
    return f"{group}={option}: no such config{hint}"


class OwnConfig(NamedTuple):
    """
    Attributes:
        tree: what the file says.
        keys: the same by full names.
        package: as hydra calls where the keys go; None: to the group.
    """

    tree: dict[str, Any]
    keys: dict[str, Any]
    package: str | None


def own_configs(folders: Sequence[Path], chosen: Iterable[str]) -> dict[str, OwnConfig]:
    """The user's files among these `group/option`, each behind those that it starts from.

    Raises:
        ConfigError: if one cannot be read, or with all that it may not hold.
    """
    found: dict[str, OwnConfig] = {}
    left = sorted(chosen, key=lambda name: not name.startswith("experiment/"))
    for name in left:  # which grows
        file = folders[-1] / f"{name}.yaml"
        if name in found or len(folders) == 1 or not os.path.isfile(file):
            continue
        tree = load_yaml(file)
        if not isinstance(tree, dict):
            raise ConfigError(f"{name}.yaml: holds a list; keys and values are needed")
        bases, faults = _bases(tree.get("defaults", []), posixpath.dirname(name), folders)
        faults += _faults_of_keys(tree, "")
        if faults:
            raise ConfigError(*(f"{name}.yaml: {fault}" for fault in faults))
        is_global = file.read_text("utf-8").startswith(GLOBAL)
        keys = tree if is_global else {name.partition("/")[0]: tree}
        found[name] = OwnConfig(tree, keys, "_global_" if is_global else None)
        left += bases
    return dict(reversed(found.items()))


def _bases(entries: Any, group: str, folders: Sequence[Path]) -> tuple[list[str], list[str]]:
    """What a list of defaults names, and what is wrong with it.

    `[{override /method: lora}, demo_qlora]` names method/lora, and demo_qlora of the file's group.
    """
    bases, faults = [], []
    if not isinstance(entries, list):
        return [], ["defaults must be a list, such as [{override /data: chat}]"]
    for entry in entries:
        for head, options in entry.items() if isinstance(entry, dict) else [("", entry)]:
            place = re.sub(r"^((override|optional)\s+)+", "", str(head).strip())
            for option in options if isinstance(options, list) else [options]:
                if option == "_self_" or (option is None and head):
                    continue
                if not isinstance(option, str):
                    faults.append(f"Unsupported item {option!r} in defaults; write the name of one")
                    continue
                path = posixpath.join("/", group, place, option)[1:]
                of, _, name = path.partition("/")
                if of not in all_groups():
                    faults.append(f"unknown group {of!r}{did_you_mean(of, all_groups())}")
                elif fault := fault_of_option(of, name, folders):
                    faults.append(fault)
                bases.append(path)
    return bases, faults


def _faults_of_keys(tree: Any, where: str) -> Iterator[str]:
    if where == "" and "hydra" in tree:
        yield "the key 'hydra' is of hydra's own settings, which qlora has none of; take it out"
    for node in tree if isinstance(tree, list) else [tree]:
        for key, value in node.items() if isinstance(node, dict) else ():
            if where == "" and key == "defaults":
                continue
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                yield (
                    f"{where}{key!r} is not the name of a key: letters, digits and _; a dot in it "
                    "is written as a section, such as training: {seed: 1}"
                )
            elif isinstance(value, dict | list):
                yield from _faults_of_keys(value, f"{where}{key}.")
        if isinstance(node, list):
            yield from _faults_of_keys(node, where)


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
    except OSError as error:  # OmegaConf's, too, for a file that holds one number
        raise ConfigError(f"{file}: holds no keys and values: {error}") from error
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
        values = ask("patterns.yaml_values", text, _MOST_VALUES, limits=LIMITS).value
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
