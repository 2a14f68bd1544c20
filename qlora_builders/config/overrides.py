"""What a command line may override: the key is checked, the value spelled for hydra's grammar.

A typo must not reach hydra, whose messages do not know the schema; a prompt or a path must not
either, because commas, braces and quotes mean something in hydra's grammar.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_builders.config.knobs import knobs
from qlora_builders.config.other_names import (
    FILE_WORDS,
    NOT_NEEDED,
    OTHER_NAMES,
    OTHER_OPTIONS,
    OWN_FILE,
)
from qlora_builders.config.own_files import GLOBAL
from qlora_builders.config.resume import flatten
from qlora_builders.config.schema import ROOTS, WITHOUT_FILES
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.config.yaml_file import load_yaml
from qlora_builders.errors import ConfigError, did_you_mean

OVERRIDE = re.compile(r"(\+\+|\+|~)?([^=]+)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""", re.DOTALL)


def primary_config(verb: str) -> str:
    """The YAML a verb starts from; inspect shows what finetune would build, so it has none."""
    return "finetune" if verb == "inspect" else verb


def group_options(group: str, folders: Sequence[Path]) -> list[str]:
    """The options of a group: `method` -> full, lora, qlora."""
    found = {
        file.relative_to(folder / group).with_suffix("").as_posix()
        for folder in folders
        for file in (folder / group).rglob("*.yaml")
    }
    return sorted(found)


def known_keys(verb: str) -> list[str]:
    """Every key that an override of this verb may name: leaves, sections and groups."""
    leaves = list(knobs(ROOTS[verb]))
    sections = {key[:dot] for key in leaves for dot in _dots(key)}
    return sorted({*leaves, *sections, *groups(verb)})


