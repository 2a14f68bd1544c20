"""The table of the fuzz job: which file is changed, how, who reads it, and what explains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import explain as why
import explain_text as text
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

from qlora_builders.files.folders import MANIFEST_FILE, write_manifest

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


def _kind(
    folder: str,
    file: str,
    change: tuple[Mutator, ...],
    reader: Callable[[Path], read.Summary],
    *rules: Rule,
    weight: int = 2,
    **options: Any,
) -> Kind:
    return Kind(folder, file, change, reader, rules, weight, **options)


def _base(
    folder: str, file: str, change: tuple[Mutator, ...], *rules: Rule, **options: Any
) -> Kind:
    reader = read.nf4_base if options.pop("plan", True) else read.plain_base
    return _kind(folder, file, change, reader, *rules, bounded=True, **{"weight": 3} | options)


def _tokens(file: str, change: tuple[Mutator, ...], rule: Rule) -> Kind:
    return _kind("tokenizer", file, change, read.tokenizer, rule, weight=3)


def _rows(name: str, change: tuple[Mutator, ...]) -> Kind:
    return _kind("rows", name, change, partial(read.rows, name=name), text.other_rows)


def _adapter(file: str, change: tuple[Mutator, ...], *rules: Rule, weight: int = 3) -> Kind:
    names = ("adapter",)
    return _kind("adapter", file, change, read.adapter, *rules, weight=weight, names=names)


def _step(
    file: str, change: tuple[Mutator, ...], *rules: Rule, run: str = "step", weight: int = 2
) -> Kind:
    """Under a manifest that fits what was changed."""
    options: dict[str, Any] = {"names": ("step_4",), "finish": _new_manifest, "weight": weight}
    return _kind(run, f"checkpoints/step_4/{file}", change, read.step, *rules, **options)


def _torn(file: str, run: str = "step") -> Kind:
    """Under the manifest of what was written: always noticed."""
    path = f"checkpoints/step_4/{file}"
    return _kind(run, path, BYTES, read.step, weight=1, names=("step_4",))


def _report(file: str, change: tuple[Mutator, ...], *rules: Rule, weight: int = 1) -> Kind:
    return _kind("run", file, change, read.report, *rules, weight=weight, tolerant=True)


# of a value that is not allowed: a config has it once
KEYS = (
    "checkpoint.", "components[", "data.", "optimizer.", "output_dir", "train", "training.",
    "method.",
)  # fmt: skip
SHARD = "shard-00001-model-00001-of-00001.safetensors"
PART = "model-00002-of-00005.safetensors"
WHOLE, ADAPTER, STATE = "model.safetensors", "adapter_model.safetensors", "train_state.pt"
TABLE, KEPT = "tokenizer_config.json", (change_header, change_length, change_entries)
MINE = ("experiment/mine.yaml", *KEYS)
KINDS: dict[str, Kind] = {
    "hf.config": _base("hf", "config.json", JSON, why.numbers_of_config, weight=4),
    "hf.weights": _base("hf", WHOLE, SAFETENSORS, why.values_of_weights, plan=False),
    "hf.quantized": _base("hf", WHOLE, SAFETENSORS, why.values_of_quantized_weights, weight=5),
    "sharded.index": _base("sharded", "model.safetensors.index.json", JSON, weight=4),
    "sharded.config": _base("sharded", "config.json", JSON, why.numbers_of_config),
    "sharded.weights": _base("sharded", PART, SAFETENSORS, why.values_of_quantized_weights),
    "nf4.config": _base("nf4", "config.json", JSON, why.numbers_of_config),
    "nf4.weights": _base("nf4", "nf4.safetensors", SAFETENSORS, why.values_beside_nf4, weight=4),
    "nf4.descriptions": _base("nf4", "nf4.safetensors", (change_description,), weight=4),
    "nf4.plain": _base(
        "nf4", "nf4.safetensors", (change_values,), why.values_beside_nf4, plan=False, weight=1
    ),
    "bnb.config": _base("bnb", "config.json", JSON, why.numbers_of_config),
    "bnb.weights": _base("bnb", WHOLE, SAFETENSORS, why.values_of_bitsandbytes, weight=4),
    "bnb.descriptions": _base(
        "bnb", WHOLE, (change_description,), why.values_of_bitsandbytes, weight=4
    ),
    "meta.params": _base("meta", "params.json", JSON, why.numbers_of_params, plan=False),
    "meta.weights": _base(
        "meta", "consolidated.00.pth", TORCH_FILES, why.values_of_meta, plan=False, weight=4
    ),
    "adapter.config": _adapter("adapter_config.json", JSON, weight=6),
    "adapter.record": _adapter("qlora_base.json", JSON, weight=6),
    "adapter.weights": _adapter(ADAPTER, SAFETENSORS, why.values_of_adapter),
    "adapter.alone": _kind(
        "adapter", ADAPTER, KEPT, read.adapter_alone, why.names_of_adapter, bounded=True
    ),
    "foreign.config": _kind(
        "foreign", "adapter_config.json", JSON, read.adapter, why.strength_of_adapter, weight=3,
        names=("foreign",),
    ),
    "tokenizer.json": _tokens("tokenizer.json", JSON, text.another_vocabulary),
    "tokenizer.config": _tokens(TABLE, JSON, text.named_tokens),
    "tokenizer.map": _tokens("special_tokens_map.json", JSON, text.named_tokens),
    "tokenizer.generation": _tokens("generation_config.json", JSON, text.named_tokens),
    "tokenizer.model": _tokens("config.json", JSON, text.named_tokens),
    "template.file": _tokens("chat_template.jinja", TEMPLATES, text.another_template),
    "template.config": _kind(
        "templates", TABLE, JSON, read.tokenizer, text.named_tokens, weight=3,
        names=("tokenizer_config", "put a chat_template.jinja beside"),
    ),
    "rows.instruct": _rows("instruct.jsonl", LINES),
    "rows.chat": _rows("chat.jsonl", LINES),
    "rows.preference": _rows("preference.jsonl", LINES),
    "rows.json": _rows("instruct.json", JSON),
    "rows.parquet": _rows("instruct.parquet", BYTES),
    "rows.chat_parquet": _rows("chat.parquet", BYTES),
    "yaml.experiment": _kind(
        "config", MINE[0], YAML, read.experiment, text.another_setting, weight=3, names=MINE
    ),
    "yaml.rules": _kind(
        "config", "rules.yaml", YAML, read.rules, text.other_rules,
        names=("rules.yaml", "components["),
    ),
    "step.state": _step(STATE, TORCH_FILES, why.values_of_state, weight=4),
    "step.info": _step("train_state.json", JSON, why.what_a_step_says),
    "step.adapter": _step(ADAPTER, SAFETENSORS, why.values_of_trained),
    "step.full": _step(WHOLE, SAFETENSORS, why.values_of_trained, run="full"),
    "step.full_state": _step(STATE, TORCH_FILES, why.values_of_state, run="full"),
    "step.parts": _step(SHARD, SAFETENSORS, why.values_of_parts, run="parts"),
    "step.parts_state": _step(STATE, TORCH_FILES, why.values_of_state, run="parts"),
    "step.manifest": _kind(
        "step", f"checkpoints/step_4/{MANIFEST_FILE}", JSON, read.step, names=("step_4",)
    ),
    "torn.state": _torn(STATE),
    "torn.info": _torn("train_state.json"),
    "torn.adapter": _torn(ADAPTER),
    "torn.parts": _torn(SHARD, "parts"),
    "run.metrics": _kind(
        "step", "metrics.jsonl", LINES, read.metrics, text.kept_metrics, tolerant=True
    ),
    "report.metrics": _report("metrics.jsonl", LINES, text.metrics_of_a_run, weight=2),
    "report.environment": _report("environment.jsonl", LINES, text.lines_of_a_run),
    "report.samples": _report("samples.jsonl", LINES, text.lines_of_a_run),
    "report.config": _report("config.yaml", YAML, text.config_of_a_run, weight=2),
    "report.adapter": _report(f"adapter/{ADAPTER}", SAFETENSORS, text.adapter_of_a_run),
    "report.adapter_config": _report("adapter/adapter_config.json", JSON, text.adapter_of_a_run),
}  # fmt: skip
