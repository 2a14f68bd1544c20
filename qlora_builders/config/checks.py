"""Value checks of a composed config: every problem is collected, so one run shows them all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial, reduce
from pathlib import Path
from typing import Any, get_args, get_origin

from qlora_builders.config.knobs import Knob, knobs
from qlora_builders.config.schema import (
    DPOConfig,
    EstimateConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    ReportConfig,
)
from qlora_builders.config.sections import PRESETS, REQUIRED, DataConfig, MethodConfig
from qlora_builders.config.shipped import demo_path
from qlora_builders.errors import ConfigError, nearest

SHARD_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
MEMORY_UNITS = {"MiB": 2**20, "GiB": 2**30}
# format -> the data.columns.* that its rows are read by
FORMAT_COLUMNS = {
    "instruct": ("prompt", "completion", "system"),
    "chat": ("system",),
    "text": ("text",),
    "preference": ("prompt", "system", "chosen", "rejected"),
}


def check(cfg: Any) -> list[str]:
    """Every value that a root config (`FinetuneConfig` ...) may not hold, one message each."""
    problems = check_values(cfg)
    if isinstance(cfg, FinetuneConfig):
        problems += _check_method(cfg.method) + _check_finetune(cfg)
    if isinstance(cfg, FinetuneConfig | EvaluateConfig):
        problems += _check_dpo(cfg) if isinstance(cfg, DPOConfig) else _check_no_pairs(cfg.data)
    if isinstance(cfg, FinetuneConfig | EvaluateConfig | PlanConfig):
        why = f"data.format={cfg.data.format} does not read it"
        problems += _check_columns(cfg, FORMAT_COLUMNS.get(cfg.data.format), why)
    if isinstance(cfg, GenerateConfig):
        problems += _check_generate(cfg)
    if isinstance(cfg, EvaluateConfig):
        problems += _check_evaluate(cfg)
    if isinstance(cfg, EstimateConfig) and cfg.memory is not None:
        problems += _check_size(memory_in_bytes, cfg.memory)
    if isinstance(cfg, MergeConfig | QuantizeConfig):
        problems += _check_size(size_in_bytes, cfg.max_shard_size)
    if isinstance(cfg, PlanConfig):
        problems += _check_plan(cfg)
    return problems


def check_values(cfg: Any) -> list[str]:
    """Those of `check` that are about one key, whatever the others are."""
    problems = []
    for key, knob in knobs(type(cfg)).items():
        value = value_of(cfg, key)
        problems += _check_shape(knob, value) or [
            problem
            for element in (value if isinstance(value, list) else [value])
            for problem in _check_value(knob, element)
        ]
    if hasattr(cfg, "device"):
        problems += _check_device(cfg.device)
    return problems


def required(cfg: Any) -> list[str]:
    """What a run still needs from its user although every value given is fine."""
    needed = [
        f"{key} is required: write {key}=..."
        for key in knobs(type(cfg))
        if value_of(cfg, key) == REQUIRED
    ]
    if isinstance(cfg, FinetuneConfig):
        needed += _demo_rows("data.train", cfg.data.train, cfg.data)
    if isinstance(cfg, PlanConfig):
        if cfg.budget is None and cfg.bits is None:
            needed.append("a budget is required: write budget=6GiB or bits=4.6")
        needed += _demo_rows("data.train", cfg.data.train, cfg.data)
    if isinstance(cfg, EvaluateConfig | PlanConfig):
        if cfg.data.eval is None:
            if not (isinstance(cfg, EvaluateConfig) and cfg.lm_eval.tasks):
                needed.append("data.eval is required: write data.eval=FILE")
        else:
            needed += _demo_rows("data.eval", cfg.data.eval, cfg.data)
    if isinstance(cfg, ReportConfig) and not cfg.runs:
        needed.append(
            "a run is required: write qlora report RUN, with the output_dir of a finetune or dpo"
        )
    asked = isinstance(cfg, GenerateConfig) and (cfg.prompt, cfg.prompts_file, cfg.interactive)
    if asked == (None, None, False):
        needed.append(
            "a prompt is required: write prompt='...', prompts_file=FILE or interactive=true"
        )
    return needed


def value_of(cfg: Any, key: str) -> Any:
    """`training.batch_size` of a config."""
    return reduce(getattr, key.split("."), cfg)


def size_in_bytes(size: str) -> int:
    """`"5GB"` -> 5000000000; powers of 1000, as Hugging Face counts them."""
    found = _parse_size(size, SHARD_UNITS)
    if not found:
        raise ConfigError(
            f"max_shard_size={size!r} is not a size: write a number with KB, MB or GB, such as 5GB"
        )
    return found


def memory_in_bytes(memory: str, key: str = "memory") -> int:
    """`"24GiB"` -> 24 * 2**30; `key` is for the message."""
    found = _parse_size(memory, MEMORY_UNITS)
    if not found:
        raise ConfigError(
            f"{key}={memory!r} is not a size: write a number with MiB or GiB, such as 24GiB"
        )
    return found


def _parse_size(size: str, units: dict[str, int]) -> int:
    """Bytes; 0 for what is not a size."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]+)", size.strip())
    factors = {name.upper(): factor for name, factor in units.items()}
    return int(float(match[1]) * factors.get(match[2].upper(), 0)) if match else 0


