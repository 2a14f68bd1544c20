"""Every config key: its type, its one default, its unit and meaning, and the values it may take.

One dataclass per section (in `sections.py`) and one root per verb. Recipes receive instances of
the roots, so they read `cfg.training.batch_size` and never a string key with a second default. What
a field may hold is written beside it (`knob`); what several may hold together is in `checks.py`.
`qlora VERB --help` prints this file.
"""

# ruff: noqa: RUF009  (knob returns a dataclasses.field with a default_factory)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_builders.config.sections import (
    PRESETS,
    REQUIRED,
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    DPOLossConfig,
    LmEvalConfig,
    LRScheduleConfig,
    MethodConfig,
    ModelConfig,
    PromptDataConfig,
    RequiredAdapterConfig,
    TokenizerConfig,
    TrainingConfig,
    base_dtype_knob,
    compute_dtype_knob,
    device_knob,
    knob,
    quantize_knob,
    shard_size_knob,
)
from qlora_builders.names import (
    DTYPES,
    PROJECTIONS,
    QUANTIZED_FORMATS,
    SCALE_FORMATS,
    WRITTEN_FORMATS,
)


@dataclass
class FinetuneConfig:
    """Train adapters or weights. `inspect` takes the same keys and shows what would be built."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    components: list[dict[str, Any]] = knob(
        [], "your rules, after the method's; the last match wins; or FILE.yaml with them"
    )
    train: list[str] = knob([], "parameters that train too, as patterns: [norm, embed_tokens]")
    train_tokens: list[int] = knob(
        [], "token ids whose rows of the embedding (and of a tied head) train too", at_least=0
    )
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: dict[str, Any] = knob(
        {}, "`component`: its class; all other keys: its arguments", names="optimizer"
    )
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loggers: list[dict[str, Any]] = knob(
        [],
        "where metrics go beside metrics.jsonl: `component`: a class of training.loggers or your "
        "own; all other keys: its arguments",
        shapes_curve=False,
        names="logger",
    )
    device: str = device_knob()
    output_dir: str = knob(
        "runs/${now:%Y-%m-%d_%H-%M-%S}",
        "run folder; must be new or empty, unless training.resume or overwrite is set",
        shapes_curve=False,
        path="other",
    )
    overwrite: bool = knob(False, "replace a run that is in output_dir", shapes_curve=False)
    dry_run: bool = knob(
        False, "load and check everything (--dry-run), train and write nothing", shapes_curve=False
    )


@dataclass
class DPOConfig(FinetuneConfig):
    """Train adapters on preferences: a chosen and a rejected answer per row."""

    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)


@dataclass
class EstimateConfig(FinetuneConfig):
    """Peak memory of such a finetune, if every row has data.max_seq_len tokens and all train."""

    memory: str | None = knob(
        None, "also show what fits into this much, such as 24GiB", units="memory"
    )
    ranks: int = knob(1, "processes (--nproc-per-node x nodes); figures are of one", at_least=1)


@dataclass
class GenerateConfig:
    """Answer prompts with a base, or a base and an adapter."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantize: str = quantize_knob()
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompt: str | None = knob(None, "the prompt")
    prompts_file: str | None = knob(
        None,
        "file of prompts: .jsonl, .json or .parquet with rows as data.train has them (messages or "
        "a prompt; an answer at the end is left out), or .txt with one per line",
        path="rows",
    )
    interactive: bool = knob(
        False, "a conversation: a line of stdin, its answer, and so on until Ctrl-D or Ctrl-C"
    )
    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    output: str | None = knob(
        None,
        "new .jsonl file with a row for each answer, instead of printing it; null: none",
        path="other",
        ending=".jsonl",
    )
    system: str | None = knob(None, "system message, for rows without one of their own; null: none")
    chat: bool = knob(
        True,
        "ask as instruct and chat rows are trained: in the chat template, or without one with a "
        "newline behind; false: the prompt is text to go on with",
    )
    max_new_tokens: int = knob(128, "longest answer, tokens", at_least=1)
    temperature: float = knob(0.0, "0: always the likeliest token", at_least=0)
    top_k: int | None = knob(None, "sample from the k likeliest tokens; null: all", at_least=1)
    top_p: float | None = knob(
        None, "sample from the likeliest tokens of this total probability", above=0, at_most=1
    )
    seed: int = knob(0, "fixes sampling", at_least=0)
    stream: bool = knob(True, "print tokens as they come (batch_size=1, and no output)")
    batch_size: int = knob(1, "prompts answered at once", at_least=1)
    compile: bool = knob(False, "compile the decoding step; on GPUs it becomes a CUDA graph")
    dtype: str = base_dtype_knob()
    compute_dtype: str = compute_dtype_knob()
    device: str = device_knob()


