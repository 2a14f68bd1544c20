"""Every config key: its type, its one default, its unit and meaning, and the values it may take.

One dataclass per section and one root per verb. Recipes receive instances of the roots, so they
read `cfg.training.batch_size` and never a string key with a second default. What a field may hold
is written beside it (`knob`); what several fields may hold together is in `checks.py`.
`qlora VERB --help` prints this file.
"""

# ruff: noqa: RUF009  (knob returns a dataclasses.field with a default_factory)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qlora_builders.config.knobs import knob

# Marks a key that the user has to set. OmegaConf's own mark, ???, cannot replace a default.
REQUIRED = "<required>"
DTYPES = ("float32", "bfloat16", "float16")
DPO_LOSSES = ("sigmoid", "hinge")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def device_knob() -> Any:
    return knob("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if there is one")


def compute_dtype_knob() -> Any:
    meaning = "dtype of matmuls; auto: bfloat16 where native, else float32"
    return knob("auto", meaning, choices=("auto", *DTYPES))


def base_dtype_knob() -> Any:
    meaning = "dtype of the base; auto: as its adapter was trained (no adapter: bfloat16)"
    return knob("auto", meaning, choices=("auto", *DTYPES))


def quantize_knob() -> Any:
    meaning = (
        "the base in memory: nf4, none, or auto: as its adapter was trained (no adapter: none)"
    )
    return knob("auto", meaning, choices=("auto", "nf4", "none"))


@dataclass
class CheckpointConfig:
    """The base weights."""

    dir: str = knob("${demo:base}", "folder of the base weights; default: the shipped demo base")
    format: str = knob(
        "auto", "layout of that folder", choices=("auto", "hf", "meta", "bnb-4bit", "nf4")
    )


@dataclass
class ModelConfig:
    """The architecture."""

    arch: str | None = knob(None, "name of a published size; null: the checkpoint's config.json")


@dataclass
class MethodConfig:
    """A preset that writes the component plan; an option that the preset does not take is null."""

    name: str = knob("qlora", "name of the preset: qlora, lora or full")
    rank: int | None = knob(16, "rank of the adapters", at_least=1)
    alpha: float | None = knob(32.0, "adapter scale: alpha / rank multiplies B A x", above=0)
    dropout: float | None = knob(0.0, "adapter input dropout, probability", at_least=0, below=1)
    use_rslora: bool | None = knob(False, "scale by alpha / sqrt(rank) instead")
    block_size: int | None = knob(64, "weights per NF4 scale", at_least=1)
    targets: list[str] = knob(list(PROJECTIONS), "projections that get an adapter")
    components: list[dict[str, Any]] = knob([], "rules of the preset")
    train: list[str] = knob([], "parameters the preset trains beside adapters, as patterns")


def allow_base_mismatch_knob() -> Any:
    return knob(False, "load it onto another base than the one recorded with it")


@dataclass
class AdapterConfig:
    """The adapter on top of the base."""

    path: str | None = knob(None, "adapter folder (PEFT layout); null: the base alone")
    allow_base_mismatch: bool = allow_base_mismatch_knob()


@dataclass
class RequiredAdapterConfig:
    """The adapter to merge."""

    path: str = knob(REQUIRED, "adapter folder (PEFT layout)")
    allow_base_mismatch: bool = allow_base_mismatch_knob()


@dataclass
class TokenizerConfig:
    """The tokenizer."""

    path: str | None = knob(
        None, "folder with tokenizer.json; null: checkpoint.dir", shapes_curve=False
    )


@dataclass
class ColumnsConfig:
    """Which columns of the data hold what."""

    prompt: str = knob("prompt", "format=instruct, preference: the question")
    completion: str = knob("completion", "format=instruct: the answer")
    system: str | None = knob(None, "format=instruct: the system message; null: none")
    text: str = knob("text", "format=text: the text")
    chosen: str = knob("chosen", "format=preference: the better answer, or conversation")
    rejected: str = knob("rejected", "format=preference: the worse one")


@dataclass
class DataConfig:
    """Training and evaluation rows."""

    train: str = knob("${demo:train.jsonl}", "file or hub id to train on (finetune and dpo only)")
    eval: str | None = knob(
        "${demo_eval:${data.train}}",
        "file or hub id for the eval loss; null: none; default: the demo's with its data.train",
    )
    format: str = knob(
        "instruct",
        "what a row holds; preference: for dpo, and dpo takes no other",
        choices=("chat", "instruct", "text", "preference"),
    )
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    max_seq_len: int = knob(512, "tokens per row; longer rows are cut and counted", at_least=2)
    train_on: str = knob(
        "assistant",
        "tokens that carry loss: every answer, the last answer, everything (format=text: always)",
        choices=("assistant", "completion", "all"),
    )
    packing: str = knob(
        "none",
        "an example per row, or as many whole ones as fit into max_seq_len, unseen by each other",
        choices=("none", "best_fit"),
    )
    max_rows: int | None = knob(None, "rows read from each file; null: all", at_least=1)


