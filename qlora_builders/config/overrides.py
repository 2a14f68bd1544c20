"""What a command line may override, read key by key with hydra's grammar for values.

A typo must not reach hydra, whose messages do not know the schema; text must not reach its grammar,
where commas, braces and quotes mean something.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from qlora_builders.config.own_files import GLOBAL, fault_of_option, groups, load_yaml
from qlora_builders.config.sections import knobs
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError

# What other libraries call keys, and what these are here:
# the last part of a key -> the key; where a verb has the key without its section, that one
OTHER_NAMES = {
    "base_model": "checkpoint.dir",
    "bf16": "training.compute_dtype",
    "eval_steps": "training.eval_every",
    "fp16": "training.compute_dtype",
    "gradient_accumulation_steps": "training.grad_accumulation",
    "gradient_checkpointing": "training.activation_checkpointing",
    "learning_rate": "optimizer.lr",
    "logging_steps": "training.log_every",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lr": "optimizer.lr",
    "max_seq_length": "data.max_seq_len",
    "model": "checkpoint.dir",
    "model_name_or_path": "checkpoint.dir",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "r": "method.rank",
    "save_steps": "training.save_every",
    "target_modules": "method.targets",
}
# verb, key -> why it has none
NOT_NEEDED = {
    ("generate", "data"): "rows of prompts_file show their format; leave it out",
    ("generate", "data.format"): "rows of prompts_file show theirs; leave it out",
    ("generate", "data.train"): "rows to answer are given by prompts_file=FILE",
    ("generate", "data.eval"): "rows to answer are given by prompts_file=FILE",
}
# what is written where a file of keys is meant
FILE_WORDS = ("c", "cfg", "config", "config-file", "config_file", "config-name", "config_name")
OWN_FILE = (
    "a file of keys, such as a run's config.yaml, is used as an experiment: "
    "qlora configs cp FILE DIR/experiment/NAME.yaml, then --config-dir DIR experiment=NAME"
)

OVERRIDE = re.compile(r"(\+\+|\+|~)?([^=]+)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""", re.DOTALL)


def known_keys(verb: str) -> list[str]:
    """Every key that an override of this verb may name: leaves, sections and groups."""
    leaves = list(knobs(VERBS[verb].root))
    return sorted({*leaves, *(above for key in leaves for above in _above(key)), *groups(verb)})


def _above(key: str) -> list[str]:
    """`data.columns.text` -> data, data.columns"""
    return [key[: match.start()] for match in re.finditer(r"\.", key)]


def key_of(override: str) -> str:
    """`+training.seed=1` -> `training.seed`; text without a = is taken for a key."""
    match = OVERRIDE.fullmatch(override)
    return match[2].strip() if match else override


def parse_override(override: str, verb: str, folders: Sequence[Path]) -> tuple[str, Any, bool]:
    """The key of an override, its value, and whether that is the option of a group.

    Raises:
        ConfigError: for what is no override of this verb.
    """
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
        fault = fault_of_option(key, value, folders)
        if fault:
            raise ConfigError(fault)
        return key, value, True
    leaves = knobs(VERBS[verb].root)
    parent = next((above for above in _above(key) if above in leaves), None)
    holds = get_origin(leaves[parent].type) if parent else None
    if holds is list and not key[len(f"{parent}.") :].partition(".")[0].isdecimal():
        raise ConfigError(f"{key}={value}: {parent} takes a list, such as [a,b]")
    if holds not in (dict, list):
        if key not in known_keys(verb):
            raise ConfigError(unknown_key(key, verb))
        if key not in leaves and value != "null" and not value.lstrip().startswith("{"):
            raise ConfigError(f"{key}={value}: {_section(key, verb)}")
    if key == "components" and key in leaves and value.endswith(".yaml"):
        return key, _rules_of(Path(value)), False
    is_text = key in leaves and leaves[key].type in (str, str | None) and value != "null"
    return key, value if is_text and not QUOTED.fullmatch(value) else _value(key, value), False


def _value(key: str, text: str) -> Any:
    """A value in hydra's grammar."""
    override = f"{key}={text}"
    try:
        parsed = OverridesParser.create().parse_override(f"++{override}")
    except HydraException as error:
        how = (
            "quote text with commas, braces, brackets or colons, as in "
            "components='[{match: \"layers.[0-3].**\", kind: linear}]'"
        )
        if text.endswith(","):
            how = "remove the comma at its end"
        raise ConfigError(f"cannot read the override {override!r}: {how}") from error
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{override!r} has several values; write [1,2] for a list, or add --multirun for a run "
            "with each"
        )
    value = parsed.value()
    return value.text if isinstance(value, QuotedString) else value


def quote(value: str) -> str:
    """Text for hydra's grammar: commas, braces and quotes in a path mean nothing there."""
    if QUOTED.fullmatch(value):
        return value
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{escaped}'"


def no_value(key: str, value: Any, verb: str) -> str:
    """What is wrong with a value at a key that takes none."""
    if not any(leaf.startswith(f"{key}.") for leaf in knobs(VERBS[verb].root)):
        return unknown_key(key, verb)
    if key in groups(verb) and isinstance(value, str):
        return (
            f"a config is chosen in the list of defaults; instead of '{key}: {value}' write: "
            f"defaults: [{{override /{key}: {value}}}]"
        )
    if value is None:
        return f"{key}: null is not allowed here"
    return f"{key}={value}: {_section(key, verb)}"


def _section(key: str, verb: str) -> str:
    """What to write instead of a value for a section."""
    if (verb, key) in NOT_NEEDED:
        return NOT_NEEDED[verb, key]
    first = next(leaf for leaf in knobs(VERBS[verb].root) if leaf.startswith(f"{key}."))
    meant = OTHER_NAMES.get(key)
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"a section takes keys of its own, such as {first}{hint}"


def _rules_of(file: Path) -> list[Any]:
    """The rules of a YAML file: under `components:`, as `qlora plan` writes them, or alone."""
    if not file.is_file():
        raise ConfigError(f"components={file}: no such file")
    content = load_yaml(file)
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
            if not re.fullmatch(r"\w+", str(key), re.ASCII):
                raise ConfigError(f"{file}: {key!r} is no option of a rule")
            if not isinstance(value, str | int | float | list | dict | None):
                raise ConfigError(f"{file}: {key} of a rule is {value!r:.80}, which none can be")
    return rules


def unknown_key(key: str, verb: str) -> str:
    """The message for a key that the schema lacks, with the spelling that was probably meant."""
    if (verb, key) in NOT_NEEDED:
        return f"unknown key {key!r}: {NOT_NEEDED[verb, key]}"
    known, last = known_keys(verb), key.rpartition(".")[2]
    name = OTHER_NAMES.get(last, "")
    for here in (name, name.rpartition(".")[2]):
        if here in known or here.rpartition(".")[0] in knobs(VERBS[verb].root):
            return f"unknown key {key!r}; it is {here!r} here"
    if key == "experiment":
        return f"unknown key {key!r}; an experiment file starts with the line {GLOBAL!r}"
    others = [other for other, row in VERBS.items() if row.needs_files and key in known_keys(other)]
    known = [other for other in known if not key.startswith(f"{other}.")]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near += [other for other in known if other.rpartition(".")[2] == last]
    if others:  # not misspelt, so that only the same name will do
        near = [other for other in near if last in other and not ("." in key and "." in other)]
    else:
        near += difflib.get_close_matches(key, known, n=1)
    if near:
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    hint = f"; it is a key of {', '.join(others)}" if others else ""
    return f"unknown key {key!r}{hint}; 'qlora {verb} --help' lists the keys"
