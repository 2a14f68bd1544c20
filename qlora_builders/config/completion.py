"""`qlora completion SHELL`: a script that completes commands, keys and values.

The script holds all words, so that a TAB starts no Python: three `case` statements made from the
schema and the shipped configs, and after them the file of the shell, which looks words up.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from omegaconf import OmegaConf

from qlora_builders.config.browse import find_configs
from qlora_builders.config.compose import compose_tree, config_folders
from qlora_builders.config.help import options_of
from qlora_builders.config.knobs import Knob, knobs
from qlora_builders.config.overrides import group_options, groups
from qlora_builders.config.schema import ROOTS
from qlora_builders.errors import ConfigError, did_you_mean

INSTALL = {
    "bash": "qlora completion bash > ~/.qlora.bash && echo '. ~/.qlora.bash' >> ~/.bashrc",
    "zsh": "qlora completion zsh > ~/.qlora.zsh && echo '. ~/.qlora.zsh' >> ~/.zshrc",
    "fish": "qlora completion fish > ~/.config/fish/completions/qlora.fish",
}
FILES = "@"  # stands for the names of files
_SUBCOMMANDS = {"configs": ("ls", "show", "cp", "validate"), "completion": tuple(INSTALL)}


def script(words: Sequence[str], verbs: Iterable[str]) -> str:
    """What `qlora completion WORDS` prints.

    Raises:
        ConfigError: for another shell.
    """
    if not words or "-h" in words or "--help" in words:
        lines = [f"  {command}" for command in INSTALL.values()]
        usage = "usage: qlora completion bash|zsh|fish\n\nOnce, and again after an update:\n"
        return usage + "\n".join(lines) + "\nzsh needs compinit before that line.\n"
    shell, *more = words
    if shell not in INSTALL or more:
        raise ConfigError(f"no completion for {' '.join(words)!r}{did_you_mean(shell, INSTALL)}")
    cases = _fish_cases if shell == "fish" else _posix_cases
    functions = Path(__file__).with_name(f"completion.{shell}").read_text("utf-8")
    first, rest = functions.split("\n", 1)  # zsh looks for #compdef in the first line
    data = cases("__qlora_words", all_words(verbs)) + cases("__qlora_values", all_values())
    return f"{first}\n# made by `{INSTALL[shell].partition(' >')[0]}`\n{data}{rest}"


def all_words(verbs: Iterable[str]) -> dict[str, list[str]]:
    """Command -> what may stand behind it; "" -> the commands."""
    found = {"": [*verbs, "--help", "--version"]}
    for verb in ROOTS:
        keys = dict.fromkeys([*groups(verb), *_keys(verb)])
        found[verb] = [*options_of(verb), *(f"{key}=" for key in keys)]
    found["report"].append(FILES)
    configs = list(find_configs(config_folders()))
    for verb, subcommands in _SUBCOMMANDS.items():
        found[verb] = [*subcommands, *(configs if verb == "configs" else [])]
    return found


def all_values() -> dict[str, list[str]]:
    """`command:key` -> its values, where they can be listed; `*:key` where all commands agree."""
    folders = config_folders()
    by_key: dict[str, dict[str, list[str]]] = {}
    for verb in ROOTS:
        values = {key: _values_of(knob) for key, knob in _keys(verb).items()}
        values |= {group: group_options(group, folders) for group in groups(verb)}
        for key, some in values.items():
            if some:
                by_key.setdefault(key, {})[verb] = some
    found = {}
    for key, by_verb in by_key.items():
        if all(some == next(iter(by_verb.values())) for some in by_verb.values()):
            found[f"*:{key}"] = next(iter(by_verb.values()))
        else:
            found |= {f"{verb}:{key}": some for verb, some in by_verb.items()}
    return found


@cache
def _keys(verb: str) -> dict[str, Knob | None]:
    """Every key that takes a value; those of a preset, such as optimizer.lr, have no knob."""
    defaults = compose_tree(verb)
    found: dict[str, Knob | None] = {}
    for key, knob in knobs(ROOTS[verb]).items():
        if get_origin(knob.type) is dict:
            found |= {f"{key}.{name}": None for name in OmegaConf.select(defaults, key)}
        else:
            found[key] = knob
    return found


def _values_of(knob: Knob | None) -> list[str]:
    """Choices and switches; what is a number or made up is left to the user, text may be a path."""
    if knob is None:
        return []
    types = get_args(knob.type) if isinstance(knob.type, UnionType) else (knob.type,)
    null = ["null"] if type(None) in types else []
    if knob.key == "device":
        return ["auto", "cpu", "cuda"]
    if knob.key == "model.arch":
        from qlora_builders.models import LLAMA_ARCHS

        return [*LLAMA_ARCHS]
    if knob.key == "training.resume":
        return ["auto", FILES]
    if knob.choices is not None:
        return [*knob.choices, *null]
    if bool in types:
        return ["true", "false", *null]
    return [FILES] if str in types or get_origin(knob.type) is list else null


def _posix_cases(name: str, table: Mapping[str, Sequence[str]]) -> str:
    lines = [
        f"  {_pattern(key)}) printf '%s\\n' {shlex.join(some)} ;;" for key, some in table.items()
    ]
    return "\n".join([f"{name}() {{", " case $1 in", *lines, " esac", "}", ""])


def _fish_cases(name: str, table: Mapping[str, Sequence[str]]) -> str:
    lines = [
        line
        for key, some in table.items()
        for line in (f"    case {shlex.quote(key)}", f"      printf '%s\\n' {shlex.join(some)}")
    ]
    return "\n".join([f"function {name}", '  switch "$argv[1]"', *lines, "  end", "end", ""])


def _pattern(key: str) -> str:
    """Quoted, but for a leading * that stands for any command."""
    return "*" + shlex.quote(key[1:]) if key.startswith("*") else shlex.quote(key)