@dataclass
class LRScheduleConfig:
    """The learning rate over the run, as a factor of optimizer.lr."""

    name: str = knob("cosine", "shape after warm-up", choices=("cosine", "linear", "constant"))
    warmup_ratio: float = knob(0.03, "warm-up, fraction of all steps", at_least=0, at_most=1)
    warmup_steps: int | None = knob(
        None, "warm-up, optimizer steps; null: from warmup_ratio", at_least=0
    )
    min_lr_ratio: float = knob(0.0, "factor at the last step", at_least=0, at_most=1)


@dataclass
class TrainingConfig:
    """The loop. A step is one optimizer step: batch_size * grad_accumulation rows."""

    batch_size: int = knob(8, "rows per forward pass, over all processes", at_least=1)
    grad_accumulation: int = knob(1, "forward passes per step", at_least=1)
    max_steps: int | None = knob(
        None,
        "steps to train, whatever epochs says; null: as many as epochs takes",
        at_least=1,
        shapes_curve=False,  # but for the learning rate, which is compared by itself
    )
    epochs: int = knob(1, "passes over data.train", at_least=1, shapes_curve=False)
    seed: int = knob(0, "fixes init, data order and dropout", at_least=0)
    dtype: str = knob("bfloat16", "dtype of frozen weights", choices=DTYPES)
    compute_dtype: str = compute_dtype_knob()
    activation_checkpointing: str = knob(
        "none",
        "what layers keep for backward: all, input and attention, input, input on the host (GPUs);"
        " true is full",
        choices=("none", "selective", "full", "offload"),
    )
    compile: str = knob(
        "auto",
        "torch.compile for the layers; auto: where the run is long enough to gain time",
        choices=("auto", "on", "off"),
    )
    log_every: int = knob(1, "steps between lines in metrics.jsonl", at_least=1, shapes_curve=False)
    eval_every: int | None = knob(
        None, "steps between eval losses; null: only at the end", at_least=1, shapes_curve=False
    )
    save_every: int | None = knob(
        None,
        "steps between checkpoints to resume from; null: only when a signal stops the run",
        at_least=1,
        shapes_curve=False,
    )
    keep_last: int = knob(
        1, "checkpoints kept; a new one is written first", at_least=1, shapes_curve=False
    )
    resume: str | None = knob(
        None,
        "null: a new run; auto: go on from the newest good checkpoint in output_dir, or start if "
        "there is none; or the path of a checkpoints/step_N",
        shapes_curve=False,
    )
    samples: int = knob(
        0,
        "rows of data.eval answered before and after training, for the report; 0: none",
        at_least=0,
        shapes_curve=False,
    )
    clip_grad_norm: float | None = knob(1.0, "largest gradient norm; null: no clipping", above=0)
    lora_plus_ratio: float | None = knob(None, "LoRA+: lr of lora_B / optimizer.lr", above=0)

    def __post_init__(self) -> None:
        """`compile: off` is a boolean in YAML; checkpointing was one before it had modes."""
        switch, mode = {"true": "on", "false": "off"}, {"true": "full", "false": "none"}
        self.compile = switch.get(self.compile.lower(), self.compile)
        checkpointing = self.activation_checkpointing
        self.activation_checkpointing = mode.get(checkpointing.lower(), checkpointing)


@dataclass
class DistributedConfig:
    """Several processes (--nproc-per-node, or torchrun). Losses do not depend on their number."""

    shard: int | None = knob(
        None, "ranks that share one copy; null: all; 1: one each", at_least=1, shapes_curve=False
    )
    cpu_offload: bool = knob(
        False, "keep a rank's share and the optimizer in host memory", shapes_curve=False
    )