def _check_shape(knob: Knob, value: Any) -> list[str]:
    """What the types of lists and mappings leave open: their elements, and keys that are text."""
    if get_origin(knob.type) is list:
        (element_type,) = get_args(knob.type)
        wanted = get_origin(element_type) or element_type
        name = {str: "text", int: "whole numbers", dict: "mappings of keys and values"}[wanted]
        wrong = [element for element in value if type(element) is not wanted]
        if wrong:
            return [f"{knob.key} takes a list of {name}, and {wrong[0]!r} is none"]
    nodes = value if isinstance(value, list) else [value]
    keys = [key for node in nodes if isinstance(node, dict) for key in node]
    return [f"{knob.key}: the key {key!r} is not text" for key in keys if type(key) is not str]


def _check_value(knob: Knob, value: Any) -> list[str]:
    """Choices and bounds of one value; null is left to the type."""
    if value is None:
        return []
    if knob.choices is not None and value not in knob.choices:
        near = nearest(str(value), knob.choices)
        hint = f"; did you mean {near!r}?" if near else ""
        allowed = ", ".join(knob.choices)
        return [f"{knob.key}={value!r} is not allowed; allowed: {allowed}{hint}"]
    if isinstance(value, int) and value >= 2**63:
        return [f"{knob.key}={value} is too large a number; it must be < 2**63"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{knob.key}={value} must be a finite number"]
    compare = {
        ">=": lambda bound: value >= bound,
        ">": lambda bound: value > bound,
        "<=": lambda bound: value <= bound,
        "<": lambda bound: value < bound,
    }
    return [
        f"{knob.key}={value} must be {sign} {bound}"
        for sign, bound in knob.bounds.items()
        if bound is not None and not compare[sign](bound)
    ]


def _check_device(device: str) -> list[str]:
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        return []
    return [f"device={device!r} is not allowed; allowed: auto, cpu, cuda, cuda:N"]


def _check_method(method: MethodConfig) -> list[str]:
    """An option that a method does not take would silently do nothing."""
    if method.name not in PRESETS:
        return []  # said of method.name
    adapter, base = PRESETS[method.name]
    taken = (*adapter, *base, *(["targets"] if adapter else []))
    problems = []
    for item in fields(method):
        value, default = getattr(method, item.name), getattr(MethodConfig(), item.name)
        given = value not in (None, [])
        if item.name != "name" and given and item.name not in taken:
            problem = (
                f"method.{item.name}={value} has no effect: method={method.name} does not take it"
            )
            if value == default:  # nobody gave it
                problem += f"; method={method.name} chooses a preset, method.name does not"
            problems.append(problem)
        if item.name in taken and not given and default is not None:
            problems.append(f"method.{item.name}={value}: method={method.name} needs a value")
    return problems


def _check_finetune(cfg: FinetuneConfig) -> list[str]:
    problems = []
    if not isinstance(cfg.optimizer.get("component"), str):
        problems.append("optimizer.component is missing: name the class, such as torch.optim.AdamW")
    lr = cfg.optimizer.get("lr")
    if lr is not None and not (_is_number(lr) and 0 < lr < math.inf):
        problems.append(f"optimizer.lr={lr!r} must be a number > 0")
    if cfg.training.lora_plus_ratio is not None and lr is None:
        problems.append("training.lora_plus_ratio multiplies optimizer.lr, which is missing")
    if cfg.training.eval_every is not None and cfg.data.eval is None:
        problems.append(
            f"training.eval_every={cfg.training.eval_every} needs data.eval, which is null"
        )
    problems += _check_questions("training.samples", cfg.training.samples, cfg.data)
    problems += [
        f"loggers[{index}].component is missing: name the class, such as "
        "qlora_builders.training.loggers.TensorBoardLogger"
        for index, node in enumerate(cfg.loggers)
        if not isinstance(node.get("component"), str)
    ]
    if cfg.training.resume is not None and cfg.overwrite:
        problems.append(
            f"training.resume={cfg.training.resume} goes on with a run and overwrite=true deletes "
            "it; give one of them"
        )
    warmup, steps = cfg.lr_schedule.warmup_steps, cfg.training.max_steps
    if warmup is not None and steps is not None and warmup > steps:
        problems.append(f"lr_schedule.warmup_steps={warmup} must be <= training.max_steps={steps}")
    return problems


def _check_questions(key: str, count: int, data: DataConfig) -> list[str]:
    if not count or (data.eval is not None and data.format != "text"):
        return []
    held = "null" if data.eval is None else "plain text"
    return [f"{key}={count} needs questions in data.eval, which is {held}"]


def _check_columns(cfg: Any, read: Sequence[str] | None, why: str) -> list[str]:
    """Columns that are named, and not among those that are read (None: not known)."""
    problems = []
    for key, knob in knobs(type(cfg)).items():
        section, _, column = key.rpartition(".")
        value = value_of(cfg, key)
        unread = section == "data.columns" and read is not None and column not in read
        if unread and value != knob.default:
            problems.append(f"{key}={value} has no effect: {why}")
    return problems


def _check_no_pairs(data: DataConfig) -> list[str]:
    if data.format != "preference":
        return []
    return ["data.format=preference holds pairs of answers, which only `qlora dpo` takes"]


def _check_dpo(cfg: DPOConfig) -> list[str]:
    problems = []
    if cfg.data.format != "preference":
        problems.append(
            f"data.format={cfg.data.format} holds no pairs of answers; dpo takes preference, "
            "rows with prompt, chosen and rejected"
        )
    if cfg.data.packing != "none":
        problems.append(f"data.packing={cfg.data.packing}: dpo does not pack pairs; write none")
    if cfg.data.train_on == "all":
        problems.append("data.train_on=all has no effect: dpo compares the last answers")
    if cfg.dpo.loss_type == "hinge" and cfg.dpo.label_smoothing:
        problems.append(
            f"dpo.label_smoothing={cfg.dpo.label_smoothing} has no effect with dpo.loss_type=hinge"
        )
    if cfg.method.name == "full":
        problems.append(
            "method=full trains the base, which is the reference of dpo; use qlora or lora"
        )
    return problems


def _check_generate(cfg: GenerateConfig) -> list[str]:
    problems = []
    if cfg.prompt is not None and cfg.prompts_file is not None:
        problems.append("prompt and prompts_file are both given; give one of them")
    if cfg.prompts_file is None:
        problems += _check_columns(cfg, (), "only the rows of prompts_file have columns")
    if cfg.prompt is not None and cfg.chat and not cfg.prompt.strip():
        problems.append("prompt is empty, so there is nothing to answer; write prompt='...'")
    if cfg.interactive:
        problems += _check_interactive(cfg)
    if not cfg.chat:
        problems += [
            f"{name} is a chat message and has no effect with chat=false"
            for name in ("system", "data.columns.system")
            if value_of(cfg, name) is not None
        ]
    if cfg.output is not None and Path(cfg.output).suffix != ".jsonl":
        problems.append(f"output={cfg.output} must end in .jsonl")
    if cfg.temperature == 0:
        problems += [
            f"{name}={value} has no effect at temperature=0; set a temperature such as 0.7"
            for name, value in (("top_k", cfg.top_k), ("top_p", cfg.top_p))
            if value is not None
        ]
    return problems


def _check_interactive(cfg: GenerateConfig) -> list[str]:
    given = {
        "prompt": cfg.prompt is not None,
        "prompts_file": cfg.prompts_file is not None,
        "output": cfg.output is not None,
        "batch_size": cfg.batch_size != 1,
        "chat=false": not cfg.chat,
    }
    return [
        f"interactive=true is a conversation in the terminal and does not go with {name}; "
        "leave out one of them"
        for name, is_given in given.items()
        if is_given
    ]


def _check_evaluate(cfg: EvaluateConfig) -> list[str]:
    problems = _check_questions("exact_match", cfg.exact_match, cfg.data)
    if not cfg.lm_eval.tasks:
        problems += [
            f"lm_eval.{name}={value} has no effect without lm_eval.tasks"
            for name, value in asdict(cfg.lm_eval).items()
            if value not in (None, False, [])
        ]
    if cfg.compare and cfg.adapter.path is None and cfg.quantize != "auto":
        problems.append(
            f"quantize={cfg.quantize} has no effect: without an adapter, compare=true compares "
            "the base in both"
        )
    return problems


def _check_plan(cfg: PlanConfig) -> list[str]:
    problems = []
    if cfg.budget is not None:
        problems += _check_size(partial(memory_in_bytes, key="budget"), cfg.budget)
        if cfg.bits is not None:
            problems.append(f"budget={cfg.budget} and bits={cfg.bits}: give one of them")
    if cfg.alpha is not None and cfg.rank is None:
        problems.append(f"alpha={cfg.alpha} has no effect without rank")
    if Path(cfg.output).suffix != ".yaml":
        problems.append(f"output={cfg.output} must end in .yaml")
    return problems


def _check_size(parse: Callable[[str], int], size: str) -> list[str]:
    try:
        parse(size)
    except ConfigError as error:
        return [str(error)]
    return []


def _demo_rows(key: str, source: str, data: DataConfig) -> list[str]:
    """These hold instruct rows, so another format means that a file was forgotten."""
    instruct_rows = [str(demo_path(name)) for name in ("train.jsonl", "eval.jsonl")]
    if data.format == "instruct" or source not in instruct_rows:
        return []
    return [
        f"{key} is required: the demo file has instruct rows, but data.format={data.format};"
        f" write {key}=FILE"
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
