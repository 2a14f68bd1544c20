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
from qlora_builders.config.resume import flatten
from qlora_builders.config.schema import ROOTS
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
        return f"{key}={value}"
    leaves = knobs(ROOTS[verb])
    if key == "components" and key in leaves and value.endswith(".yaml"):
        return f"components={_spelled(_rules_of(Path(value)))}"
    parent = next((key[:dot] for dot in _dots(key) if key[:dot] in leaves), None)
    if parent is not None and get_origin(leaves[parent].type) in (dict, list):
        return f"++{key}={value}"  # optimizer.eps: arguments are checked against the component
    if key not in known_keys(verb):
        raise ConfigError(unknown_key(key, verb))
    if key in leaves and leaves[key].type in (str, str | None):
        return f"{key}={value if value == 'null' else quote(value)}"
    return f"{key}={value}"


def values_of_file(override: str, folders: Sequence[Path]) -> list[str]:
    """The file that `experiment=mine` names, as an override for each of its values.

    Empty if it cannot be taken apart: it is not there, not YAML, has defaults of its own, or is an
    experiment without the line that says that its keys are those of the whole config.
    """
    group, _, option = override.partition("=")
    file = next((f for d in folders if (f := d / group / f"{option}.yaml").is_file()), None)
    try:
        tree = load_yaml(file) if file else None
    except (OSError, ConfigError, OmegaConfBaseException):
        return []
    is_global = file is not None and file.read_text("utf-8").startswith("# @package _global_")
    if not isinstance(tree, dict) or "defaults" in tree or is_global != (group == "experiment"):
        return []
    values = flatten(tree, "" if is_global else f"{group}.")
    return [f"{key}={_spelled(value)}" for key, value in values.items()]


def _rules_of(file: Path) -> list[Any]:
    """The `components:` of a YAML file, such as `qlora plan` writes."""
    if not file.is_file():
        raise ConfigError(f"components={file}: no such file")
    content = load_yaml(file)
    rules = content.get("components") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(rules, list):
        raise ConfigError(f"{file}: no list of rules under components:")
    others = sorted(str(key) for key in content if key != "components")
    if others:
        raise ConfigError(
            f"{file}: {', '.join(others)} beside components:, which alone is read from such a file;"
            " set the rest on the command line or in an experiment"
        )
    for key in (key for rule in rules if isinstance(rule, dict) for key in rule):
        if not re.fullmatch(r"\w+", str(key)):  # hydra's grammar has no words for others
            raise ConfigError(f"{file}: {key!r} is no option of a rule")
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


def _check_option(group: str, option: str, folders: Sequence[Path]) -> None:
    options = group_options(group, folders)
    if option not in options:
        raise ConfigError(f"{group}={option}: no such config{did_you_mean(option, options)}")
    for folder in folders[1:]:  # hydra says less about what is no config at all
        file = folder / group / f"{option}.yaml"
        if file.is_file() and not isinstance(load_yaml(file), dict):
            raise ConfigError(f"{group}/{file.name}: holds a list; keys and values are needed")


def quote(value: str) -> str:
    """Take text literally: commas, braces and quotes in a prompt or path are not grammar."""
    if QUOTED.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"


# what other libraries call some keys
OTHER_NAMES = {
    "gradient_accumulation_steps": "training.grad_accumulation",
    "gradient_checkpointing": "training.activation_checkpointing",
    "learning_rate": "optimizer.lr",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lr": "optimizer.lr",
    "max_seq_length": "data.max_seq_len",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "r": "method.rank",
    "target_modules": "method.targets",
}


def unknown_key(key: str, verb: str) -> str:
    """The message for a key that the schema lacks, with the spelling that was probably meant."""
    known = known_keys(verb)
    last = key.rpartition(".")[2]
    other_name = OTHER_NAMES.get(last, "")
    if other_name.partition(".")[0] in {other.partition(".")[0] for other in known}:
        return f"unknown key {key!r}; it is {other_name!r} here"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near += [other for other in known if other.rpartition(".")[2] == last]
    near += difflib.get_close_matches(key, known, n=1)
    if key == "experiment":
        hint = "; an experiment file starts with the line '# @package _global_'"
    elif near:
        hint = f"; did you mean {near[0]!r}?"
    else:
        hint = f"; 'qlora {verb} --help' lists the keys"
    return f"unknown key {key!r}{hint}"