@dataclass
class FinetuneConfig:
    """Train adapters or weights. `inspect` takes the same keys and shows what would be built."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    components: list[dict[str, Any]] = knob(
        [], "your rules, after the method's; the last match wins"
    )
    train: list[str] = knob([], "parameters that train too, as patterns: [norm, embed_tokens]")
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: dict[str, Any] = knob({}, "`component`: its class; all other keys: its arguments")
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    loggers: list[dict[str, Any]] = knob(
        [],
        "where metrics go beside metrics.jsonl: `component`: a class of training.loggers or your "
        "own; all other keys: its arguments",
        shapes_curve=False,
    )
    device: str = device_knob()
    output_dir: str = knob(
        "runs/${now:%Y-%m-%d_%H-%M-%S}",
        "run folder; must be new or empty, unless training.resume or overwrite is set",
        shapes_curve=False,
    )
    overwrite: bool = knob(False, "replace a run that is in output_dir", shapes_curve=False)


@dataclass
class DPOLossConfig:
    """Direct preference optimization. The reference is the base without its adapter."""

    beta: float = knob(
        0.1, "how much the reference holds back; reward = beta * log(p / p_reference)", above=0
    )
    loss_type: str = knob(
        "sigmoid", "of the difference of rewards: -log sigmoid, or a hinge at 1", choices=DPO_LOSSES
    )
    label_smoothing: float = knob(
        0.0, "share of pairs taken to be labelled the wrong way round", at_least=0, below=0.5
    )


@dataclass
class DPOConfig(FinetuneConfig):
    """Train adapters on preferences: a chosen and a rejected answer per row."""

    dpo: DPOLossConfig = field(default_factory=DPOLossConfig)


@dataclass
class EstimateConfig(FinetuneConfig):
    """Peak memory of such a finetune, if every row has data.max_seq_len tokens and all train."""

    memory: str | None = knob(None, "also show what fits into this much, such as 24GiB")


@dataclass
class GenerateConfig:
    """Answer prompts with a base, or a base and an adapter."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantize: str = quantize_knob()
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prompt: str | None = knob(None, "the prompt")
    prompts_file: str | None = knob(None, "text file, one prompt per line, instead of prompt")
    system: str | None = knob(None, "system message; null: none")
    chat: bool = knob(True, "wrap prompts in the tokenizer's chat template, if it has one")
    max_new_tokens: int = knob(128, "longest answer, tokens", at_least=1)
    temperature: float = knob(0.0, "0: always the likeliest token", at_least=0)
    top_k: int | None = knob(None, "sample from the k likeliest tokens; null: all", at_least=1)
    top_p: float | None = knob(
        None, "sample from the likeliest tokens of this total probability", above=0, at_most=1
    )
    seed: int = knob(0, "fixes sampling", at_least=0)
    stream: bool = knob(True, "print tokens as they come (batch_size=1)")
    batch_size: int = knob(1, "prompts answered at once", at_least=1)
    compile: bool = knob(False, "compile the decoding step; on GPUs it becomes a CUDA graph")
    dtype: str = base_dtype_knob()
    compute_dtype: str = compute_dtype_knob()
    device: str = device_knob()


@dataclass
class EvaluateConfig:
    """Loss, perplexity and exact match on data.eval."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantize: str = quantize_knob()
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = knob(8, "rows per forward pass", at_least=1)
    exact_match: int = knob(0, "rows answered greedily and compared; 0: none", at_least=0)
    max_new_tokens: int = knob(128, "longest of those answers, tokens", at_least=1)
    output: str | None = knob(None, "JSON file for the results; null: only printed")
    dtype: str = base_dtype_knob()
    compute_dtype: str = compute_dtype_knob()
    device: str = device_knob()


@dataclass
class MergeConfig:
    """Add an adapter to the weights and write a Hugging Face folder."""

    output_dir: str = knob(REQUIRED, "folder to write; must not exist")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    adapter: RequiredAdapterConfig = field(default_factory=RequiredAdapterConfig)
    quantize: str = quantize_knob()
    base: str = knob(
        "dequantized",
        "weights to add to: dequantized (those seen in training), or a folder of 16-bit originals",
    )
    dtype: str = knob("bfloat16", "dtype written", choices=DTYPES)
    format: str = knob(
        "hf",
        "layout written; nf4 and bnb-4bit quantize again, which erases most small updates",
        choices=("hf", "nf4", "bnb-4bit"),
    )
    max_error: float = knob(
        0.5, "largest |error| / |update| accepted, in the weights and in the logits", above=0
    )
    report: str | None = knob(None, "JSON file for the figures of every layer; null: none")
    max_shard_size: str = knob("5GB", "largest file: a number with KB, MB or GB (powers of 1000)")


@dataclass
class QuantizeConfig:
    """Write a checkpoint with its linear layers in NF4."""

    output_dir: str = knob(REQUIRED, "folder to write; must not exist")
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    format: str = knob(
        "nf4",
        "nf4: our own layout; bnb-4bit: for transformers + bitsandbytes",
        choices=("nf4", "bnb-4bit"),
    )
    block_size: int | None = knob(None, "weights per scale; null: 64, or as stored", at_least=1)
    scale_format: str | None = knob(
        None,
        "how scales are stored; null: geometric (format=bnb-4bit: bnb), or as stored",
        choices=("geometric", "bnb", "none"),
    )
    scale_search: bool | None = knob(None, "search for the best scales: slower, more accurate")
    components: list[dict[str, Any]] = knob(
        [], "your rules, after the one for all decoder layers; the last match wins"
    )
    dtype: str = knob("bfloat16", "dtype of weights before quantizing", choices=DTYPES)
    max_shard_size: str = knob("5GB", "largest file: a number with KB, MB or GB (powers of 1000)")


@dataclass
class ReportConfig:
    """Write one self-contained HTML page on one run, or on several beside each other."""

    runs: list[str] = knob([], "run folders; may be given without `runs=`")
    output: str | None = knob(None, "HTML file; null: report.html in the first run's folder")


ROOTS: dict[str, type] = {
    "finetune": FinetuneConfig,
    "dpo": DPOConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "merge": MergeConfig,
    "quantize": QuantizeConfig,
    "inspect": FinetuneConfig,
    "estimate": EstimateConfig,
    "report": ReportConfig,
}