@dataclass
class EvaluateConfig:
    """Loss, perplexity and exact match on data.eval, and tasks of lm-evaluation-harness."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantize: str = quantize_knob()
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = knob(8, "rows per forward pass", at_least=1)
    exact_match: int = knob(0, "rows answered greedily and compared; 0: none", at_least=0)
    max_new_tokens: int = knob(128, "longest of those answers, tokens", at_least=1)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    compare: bool = knob(
        False, "measure the base, the base in NF4 and the base with its adapter, one after another"
    )
    output: str | None = knob(
        None, "new JSON file for the results; null: only printed", path="other"
    )
    dtype: str = base_dtype_knob()
    compute_dtype: str = compute_dtype_knob()
    device: str = device_knob()


@dataclass
class MergeConfig:
    """Add an adapter to the weights and write a Hugging Face folder."""

    output_dir: str = knob(REQUIRED, "folder to write; must not exist", path="other")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    adapter: RequiredAdapterConfig = field(default_factory=RequiredAdapterConfig)
    quantize: str = quantize_knob()
    base: str = knob(
        "dequantized",
        "weights to add to: dequantized (those seen in training), or a folder of 16-bit originals",
        path="other",
    )
    dtype: str = knob("bfloat16", "dtype written", choices=DTYPES)
    format: str = knob(
        "hf",
        "layout written; all but hf quantize again, which erases most small updates",
        choices=WRITTEN_FORMATS,
    )
    max_error: float = knob(
        0.5, "largest |error| / |update| accepted, in the weights and in the logits", above=0
    )
    report: str | None = knob(
        None, "new JSON file for the figures of every layer; null: none", path="other"
    )
    max_shard_size: str = shard_size_knob()


@dataclass
class QuantizeConfig:
    """Write a checkpoint with its linear layers in NF4."""

    output_dir: str = knob(REQUIRED, "folder to write; must not exist", path="other")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    format: str = knob(
        "nf4",
        "nf4: our own layout; native: the same for any types; bnb-4bit: for transformers",
        choices=QUANTIZED_FORMATS,
    )
    block_size: int | None = knob(None, "weights per scale; null: 64, or as stored", at_least=1)
    scale_format: str | None = knob(
        None,
        "how scales are stored; null: geometric (format=bnb-4bit: bnb), or as stored",
        choices=SCALE_FORMATS,
    )
    scale_search: bool | None = knob(None, "search for the best scales: slower, more accurate")
    components: list[dict[str, Any]] = knob(
        [], "your rules, after the one for all decoder layers; or FILE.yaml with them"
    )
    dtype: str = knob("bfloat16", "dtype of weights before quantizing", choices=DTYPES)
    max_shard_size: str = shard_size_knob()


@dataclass
class PlanConfig:
    """Choose the precision of every linear layer under a memory budget, and measure the result."""

    budget: str | None = knob(
        None, "memory of the whole base, such as 6GiB; give this or bits", units="memory"
    )
    bits: float | None = knob(
        None, "mean bits per weight of the linear layers (16-bit embeddings not counted)", above=0
    )
    output: str = knob(
        "plan.yaml",
        "file for the rules; figures go beside it, in .json",
        path="other",
        ending=".yaml",
    )
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    calibration_tokens: int = knob(32768, "tokens of data.train to measure on", at_least=1)
    rank: int | None = knob(
        None, "adapters of this rank in the rules, for finetune; null: none", at_least=1
    )
    alpha: float | None = knob(None, "scale of those adapters; null: 2 * rank", above=0)
    batch_size: int = knob(8, "rows per forward pass", at_least=1)
    seed: int = knob(0, "fixes which rows of data.train are measured on", at_least=0)
    dtype: str = knob("bfloat16", "dtype of weights before quantizing", choices=DTYPES)
    compute_dtype: str = compute_dtype_knob()
    device: str = device_knob()


@dataclass
class ReportConfig:
    """Write one self-contained HTML page on one run, or on several beside each other."""

    runs: list[str] = knob([], "run folders; may be given without `runs=`", path="other")
    output: str | None = knob(
        None, "HTML file; null: report.html in the run's folder, here for several", path="other"
    )


def plan_rules(cfg: FinetuneConfig) -> list[dict[str, Any]]:
    """The rules of the method, then the user's; the last one that matches a slot decides it."""
    return [*preset_rules(cfg.method), *cfg.components]


def train_patterns(cfg: FinetuneConfig) -> list[str]:
    """Patterns of the parameters that train beside the adapters."""
    rows = [f"embed_tokens[{','.join(map(str, cfg.train_tokens))}]"] if cfg.train_tokens else []
    return [*(["**"] if cfg.method.name == "full" else []), *cfg.train, *rows]


def preset_rules(method: MethodConfig) -> list[dict[str, Any]]:
    """The plan that `method=NAME` is short for; options at null are left to the components."""
    if method.name == "full":
        return [{"match": "**", "kind": "linear", "trainable": True}]

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(method, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    adapter, base = PRESETS[method.name]
    names = method.targets
    targets = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    if set(names) == set(PROJECTIONS):
        targets = "*_proj"  # those of a family that has some of them in one, too
    adapted = {"match": f"layers.*.*.{targets}", "kind": method.name, **given(adapter + base)}
    if not base:
        return [adapted]
    return [{"match": "layers.**", "kind": "frozen_nf4", **given(base)}, adapted]
