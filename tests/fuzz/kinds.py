"""The table of the fuzz job: which file is changed, how, who reads it, and what explains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import explain
import explain_text
import read_kinds as read
from explain import Rule
from mutate_bytes import Mutator, any_bytes
from mutate_json import in_lines, text_or_json
from mutate_text import TEMPLATES, YAML
from mutate_weights import (
    SAFETENSORS,
    TORCH_FILES,
    change_description,
    change_entries,
    change_header,
    change_length,
    change_values,
)

from qlora_builders.files.manifest import MANIFEST_FILE, write_manifest

JSON: tuple[Mutator, ...] = (text_or_json,)
LINES: tuple[Mutator, ...] = (in_lines,)
BYTES: tuple[Mutator, ...] = (any_bytes,)


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        folder: that is read, in the good folders; `file` is the one in it that is changed.
        rules: what explains that the changed file reads as something else.
        weight: how many cases it has, beside others.
        names: text that is in every error, beside the folder's name; the file's name if empty.
        bounded: no tensor may be larger than the folder, twice.
        tolerant: the reader leaves out what it cannot read, so that few cases are errors.
    """

    folder: str
    file: str
    change: tuple[Mutator, ...]
    read: Callable[[Path], read.Summary]
    rules: tuple[Rule, ...] = ()
    weight: int = 2
    names: tuple[str, ...] = ()
    bounded: bool = False
    tolerant: bool = False
    finish: Callable[[Path], None] = lambda folder: None  # after the file is changed


def _new_manifest(folder: Path) -> None:
    step = folder / "checkpoints" / "step_4"
    (step / MANIFEST_FILE).unlink()
    write_manifest(step)


def _base(
    folder: str,
    file: str,
    change: tuple[Mutator, ...],
    *rules: Rule,
    plan: bool = True,
    weight: int = 3,
) -> Kind:
    reader = read.nf4_base if plan else read.plain_base
    return Kind(folder, file, change, reader, rules, weight, bounded=True)


def _tokens(file: str, change: tuple[Mutator, ...], rule: Rule) -> Kind:
    return Kind("tokenizer", file, change, read.tokenizer, (rule,), 3)


def _rows(name: str, change: tuple[Mutator, ...]) -> Kind:
    reader = partial(read.rows, name=name)
    return Kind("rows", name, change, reader, (explain_text.other_rows,))


def _step(
    file: str, change: tuple[Mutator, ...], *rules: Rule, run: str = "step", weight: int = 2
) -> Kind:
    """Under a manifest that fits what was changed."""
    path = f"checkpoints/step_4/{file}"
    return Kind(
        run, path, change, read.step, rules, weight, names=("step_4",), finish=_new_manifest
    )


def _torn(file: str, run: str = "step") -> Kind:
    """Under the manifest of what was written: always noticed."""
    path = f"checkpoints/step_4/{file}"
    return Kind(run, path, BYTES, read.step, weight=1, names=("step_4",))


def _report(file: str, change: tuple[Mutator, ...], *rules: Rule, weight: int = 1) -> Kind:
    return Kind("run", file, change, read.report, rules, weight, tolerant=True)


