"""`qlora VERB --help`: usage, every key with its default and meaning, and examples."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from textwrap import fill
from typing import Any, get_origin

from omegaconf import OmegaConf

from qlora_builders.config.compose import compose_tree, config_folders
from qlora_builders.config.knobs import Knob, knobs
from qlora_builders.config.overrides import group_options, groups
from qlora_builders.config.schema import ROOTS, SWEPT_VERBS, TRAINING_VERBS

# option -> its argument, what it does, and the verbs that take it
OPTIONS: dict[str, tuple[str, str, Collection[str]]] = {
    "--help": ("", "this text", ROOTS),
    "--config-dir": ("DIR", "a folder with configs of your own", ROOTS),
    "--allow": ("PREFIX", "a package whose classes configs may name, like my_package", ROOTS),
    "--print-config": ("", "print the resolved config and stop", ROOTS),
    "--dry-run": ("", "load and check everything, train and write nothing", TRAINING_VERBS),
    "--multirun": ("", "a run for each combination of values: KEY=A,B (a sweep)", SWEPT_VERBS),
    "--nproc-per-node": ("N", "train in N processes on this machine", TRAINING_VERBS),
    "--max-restarts": ("M", "start all of them again, so often, when one fails", TRAINING_VERBS),
}

EXAMPLES = {
    "finetune": (
        "qlora finetune experiment=demo_qlora",
        "qlora finetune checkpoint.dir=Llama-3.2-1B data.train=rows.jsonl training.max_steps=200",
        "qlora finetune output_dir=runs/NAME training.save_every=50 training.resume=auto",
        "qlora finetune method=lora method.rank=8 method.targets=[q_proj,v_proj]",
        "qlora finetune 'components=[{match: \"layers.0.**\", kind: linear}]'",
        "qlora finetune --multirun optimizer.lr=1e-4,2e-4 method.rank=8,16 output_dir=runs/SWEEP",
    ),
    "dpo": (
        "qlora dpo experiment=demo_dpo",
        "qlora dpo checkpoint.dir=Llama-3.2-1B data.train=pairs.jsonl dpo.beta=0.05",
    ),
    "inspect": (
        "qlora inspect model.arch=llama3_1_8b method.rank=64",
        "qlora inspect 'components=[{match: \"layers.*.mlp.*\", kind: linear}]'",
    ),
    "estimate": (
        "qlora estimate model.arch=llama3_1_70b device=cuda data.max_seq_len=4096",
        "qlora estimate model.arch=llama3_1_8b device=cuda memory=24GiB",
    ),
    "report": (
        "qlora report runs/NAME",
        "qlora report runs/ONE runs/TWO output=comparison.html",
    ),
    "generate": (
        "qlora generate adapter.path=runs/NAME/adapter prompt='Hello, who are you?'",
        "qlora generate checkpoint.dir=merged prompts_file=prompts.txt temperature=0.7 top_p=0.9",
        "qlora generate checkpoint.dir=merged prompts_file=rows.jsonl output=answers.jsonl",
        "qlora generate checkpoint.dir=merged interactive=true system='Answer in one word.'",
    ),
    "evaluate": (
        "qlora evaluate adapter.path=runs/NAME/adapter exact_match=20",
        "qlora evaluate checkpoint.dir=merged data.eval=rows.jsonl output=result.json",
        "qlora evaluate --multirun adapter.path=runs/A/adapter,runs/B/adapter output=both.json",
        "qlora evaluate adapter.path=runs/NAME/adapter exact_match=50 compare=true",
        "qlora evaluate checkpoint.dir=merged data.eval=null lm_eval.tasks=[arc_easy,hellaswag]",
    ),
    "merge": (
        "qlora merge adapter.path=runs/NAME/adapter output_dir=merged",
        "qlora merge adapter.path=runs/NAME/adapter base=Llama-3.2-1B output_dir=merged",
    ),
    "plan": (
        "qlora plan bits=4.6",
        "qlora plan checkpoint.dir=Llama-3.1-8B data.train=rows.jsonl data.eval=held_out.jsonl "
        "budget=6GiB",
        "qlora quantize components=plan.yaml output_dir=nf4",
        "qlora plan bits=4.6 rank=16 output=qlora.yaml && qlora finetune components=qlora.yaml",
    ),
    "quantize": (
        "qlora quantize checkpoint.dir=Llama-3.2-1B output_dir=Llama-3.2-1B-nf4",
        "qlora quantize checkpoint.dir=Llama-3.2-1B output_dir=out format=bnb-4bit",
    ),
}


def options_of(verb: str) -> list[str]:
    """The options that a verb takes."""
    return [option for option, (_, _, verbs) in OPTIONS.items() if verb in verbs]


def help_text(verb: str, summary: str) -> str:
    """The whole help page of a verb, made from the schema and the shipped configs."""
    taken = options_of(verb)
    runs = " RUN [RUN ...]" if "runs" in knobs(ROOTS[verb]) else ""
    lines = [
        f"usage: qlora {verb}{runs} [OPTION ...] [KEY=VALUE ...]",
        "",
        summary,
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
    for knob in knobs(ROOTS[verb]).values():
        lines += _knob_lines(knob, _default(knob, written))
        if get_origin(knob.type) is dict:
            lines += _preset_lines(knob.key, OmegaConf.select(defaults, knob.key), folders)
    lines += ["", "examples:", *(f"  {example}" for example in EXAMPLES[verb])]
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
