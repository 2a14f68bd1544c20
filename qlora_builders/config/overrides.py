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

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from qlora_builders.config.knobs import knobs
from qlora_builders.config.own_files import GLOBAL, load_yaml
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError, did_you_mean

# What other libraries call keys and options, and what these are here:
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
# GROUP=OPTION -> what to write
OTHER_OPTIONS = {
    "data=alpaca": "data.columns.prompt=instruction data.columns.completion=output",
    "data=sharegpt": "data=chat",
    "method=dora": "method.use_dora=true",
    "method=loftq": "method.init_lora_weights=loftq",
    "method=pissa": "method.init_lora_weights=pissa",
    "method=rslora": "method.use_rslora=true",
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
    leaves = list(knobs(VERBS[verb].root))
    sections = {key[:dot] for key in leaves for dot in _dots(key)}
    return sorted({*leaves, *sections, *groups(verb)})


def _dots(key: str) -> Iterator[int]:
    return (match.start() for match in re.finditer(r"\.", key))


def groups(verb: str) -> list[str]:
    """The groups in the defaults list of the verb's primary config."""
    primary = OmegaConf.load(shipped_dir("configs") / f"{VERBS[verb].primary}.yaml")
    return [str(name) for item in primary.defaults if not isinstance(item, str) for name in item]


def all_groups() -> list[str]:
    return sorted({name for verb in VERBS for name in groups(verb)})


def key_of(override: str) -> str:
    """`+training.seed=1` -> `training.seed`; text without a = is taken for a key."""
    match = OVERRIDE.fullmatch(override)
    return match[2].strip() if match else override


def prepare_override(override: str, verb: str, folders: Sequence[Path]) -> str:
    """Check an override's key against the schema and spell its value for hydra's grammar.

    Raises:
        ConfigError: for what is no override of this verb.
    """
    prepared = _prepare(override, verb, folders)
    try:
        parsed = OverridesParser.create().parse_override(prepared)
    except HydraException as error:
        shown = prepared.lstrip("+")
        if shown.endswith(","):
            how = "remove the comma at its end"
        else:
            how = (
                "quote text with commas, braces, brackets or colons, as in "
                "components='[{match: \"layers.[0-3].**\", kind: linear}]'"
            )
        raise ConfigError(f"cannot read the override {shown!r}: {how}") from error
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{override!r} has several values; write [1,2] for a list, or add --multirun for a run "
            "with each"
        )
    return prepared


def _prepare(override: str, verb: str, folders: Sequence[Path]) -> str:
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
        return f"{key}={value}"
    leaves = knobs(VERBS[verb].root)
    parent = next((key[:dot] for dot in _dots(key) if key[:dot] in leaves), None)
    if parent is not None and get_origin(leaves[parent].type) is list:
        index = key.removeprefix(f"{parent}.").partition(".")[0]
        if not index.isdecimal():
            raise ConfigError(f"{key}={value}: {parent} takes a list, such as [a,b]")
    if parent is None or get_origin(leaves[parent].type) not in (dict, list):
        if key not in known_keys(verb):
            raise ConfigError(unknown_key(key, verb))
        if key not in leaves and value != "null" and not value.lstrip().startswith("{"):
            raise ConfigError(f"{key}={value}: {_section(key, verb)}")
    if key == "components" and key in leaves and value.endswith(".yaml"):
        value = _spelled(_rules_of(Path(value)))
    elif key in leaves and leaves[key].type in (str, str | None) and value != "null":
        value = quote(value)
    return f"++{key}={value}"


def no_value(key: str, value: Any, verb: str) -> str:
    """What is wrong with a value at a key that takes none."""
    sections = {leaf.rpartition(".")[0] for leaf in knobs(VERBS[verb].root)}
    if not any(section == key or section.startswith(f"{key}.") for section in sections):
        return unknown_key(key, verb)
    if key in groups(verb) and isinstance(value, str):  # hydra takes it for a value
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
        if here in known_keys(verb) or here.rpartition(".")[0] in knobs(VERBS[verb].root):
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
    return [verb for verb, row in VERBS.items() if row.needs_files and key in known_keys(verb)]