def _dots(key: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", key))


def groups(verb: str) -> list[str]:
    """The groups in the defaults list of the verb's primary config."""
    primary = OmegaConf.load(shipped_dir("configs") / f"{primary_config(verb)}.yaml")
    return [str(name) for item in primary.defaults if not isinstance(item, str) for name in item]


def key_of(override: str) -> str:
    """`+training.seed=1` -> `training.seed`; text without a = is taken for a key."""
    match = OVERRIDE.fullmatch(override)
    return match[2].strip() if match else override


def prepare_override(override: str, verb: str, folders: Sequence[Path]) -> str:
    """Check an override's key against the schema and spell its value for hydra's grammar."""
    match = OVERRIDE.fullmatch(override)
    names_file = override.endswith((".yaml", ".yml")) if match is None else match[2] in FILE_WORDS
    if names_file:
        raise ConfigError(f"{override!r}: {OWN_FILE}")
    if match is None:
        raise ConfigError(
            f"{override!r} is not KEY=VALUE, such as training.batch_size=8; "
            "put quotes around a value with spaces"
        )
    sign, key, value = match[1], match[2].strip(), match[3]
    if sign == "~":
        raise ConfigError(f"{override!r}: keys cannot be removed; write {key}=null to unset one")
    if key in groups(verb) and not value.lstrip().startswith("{"):
        _check_option(key, value, folders)
        _check_choices(key, value, verb, folders)
        return f"{key}={value}"
    leaves = knobs(ROOTS[verb])
    if key == "components" and key in leaves and value.endswith(".yaml"):
        return f"components={_spelled(_rules_of(Path(value)))}"
    parent = next((key[:dot] for dot in _dots(key) if key[:dot] in leaves), None)
    if parent is not None and get_origin(leaves[parent].type) is list:
        index = key.removeprefix(f"{parent}.").partition(".")[0]
        if not index.isdecimal():
            raise ConfigError(f"{key}={value}: {parent} takes a list, such as [a,b]")
    if parent is not None and get_origin(leaves[parent].type) in (dict, list):
        return f"++{key}={value}"  # optimizer.eps: arguments are checked against the component
    if key not in known_keys(verb):
        raise ConfigError(unknown_key(key, verb))
    if key not in leaves and value != "null" and not value.lstrip().startswith(("{", "${")):
        raise ConfigError(f"{key}={value}: {_section(key, verb)}")
    if key in leaves and leaves[key].type in (str, str | None):
        return f"{key}={value if value == 'null' else quote(value)}"
    return f"{key}={value}"


def _section(key: str, verb: str) -> str:
    """What to write instead of a value for a section."""
    if (verb, key) in NOT_NEEDED:
        return NOT_NEEDED[verb, key]
    first = next(leaf for leaf in knobs(ROOTS[verb]) if leaf.startswith(f"{key}."))
    meant = OTHER_NAMES.get(key)
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"a section takes keys of its own, such as {first}{hint}"


def values_of_file(override: str, verb: str, folders: Sequence[Path]) -> list[str]:
    """The file that `experiment=mine` names, as an override for each of its values.

    Empty if it cannot be taken apart: it is not there, not YAML, has defaults of its own, or is an
    experiment without the line that says that its keys are those of the whole config.
    """
    group, _, option = override.partition("=")
    file = next((f for d in folders if (f := d / group / f"{option}.yaml").is_file()), None)
    try:
        tree = _tree_of(file) if file else None
    except (OSError, ConfigError, OmegaConfBaseException):
        return []
    is_global = file is not None and file.read_text("utf-8").startswith(GLOBAL)
    if not isinstance(tree, dict) or "defaults" in tree or is_global != (group == "experiment"):
        return []
    leaves = knobs(ROOTS[verb])
    whole = [key for key, knob in leaves.items() if get_origin(knob.type) is not dict]
    values = flatten(tree, "" if is_global else f"{group}.", whole)
    chosen = _choices(tree, verb) if is_global else {}
    return [f"{key}={chosen.get(key) or _spelled(value)}" for key, value in values.items()]


def _choices(tree: dict[str, Any], verb: str) -> dict[str, str]:
    """`data: chat` in an experiment, which hydra takes for a value and not for data=chat."""
    return {k: value for k, value in tree.items() if k in groups(verb) and isinstance(value, str)}


def _check_choices(group: str, option: str, verb: str, folders: Sequence[Path]) -> None:
    if group != "experiment":
        return
    for folder in folders[1:]:
        file = folder / group / f"{option}.yaml"
        tree = _tree_of(file) if file.is_file() else {}  # a mapping, says _check_option
        chosen = [f"{k}: {v}" for k, v in _choices(tree, verb).items()]
        if chosen:
            defaults = ", ".join(f"{{override /{one}}}" for one in chosen)
            raise ConfigError(
                f"{group}/{file.name}: a config is chosen in the list of defaults; instead of "
                f"{' and '.join(map(repr, chosen))} write: defaults: [{defaults}]"
            )


def _rules_of(file: Path) -> list[Any]:
    """The rules of a YAML file: under `components:`, as `qlora plan` writes them, or alone."""
    if not file.is_file():
        raise ConfigError(f"components={file}: no such file")
    content = _tree_of(file)
    if isinstance(content, list):
        content = {"components": content}
    rules = content.get("components") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(rules, list):
        raise ConfigError(
            f'{file}: no list of rules under components: - {{match: "layers.**", kind: linear}}'
        )
    others = sorted(str(key) for key in content if key != "components")
    if others:
        raise ConfigError(
            f"{file}: {', '.join(others)} beside components:, which alone is read from such a file;"
            " set the rest on the command line or in an experiment"
        )
    for number, rule in enumerate(rules, start=1):
        if not isinstance(rule, dict):
            raise ConfigError(
                f"{file}: rule {number} of {len(rules)} is {rule!r:.80}; "
                'write {match: "layers.**", kind: linear}'
            )
        for key, value in rule.items():
            # hydra's grammar has no words for others
            if not re.fullmatch(r"\w+", str(key), re.ASCII):
                raise ConfigError(f"{file}: {key!r} is no option of a rule")
            if not isinstance(value, str | int | float | list | dict | None):
                raise ConfigError(f"{file}: {key} of a rule is {value!r:.80}, which none can be")
    return rules


def _spelled(value: Any) -> str:
    """A value in hydra's grammar."""
    if isinstance(value, list):
        return "[" + ",".join(map(_spelled, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_spelled(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str):
        return quote(value)
    return "null" if value is None else str(value).lower()


def _tree_of(file: Path) -> Any:
    """`load_yaml`, which OmegaConf lets fail by an OSError for a file that holds one number."""
    try:
        return load_yaml(file)
    except OSError as error:
        raise ConfigError(f"{file}: holds no keys and values: {error}") from error


def _check_option(group: str, option: str, folders: Sequence[Path]) -> None:
    options = group_options(group, folders)
    if option not in options:
        meant = OTHER_OPTIONS.get(f"{group}={option}")
        hint = f"; write {meant}" if meant else did_you_mean(option, options)
        if group == "experiment" and not hint.startswith("; did"):
            hint = "; 'qlora configs ls' lists those there are"
        if group == "experiment" and not folders[1:]:
            hint += "; one of your own, DIR/experiment/NAME.yaml, needs --config-dir DIR"
        raise ConfigError(f"{group}={option}: no such config{hint}")
    for folder in folders[1:]:  # hydra says less about what is no config at all
        file = folder / group / f"{option}.yaml"
        if file.is_file() and not isinstance(_tree_of(file), dict):
            raise ConfigError(f"{group}/{file.name}: holds a list; keys and values are needed")


def quote(value: str) -> str:
    """Take text literally: commas, braces and quotes in a prompt or path are not grammar."""
    if QUOTED.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"


def unknown_key(key: str, verb: str) -> str:
    """The message for a key that the schema lacks, with the spelling that was probably meant."""
    if (verb, key) in NOT_NEEDED:
        return f"unknown key {key!r}: {NOT_NEEDED[verb, key]}"
    last = key.rpartition(".")[2]
    name = OTHER_NAMES.get(last, "")
    for here in (name, name.rpartition(".")[2]):
        if here in known_keys(verb) or here.rpartition(".")[0] in knobs(ROOTS[verb]):
            return f"unknown key {key!r}; it is {here!r} here"
    if key == "experiment":
        return f"unknown key {key!r}; an experiment file starts with the line {GLOBAL!r}"
    near = _near_keys(key, verb)
    if near:
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    others = _verbs_with(key)
    hint = f"; it is a key of {', '.join(others)}" if others else ""
    return f"unknown key {key!r}{hint}; 'qlora {verb} --help' lists the keys"


def _near_keys(key: str, verb: str) -> list[str]:
    """Keys of the verb that may be meant, the likeliest first."""
    known = [other for other in known_keys(verb) if not key.startswith(f"{other}.")]
    last = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near += [other for other in known if other.rpartition(".")[2] == last]
    if _verbs_with(key):  # not misspelt, so that only the same name will do
        return [other for other in near if last in other and not ("." in key and "." in other)]
    return near + difflib.get_close_matches(key, known, n=1)


def _verbs_with(key: str) -> list[str]:
    return [verb for verb in ROOTS if verb not in WITHOUT_FILES and key in known_keys(verb)]
