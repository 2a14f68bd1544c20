"""Knobs, config fields with meaning, unit and allowed values; and the sections that verbs share."""

# ruff: noqa: RUF009  (knob returns a dataclasses.field with a default_factory)

from __future__ import annotations

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from qlora_builders.names import (
    CHECKPOINT_FORMATS,
    CHECKPOINTING_MODES,
    COMPILE_MODES,
    DATA_FORMATS,
    DPO_LOSSES,
    DTYPES,
    LR_SHAPES,
    ON_ERROR,
    PACKINGS,
    PROJECTIONS,
    SCALE_FORMATS,
    TRAIN_ON,
)

UNITS = {
    "file": {"KB": 10**3, "MB": 10**6, "GB": 10**9},  # as Hugging Face counts them
    "memory": {"MiB": 2**20, "GiB": 2**30},
}


def knob(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    shapes_curve: bool = True,
    names_code: bool = False,
    names: str | None = None,
    units: str | None = None,
    path: str | None = None,
    ending: str | None = None,
) -> Any:
    """A config field: default, meaning with unit, allowed values (of each element for a list).

    `shapes_curve=False` says that a run may resume with another value: no loss depends on it.
    `names_code=True` says that code will run from there: given on the command line, or not at all.
    `names` is the kind of component that its `component:` names, and `units` the row of `UNITS` for
    a size. `path` says what is there: a folder to read, rows, or other; `ending` is of its name.
    """
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "shapes_curve": shapes_curve,
        "names_code": names_code,
        "names": names,
        "units": units,
        "path": path,
        "ending": ending,
        "bounds": {">=": at_least, ">": above, "<=": at_most, "<": below},
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Knob:
    """One leaf of a root: `training.batch_size` with its type and what `knob` said about it."""

    key: str
    type: Any
    default: Any
    meaning: str
    choices: tuple[str, ...] | None
    bounds: dict[str, float | None]
    shapes_curve: bool
    names_code: bool
    names: str | None
    units: str | None
    path: str | None
    ending: str | None


def knobs(root: type, prefix: str = "") -> dict[str, Knob]:
    """Every leaf key of a root dataclass, in the order of the schema."""
    hints = get_type_hints(root)
    found: dict[str, Knob] = {}
    for item in fields(root):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            found.update(knobs(hints[item.name], key + "."))
            continue
        factory = item.default_factory
        default = item.default if factory is NO_DEFAULT else factory()
        found[key] = Knob(key, hints[item.name], default, **item.metadata)
    return found


# Marks a key that the user has to set. OmegaConf's own mark, ???, cannot replace a default.
REQUIRED = "<required>"
_ADAPTER = (
    "rank", "alpha", "dropout", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"
)  # fmt: skip
_NF4 = ("block_size", "scale_block_size", "scale_format", "scale_search")
# method -> the options of its adapters and of its base
PRESETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "full": ((), ()),
    "lora": (_ADAPTER, ()),
    "qlora": (_ADAPTER, _NF4),
}


def device_knob() -> Any:
    return knob("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if there is one")


def compute_dtype_knob() -> Any:
    meaning = "dtype of matmuls; auto: bfloat16 where native, else float32"
    return knob("auto", meaning, choices=("auto", *DTYPES))


def base_dtype_knob() -> Any:
    meaning = "dtype of the base; auto: as its adapter was trained (no adapter: as its files)"
    return knob("auto", meaning, choices=("auto", *DTYPES))


def quantize_knob() -> Any:
    meaning = (
        "the base in memory: nf4, none, or auto: as its adapter was trained (no adapter: none)"
    )
    return knob("auto", meaning, choices=("auto", "nf4", "none"))


def shard_size_knob() -> Any:
    meaning = "largest file: a number with KB, MB or GB (powers of 1000)"
    return knob("5GB", meaning, units="file")


@dataclass
class CheckpointConfig:
    """The base weights."""

    dir: str = knob(
        "${demo:base}", "folder of the base weights; default: the shipped demo base", path="folder"
    )
    format: str = knob("auto", "layout of that folder", choices=("auto", *CHECKPOINT_FORMATS))


@dataclass
class ModelConfig:
    """The architecture."""

    arch: str | None = knob(None, "name of a published size; null: the checkpoint's config.json")