# of a value that is not allowed: a config has it once
KEYS = (
    "checkpoint.", "components[", "data.", "optimizer.", "output_dir", "train", "training.",
    "method.",
)  # fmt: skip
SHARD = "shard-00001-model-00001-of-00001.safetensors"
KINDS: dict[str, Kind] = {
    "hf.config": _base("hf", "config.json", JSON, explain.numbers_of_config, weight=4),
    "hf.weights": _base("hf", "model.safetensors",
    SAFETENSORS, explain.values_of_weights, plan=False),
    "hf.quantized": _base(
        "hf", "model.safetensors", SAFETENSORS, explain.values_of_quantized_weights, weight=5
    ),
    "sharded.index": _base("sharded", "model.safetensors.index.json", JSON, weight=4),
    "sharded.config": _base("sharded", "config.json", JSON, explain.numbers_of_config),
    "sharded.weights": _base(
        "sharded",
        "model-00002-of-00005.safetensors",
        SAFETENSORS,
        explain.values_of_quantized_weights,
    ),
    "nf4.config": _base("nf4", "config.json", JSON, explain.numbers_of_config),
    "nf4.weights": _base("nf4", "nf4.safetensors",
    SAFETENSORS, explain.values_beside_nf4, weight=4),
    "nf4.descriptions": _base("nf4", "nf4.safetensors", (change_description,), weight=4),
    "nf4.plain": _base(
        "nf4", "nf4.safetensors", (change_values,), explain.values_beside_nf4, plan=False, weight=1
    ),
    "bnb.config": _base("bnb", "config.json", JSON, explain.numbers_of_config),
    "bnb.weights": _base(
        "bnb", "model.safetensors", SAFETENSORS, explain.values_of_bitsandbytes, weight=4
    ),
    "bnb.descriptions": _base(
        "bnb", "model.safetensors", (change_description,), explain.values_of_bitsandbytes, weight=4
    ),
    "meta.params": _base("meta", "params.json", JSON, explain.numbers_of_params, plan=False),
    "meta.weights": _base(
        "meta", "consolidated.00.pth", TORCH_FILES, explain.values_of_meta, plan=False, weight=4
    ),
    "adapter.config": Kind(
        "adapter", "adapter_config.json", JSON, read.adapter, weight=6, names=("adapter",)
    ),
    "adapter.record": Kind(
        "adapter", "qlora_base.json", JSON, read.adapter, weight=6, names=("adapter",)
    ),
    "adapter.weights": Kind(
        "adapter", "adapter_model.safetensors", SAFETENSORS, read.adapter,
        (explain.values_of_adapter,), 3, names=("adapter",),
    ),
    "adapter.alone": Kind(
        "adapter", "adapter_model.safetensors", (change_header, change_length, change_entries),
        read.adapter_alone, (explain.names_of_adapter,), bounded=True,
    ),
    "foreign.config": Kind(
        "foreign", "adapter_config.json", JSON, read.adapter, (explain.strength_of_adapter,), 3,
        names=("foreign",),
    ),
    "tokenizer.json": _tokens("tokenizer.json", JSON, explain_text.another_vocabulary),
    "tokenizer.config": _tokens("tokenizer_config.json", JSON, explain_text.named_tokens),
    "tokenizer.map": _tokens("special_tokens_map.json", JSON, explain_text.named_tokens),
    "tokenizer.generation": _tokens("generation_config.json", JSON, explain_text.named_tokens),
    "tokenizer.model": _tokens("config.json", JSON, explain_text.named_tokens),
    "template.file": _tokens("chat_template.jinja", TEMPLATES, explain_text.another_template),
    "template.config": Kind(
        "templates", "tokenizer_config.json", JSON, read.tokenizer, (explain_text.named_tokens,), 3,
        names=("tokenizer_config", "put a chat_template.jinja beside"),
    ),
    "rows.instruct": _rows("instruct.jsonl", LINES),
    "rows.chat": _rows("chat.jsonl", LINES),
    "rows.preference": _rows("preference.jsonl", LINES),
    "rows.json": _rows("instruct.json", JSON),
    "rows.parquet": _rows("instruct.parquet", BYTES),
    "rows.chat_parquet": _rows("chat.parquet", BYTES),
    "yaml.experiment": Kind(
        "config", "experiment/mine.yaml", YAML, read.experiment, (explain_text.another_setting,), 3,
        names=("experiment/mine.yaml", *KEYS),
    ),
    "yaml.rules": Kind(
        "config", "rules.yaml", YAML, read.rules, (explain_text.other_rules,), 2,
        names=("rules.yaml", "components["),
    ),
    "step.state": _step("train_state.pt", TORCH_FILES, explain.values_of_state, weight=4),
    "step.info": _step("train_state.json", JSON, explain.what_a_step_says),
    "step.adapter": _step("adapter_model.safetensors", SAFETENSORS, explain.values_of_trained),
    "step.full": _step("model.safetensors", SAFETENSORS, explain.values_of_trained, run="full"),
    "step.full_state": _step("train_state.pt", TORCH_FILES, explain.values_of_state, run="full"),
    "step.parts": _step(SHARD, SAFETENSORS, explain.values_of_parts, run="parts"),
    "step.parts_state": _step("train_state.pt", TORCH_FILES, explain.values_of_state, run="parts"),
    "step.manifest": Kind(
        "step", f"checkpoints/step_4/{MANIFEST_FILE}", JSON, read.step, names=("step_4",)
    ),
    "torn.state": _torn("train_state.pt"),
    "torn.info": _torn("train_state.json"),
    "torn.adapter": _torn("adapter_model.safetensors"),
    "torn.parts": _torn(SHARD, "parts"),
    "run.metrics": Kind(
        "step", "metrics.jsonl", LINES, read.metrics, (explain_text.kept_metrics,), tolerant=True
    ),
    "report.metrics": _report("metrics.jsonl", LINES, explain_text.metrics_of_a_run, weight=2),
    "report.environment": _report("environment.jsonl", LINES, explain_text.lines_of_a_run),
    "report.samples": _report("samples.jsonl", LINES, explain_text.lines_of_a_run),
    "report.config": _report("config.yaml", YAML, explain_text.config_of_a_run, weight=2),
    "report.adapter": _report(
        "adapter/adapter_model.safetensors", SAFETENSORS, explain_text.adapter_of_a_run
    ),
    "report.adapter_config": _report(
        "adapter/adapter_config.json", JSON, explain_text.adapter_of_a_run
    ),
}  # fmt: skip
