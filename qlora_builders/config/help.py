"""`qlora VERB --help`: usage, every key with its default and meaning, and examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from textwrap import fill
from typing import Any, get_origin

from omegaconf import OmegaConf

from qlora_builders.config.compose import compose_tree, config_folders
from qlora_builders.config.own_files import group_options, groups
from qlora_builders.config.sections import Knob, knobs
from qlora_builders.config.verbs import VERBS, Verb

_TRAINS, _IS_SWEPT = attrgetter("trains"), attrgetter("swept")
# option -> its argument, what it does, and whether a verb takes it
OPTIONS: dict[str, tuple[str, str, Callable[[Verb], object]]] = {
    "--help": ("", "this text", bool),
    "--config-dir": ("DIR", "a folder with configs of your own", bool),
    "--allow": ("PREFIX", "a package whose classes configs may name, like my_package", bool),
    "--print-config": ("", "print the resolved config and stop", bool),
    "--dry-run": ("", "load and check everything, train and write nothing", _TRAINS),
    "--multirun": ("", "a run for each combination of values: KEY=A,B (a sweep)", _IS_SWEPT),
    "--nproc-per-node": ("N", "train in N processes on this machine", _TRAINS),
    "--max-restarts": ("M", "start all of them again, so often, when one fails", _TRAINS),
}


def help_text(verb: str) -> str:
    """The whole help page of a verb, made from the schema and the shipped configs."""
    row = VERBS[verb]
    taken = [option for option, (_, _, takes) in OPTIONS.items() if takes(row)]
    runs = " RUN [RUN ...]" if "runs" in knobs(row.root) else ""
    lines = [
        f"usage: qlora {verb}{runs} [OPTION ...] [KEY=VALUE ...]",
        "",
        str(row.root.__doc__),
        "",
        *(f"  {f'{option} {OPTIONS[option][0]}':<22}{OPTIONS[option][1]}" for option in taken),
        "",
    ]
    folders = config_folders()
    defaults = compose_tree(verb)
    choices = {group: group_options(group, folders) for group in groups(verb)}
    if choices:
        lines.append("groups (GROUP=NAME; qlora configs ls says what each is for):")
        for group, names in choices.items():
            head = f"  {group + '=':<14}"
            unbroken = " ".join(f"{name}\0|" for name in names).removesuffix("\0|")
            text = fill(unbroken, 96, initial_indent=head, subsequent_indent=" " * 16)
            lines += text.replace("\0", " ").splitlines()
        lines.append("")
    written = OmegaConf.to_container(defaults, resolve=False)
    lines.append("keys (KEY=VALUE):")
    for knob in knobs(row.root).values():
        lines += _knob_lines(knob, _default(knob, written))
        if get_origin(knob.type) is dict:
            lines += _preset_lines(knob.key, OmegaConf.select(defaults, knob.key), folders)
    lines += ["", "examples:", *(f"  {example}" for example in row.examples)]
    return "\n".join(lines)


def _default(knob: Knob, defaults: Any) -> Any:
    """A verb's own, as written: its YAML may differ from the schema in plain values."""
    value = reduce(getitem, knob.key.split("."), defaults)
    return knob.default if isinstance(value, list | dict) else value


def _preset_lines(key: str, preset: Any, folders: Sequence[Path]) -> list[str]:
    """Arguments of a component, with what the comments of the group's files say of them."""
    lines = []
    files = [file for folder in folders for file in sorted((folder / key).glob("*.yaml"))]
    text = "".join(file.read_text("utf-8") for file in files)
    for name, value in preset.items():
        lines.append(f"  {key}.{name}={_spell(value)}")
        comment = re.search(rf"^{name}:.* # (.*)$", text, re.MULTILINE)
        lines += [f"      {comment[1]}"] if comment else []
    return lines


def _knob_lines(knob: Knob, default: Any) -> list[str]:
    meaning = knob.meaning
    if knob.choices is not None and not isinstance(knob.default, list):
        meaning = f"{' | '.join(knob.choices)}: {meaning}"
    limits = [f"{sign} {bound}" for sign, bound in knob.bounds.items() if bound is not None]
    if limits:
        meaning += f" ({', '.join(limits)})"
    margin = " " * 6
    text = fill(meaning, width=96, initial_indent=margin, subsequent_indent=margin)
    return [f"  {knob.key}={_spell(default)}", text]


def _spell(value: Any) -> str:
    """A default as it would be typed."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, Sequence) and not isinstance(value, str):  # also one of OmegaConf's
        return f"[{','.join(map(_spell, value))}]"
    return str(value)