@dataclass
class MethodConfig:
    """A preset, short for component rules; an option that the preset does not take is null."""

    name: str = knob("qlora", "what the rules are", choices=tuple(PRESETS))
    rank: int | None = knob(16, "rank of the adapters", at_least=1)
    alpha: float | None = knob(32.0, "adapter scale: alpha / rank multiplies B A x", above=0)
    dropout: float | None = knob(0.0, "adapter input dropout, probability", at_least=0, below=1)
    use_rslora: bool | None = knob(False, "scale by alpha / sqrt(rank) instead")
    use_dora: bool | None = knob(False, "DoRA: train the lengths of the weights' rows too")
    lora_bias: bool | None = knob(None, "train a bias with lora_B; null: no")
    init_lora_weights: str | None = knob(
        "default", "where A and B start: default (B is zero), pissa, pissa_niter_N or loftq"
    )
    block_size: int | None = knob(64, "weights per NF4 scale", at_least=1)
    scale_block_size: int | None = knob(None, "NF4 scales per group; null: 256", at_least=1)
    scale_format: str | None = knob(
        None, "how NF4 scales are stored; null: geometric", choices=SCALE_FORMATS
    )
    scale_search: bool | None = knob(None, "search for the best NF4 scales; null: no")
    targets: list[str] = knob(list(PROJECTIONS), "projections that get an adapter")


def allow_base_mismatch_knob() -> Any:
    return knob(False, "load it onto another base than the one recorded with it")


@dataclass
class AdapterConfig:
    """The adapter on top of the base."""

    path: str | None = knob(
        None, "adapter folder (PEFT layout); null: the base alone", path="folder"
    )
    allow_base_mismatch: bool = allow_base_mismatch_knob()


@dataclass
class RequiredAdapterConfig:
    """The adapter to merge."""

    path: str = knob(REQUIRED, "adapter folder (PEFT layout)", path="folder")
    allow_base_mismatch: bool = allow_base_mismatch_knob()


@dataclass
class TokenizerConfig:
    """The tokenizer."""

    path: str | None = knob(
        None, "folder with tokenizer.json; null: checkpoint.dir", shapes_curve=False, path="folder"
    )


@dataclass
class LmEvalConfig:
    """Tasks of lm-evaluation-harness (extra `lm-eval`)."""

    tasks: list[str] = knob([], "tasks or groups to measure, by name")
    tasks_dir: str | None = knob(
        None,
        "folder with tasks of your own, as YAML; they may run Python, so this is taken from the "
        "command line only",
        names_code=True,
        path="other",
    )
    num_fewshot: int | None = knob(
        None, "solved examples before each question; null: as the task says, or none", at_least=0
    )
    limit: int | None = knob(None, "documents of each task; null: all", at_least=1)
    apply_chat_template: bool = knob(False, "ask as a user in the tokenizer's chat template")


@dataclass
class PromptColumnsConfig:
    """Which columns hold what."""

    prompt: str = knob("prompt", "format=instruct, preference: the question")
    completion: str = knob("completion", "format=instruct: the answer")
    system: str | None = knob(
        None, "system message before the row's text or messages; null: `system`, if a row has it"
    )


@dataclass
class ColumnsConfig(PromptColumnsConfig):
    """Which columns of the data hold what."""

    text: str = knob("text", "format=text: the text")
    chosen: str = knob("chosen", "format=preference: the better answer, or conversation")
    rejected: str = knob("rejected", "format=preference: the worse one")


@dataclass
class PromptDataConfig:
    """Rows with prompts."""

    columns: PromptColumnsConfig = field(default_factory=PromptColumnsConfig)


@dataclass
class DataConfig:
    """Training and evaluation rows."""

    train: str = knob(
        "${demo:train.jsonl}", "file or hub id to train on; plan calibrates on it", path="rows"
    )
    eval: str | None = knob(
        "${demo_eval:${data.train}}",
        "file or hub id for the eval loss; null: none; default: the demo's with its data.train",
        shapes_curve=False,
        path="rows",
    )
    format: str = knob(
        "instruct",
        "what a row holds; preference: for dpo, and dpo takes no other",
        choices=DATA_FORMATS,
    )
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    max_seq_len: int = knob(
        512, "tokens per row; longer rows are cut and counted", at_least=2, at_most=2**20
    )
    train_on: str = knob(
        "assistant",
        "tokens that carry loss: every answer, the last answer, everything (format=text: always)",
        choices=TRAIN_ON,
    )
    packing: str = knob(
        "none",
        "an example per row, or as many whole ones as fit into max_seq_len, unseen by each other",
        choices=PACKINGS,
    )
    max_rows: int | None = knob(None, "rows read from each file; null: all", at_least=1)
    on_error: str = knob(
        "raise",
        "a row that cannot be used: raise stops there and names the line; skip goes on and counts",
        choices=ON_ERROR,
        shapes_curve=False,  # the rows that are left do, and they are compared by themselves
    )


@dataclass
class LRScheduleConfig:
    """The learning rate over the run, as a factor of optimizer.lr."""

    name: str = knob("cosine", "shape after warm-up", choices=LR_SHAPES)
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
        choices=CHECKPOINTING_MODES,
    )
    compile: str = knob(
        "auto",
        "torch.compile for the layers; auto: where the run is long enough to gain time",
        choices=COMPILE_MODES,
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
    async_save: bool = knob(
        False,
        "write checkpoints while training goes on, from a copy of what trains in host memory",
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
        path="other",
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
