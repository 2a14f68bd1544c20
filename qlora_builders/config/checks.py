"""Value checks of a composed config: every problem is collected, so one run shows them all.

What one key may hold is declared with it (`knob`); here is what several may hold together, and
whether a run may go on from a checkpoint: nothing that shapes its loss curve has changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin

from qlora_builders.config.schema import (
    DPOConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    PlanConfig,
    ReportConfig,
)
from qlora_builders.config.sections import (
    PRESETS,
    REQUIRED,
    UNITS,
    DataConfig,
    Knob,
    MethodConfig,
    knobs,
)
from qlora_builders.config.shipped import demo_path
from qlora_builders.errors import ConfigError, nearest
from qlora_builders.files.outputs import fault_of_path, step_folders

# format -> the data.columns.* that its rows are read by
FORMAT_COLUMNS = {
    "instruct": ("prompt", "completion", "system"),
    "chat": ("system",),
    "text": ("text",),
    "preference": ("prompt", "system", "chosen", "rejected"),
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check(cfg: Any) -> list[str]:
    """Every value that a root config (`FinetuneConfig` ...) may not hold, one message each."""
    rules = [found for root, found in _RULES if isinstance(cfg, root)]
    return [*check_values(cfg), *(problem for found in rules for problem in found(cfg))]


def check_values(cfg: Any) -> list[str]:
    """Those of `check` that are about one key, whatever the others are."""
    problems = []
    for key, knob in knobs(type(cfg)).items():
        value = value_of(cfg, key)
        elements = value if isinstance(value, list) else [value]
        problems += _check_shape(knob, value) or [
            problem for element in elements for problem in _check_value(knob, element)
        ]
    device = getattr(cfg, "device", "auto")
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        problems.append(f"device={device!r} is not allowed; allowed: auto, cpu, cuda, cuda:N")
    return problems


def required(cfg: Any) -> list[str]:
    """What a run still needs from its user although every value given is fine."""
    return list(_required(cfg))


def _required(cfg: Any) -> Iterator[str]:
    for key in knobs(type(cfg)):
        if value_of(cfg, key) == REQUIRED:
            yield f"{key} is required: write {key}=..."
    if isinstance(cfg, PlanConfig) and cfg.budget is None and cfg.bits is None:
        yield "a budget is required: write budget=6GiB or bits=4.6"
    if isinstance(cfg, FinetuneConfig | PlanConfig):
        yield from _demo_rows("data.train", cfg.data.train, cfg.data)
    if isinstance(cfg, EvaluateConfig | PlanConfig):
        if cfg.data.eval is not None:
            yield from _demo_rows("data.eval", cfg.data.eval, cfg.data)
        elif isinstance(cfg, PlanConfig) or not cfg.lm_eval.tasks:
            yield "data.eval is required: write data.eval=FILE"
    if isinstance(cfg, ReportConfig) and not cfg.runs:
        yield "a run is required: write qlora report RUN, with the output_dir of a finetune or dpo"
    asked = isinstance(cfg, GenerateConfig) and (cfg.prompt, cfg.prompts_file, cfg.interactive)
    if asked == (None, None, False):
        yield "a prompt is required: write prompt='...', prompts_file=FILE or interactive=true"


def _demo_rows(key: str, source: str, data: DataConfig) -> Iterator[str]:
    """These hold instruct rows, so another format means that a file was forgotten."""
    instruct_rows = [str(demo_path(name)) for name in ("train.jsonl", "eval.jsonl")]
    if data.format != "instruct" and source in instruct_rows:
        yield (
            f"{key} is required: the demo file has instruct rows, but data.format={data.format};"
            f" write {key}=FILE"
        )


def value_of(cfg: Any, key: str) -> Any:
    """`training.batch_size` of a config."""
    return reduce(getattr, key.split("."), cfg)


def in_bytes(size: str, units: str) -> int:
    """`"5GB"` of a file -> 5 * 10**9, `"24GiB"` of memory -> 24 * 2**30; 0 for no such size."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]+)", size.strip())
    factors = {name.upper(): factor for name, factor in UNITS[units].items()}
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


def _check_value(knob: Knob, value: Any) -> Iterator[str]:
    """Choices, bounds and spelling of one value; null is left to the type."""
    key = knob.key
    if value is None:
        return
    if knob.choices is not None and value not in knob.choices:
        near = nearest(str(value), knob.choices)
        hint = f"; did you mean {near!r}?" if near else ""
        yield f"{key}={value!r} is not allowed; allowed: {', '.join(knob.choices)}{hint}"
    elif isinstance(value, int) and value >= 2**63:
        yield f"{key}={value} is too large a number; it must be < 2**63"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}={value} must be a finite number"
    else:
        compare = {
            ">=": lambda bound: value >= bound,
            ">": lambda bound: value > bound,
            "<=": lambda bound: value <= bound,
            "<": lambda bound: value < bound,
        }
        for sign, bound in knob.bounds.items():
            if bound is not None and not compare[sign](bound):
                yield f"{key}={value} must be {sign} {bound}"
    if knob.units is not None and not in_bytes(value, knob.units):
        *most, last = UNITS[knob.units]
        names, such = f"{', '.join(most)} or {last}", knob.default or f"24{last}"
        yield f"{key}={value!r} is not a size: write a number with {names}, such as {such}"
    if knob.ending is not None and not value.endswith(knob.ending):
        yield f"{key}={value} must end in {knob.ending}"


def _unused(cfg: Any, why: str, *keys: str) -> Iterator[str]:
    """Of keys that are not read: those that somebody set."""
    for key in keys:
        value = value_of(cfg, key)
        if value != knobs(type(cfg))[key].default:
            yield f"{key}={value} has no effect{why}"


def _of_method(cfg: FinetuneConfig) -> Iterator[str]:
    """An option that a method does not take would silently do nothing."""
    method = cfg.method
    if method.name not in PRESETS:
        return  # said of method.name
    adapter, base = PRESETS[method.name]
    taken = (*adapter, *base, *(["targets"] if adapter else []))
    for item in fields(method):
        value, default = getattr(method, item.name), getattr(MethodConfig(), item.name)
        given = value not in (None, [])
        if item.name != "name" and given and item.name not in taken:
            problem = (
                f"method.{item.name}={value} has no effect: method={method.name} does not take it"
            )
            if value == default:  # nobody gave it
                problem += f"; method={method.name} chooses a preset, method.name does not"
            yield problem
        if item.name in taken and not given and default is not None:
            yield f"method.{item.name}={value}: method={method.name} needs a value"


def _of_training(cfg: FinetuneConfig) -> Iterator[str]:
    training, lr = cfg.training, cfg.optimizer.get("lr")
    if not isinstance(cfg.optimizer.get("component"), str):
        yield "optimizer.component is missing: name the class, such as torch.optim.AdamW"
    is_number = isinstance(lr, int | float) and not isinstance(lr, bool)
    if lr is not None and not (is_number and 0 < lr < math.inf):
        yield f"optimizer.lr={lr!r} must be a number > 0"
    if training.lora_plus_ratio is not None and lr is None:
        yield "training.lora_plus_ratio multiplies optimizer.lr, which is missing"
    if training.eval_every is not None and cfg.data.eval is None:
        yield f"training.eval_every={training.eval_every} needs data.eval, which is null"
    yield from _questions("training.samples", training.samples, cfg.data)
    for index, node in enumerate(cfg.loggers):
        if not isinstance(node.get("component"), str):
            yield (
                f"loggers[{index}].component is missing: name the class, such as "
                "qlora_builders.training.loggers.TensorBoardLogger"
            )
    if training.resume is not None and cfg.overwrite:
        yield (
            f"training.resume={training.resume} goes on with a run and overwrite=true deletes it; "
            "give one of them"
        )
    warmup, steps = cfg.lr_schedule.warmup_steps, training.max_steps
    if warmup is not None and steps is not None and warmup > steps:
        yield f"lr_schedule.warmup_steps={warmup} must be <= training.max_steps={steps}"


def _questions(key: str, count: int, data: DataConfig) -> Iterator[str]:
    if count and (data.eval is None or data.format == "text"):
        held = "null" if data.eval is None else "plain text"
        yield f"{key}={count} needs questions in data.eval, which is {held}"


def _of_rows(cfg: FinetuneConfig | EvaluateConfig | PlanConfig) -> Iterator[str]:
    format = cfg.data.format
    if format == "preference" and not isinstance(cfg, DPOConfig | PlanConfig):
        yield "data.format=preference holds pairs of answers, which only `qlora dpo` takes"
    read = FORMAT_COLUMNS.get(format)
    unread = [] if read is None else [c for c in _columns(cfg) if c.rpartition(".")[2] not in read]
    yield from _unused(cfg, f": data.format={format} does not read it", *unread)


def _columns(cfg: Any) -> list[str]:
    return [key for key in knobs(type(cfg)) if key.startswith("data.columns.")]


def _of_pairs(cfg: DPOConfig) -> Iterator[str]:
    if cfg.data.format != "preference":
        yield (
            f"data.format={cfg.data.format} holds no pairs of answers; dpo takes preference, "
            "rows with prompt, chosen and rejected"
        )
    if cfg.data.packing != "none":
        yield f"data.packing={cfg.data.packing}: dpo does not pack pairs; write none"
    if cfg.data.train_on == "all":
        yield "data.train_on=all has no effect: dpo compares the last answers"
    if cfg.dpo.loss_type == "hinge":
        yield from _unused(cfg, " with dpo.loss_type=hinge", "dpo.label_smoothing")
    if cfg.method.name == "full":
        yield "method=full trains the base, which is the reference of dpo; use qlora or lora"


def _of_generate(cfg: GenerateConfig) -> Iterator[str]:
    if cfg.prompt is not None and cfg.prompts_file is not None:
        yield "prompt and prompts_file are both given; give one of them"
    if cfg.prompts_file is None:
        yield from _unused(cfg, ": only the rows of prompts_file have columns", *_columns(cfg))
    if cfg.prompt is not None and cfg.chat and not cfg.prompt.strip():
        yield "prompt is empty, so there is nothing to answer; write prompt='...'"
    given = {
        "prompt": cfg.prompt is not None,
        "prompts_file": cfg.prompts_file is not None,
        "output": cfg.output is not None,
        "batch_size": cfg.batch_size != 1,
        "chat=false": not cfg.chat,
    }
    for name in [name for name in given if cfg.interactive and given[name]]:
        yield (
            f"interactive=true is a conversation in the terminal and does not go with {name}; "
            "leave out one of them"
        )
    for name in () if cfg.chat else ("system", "data.columns.system"):
        if value_of(cfg, name) is not None:
            yield f"{name} is a chat message and has no effect with chat=false"
    if cfg.temperature == 0:
        greedy = " at temperature=0; set a temperature such as 0.7"
        yield from _unused(cfg, greedy, "top_k", "top_p")


def _of_evaluate(cfg: EvaluateConfig) -> Iterator[str]:
    yield from _questions("exact_match", cfg.exact_match, cfg.data)
    if not cfg.lm_eval.tasks:
        unused = [key for key in knobs(EvaluateConfig) if key.startswith("lm_eval.")]
        yield from _unused(cfg, " without lm_eval.tasks", *unused)
    if cfg.compare and cfg.adapter.path is None:
        why = ": without an adapter, compare=true compares the base in both"
        yield from _unused(cfg, why, "quantize")


def _of_plan(cfg: PlanConfig) -> Iterator[str]:
    if cfg.budget is not None and cfg.bits is not None:
        yield f"budget={cfg.budget} and bits={cfg.bits}: give one of them"
    if cfg.rank is None:
        yield from _unused(cfg, " without rank", "alpha")


_RULES: tuple[tuple[Any, Callable[[Any], Iterator[str]]], ...] = (
    (FinetuneConfig, _of_method),
    (FinetuneConfig, _of_training),
    (DPOConfig, _of_pairs),
    (FinetuneConfig | EvaluateConfig | PlanConfig, _of_rows),
    (GenerateConfig, _of_generate),
    (EvaluateConfig, _of_evaluate),
    (PlanConfig, _of_plan),
)


# ---- folders and files, as far as a look tells: whoever opens them does not know their key ----


def name_problems(cfg: Any) -> list[str]:
    """A message for each path that the system does not take, for one reason or another."""
    return [
        f"{key}={path} {fault}"
        for key, knob, path in _paths(cfg)
        if not (knob.path == "rows" and path.startswith("["))
        for fault in [fault_of_path(path) or _below_file(key, path)]
        if fault
    ]


def _paths(cfg: Any) -> list[tuple[str, Knob, str]]:
    return [
        (key, knob, path)
        for key, knob in knobs(type(cfg)).items()
        for value in [value_of(cfg, key) if knob.path else None]
        for path in (value if isinstance(value, list) else [value])
        if path is not None
    ]


def _below_file(key: str, path: str) -> str | None:
    if key not in ("adapter.path", "prompts_file"):
        return None
    below = any(parent.is_file() for parent in Path(path).parents)
    return "cannot be used: Not a directory; choose another place" if below else None


def path_problems(cfg: Any) -> list[str]:
    """A message for each path that cannot be what its key takes."""
    return [
        problem for key, knob, path in _paths(cfg) for problem in _of_path(cfg, key, knob, path)
    ]


def _of_path(cfg: Any, key: str, knob: Knob, name: str) -> Iterator[str]:
    path = Path(name)
    if knob.path == "rows" and name.startswith("[") and not path.exists():
        yield f"{key}={name}: takes one file; write the rows of all into one"
    if knob.path == "folder" and path.is_file():
        yield f"{key}={name} is a file; give its folder: {key}={path.parent}"
    if key == "checkpoint.dir":
        yield from _about_base(name, hasattr(cfg, "adapter"))
    if key == "training.resume":
        yield from _about_resume(name)


def _about_base(name: str, takes_adapter: bool) -> Iterator[str]:
    path, value = Path(name), f"checkpoint.dir={name}"
    if _HUB_NAME.fullmatch(name) and not path.parent.exists():
        download = f"hf download {name} --local-dir {path.name}"
        yield f"{value}: no such directory; models of the hub are downloaded first: {download}"
    elif not path.is_dir():
        return
    elif (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        advice = "name the base it was trained on"
        if takes_adapter:
            advice = f"write adapter.path={name}, and as checkpoint.dir the base it was trained on"
        yield f"{value} holds an adapter and no model; {advice}"
    elif not any(path.glob("*.json")):
        expected = "expected a Hugging Face checkpoint directory, with config.json and weights"
        yield f"{value} holds no model; {expected}"


def _about_resume(resume: str) -> Iterator[str]:
    if resume.lower() in ("true", "yes", "on", "latest"):
        yield f"training.resume={resume}: write auto, for the newest good checkpoint in output_dir"
    folder = Path(resume)
    steps = step_folders(folder.parent if folder.name == "checkpoints" else folder)
    if steps:
        yield (
            f"training.resume={resume} holds checkpoints and is none; the newest is "
            f"training.resume={steps[-1]}, or write auto and their run as output_dir"
        )


_GONE = ("method.components", "method.train")  # checkpoints of 0.1.0 have the preset's rules


def curve_config(cfg: Any) -> dict[str, Any]:
    """Every key whose value shapes the loss curve, flat: `{"training.seed": 0, ...}`."""
    tree = asdict(cfg)
    free = {key for key, knob in knobs(type(cfg)).items() if not knob.shapes_curve}
    return {key: value for key, value in flatten(tree).items() if key not in free}


def check_same_curve(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """
    Raises:
        ConfigError: with every key whose value is not that of the checkpoint.
    """
    missing = "not set"  # means the same as null, which newer keys are by default
    keys = [
        key
        for key in sorted(before.keys() | now.keys())
        if key not in _GONE and before.get(key) != now.get(key)
    ]
    differing = [
        f"{key}={_spell(now.get(key, missing))}, but the checkpoint was trained with "
        f"{_spell(before.get(key, missing))}"
        for key in keys
    ]
    if differing:
        raise refuse_to_resume(checkpoint, "with another config", differing)


def refuse_to_resume(checkpoint: str, why: str, differing: Sequence[str]) -> ConfigError:
    head = (
        f"cannot resume from {checkpoint} {why}; set these back, or start anew "
        "in another output_dir:"
    )
    return ConfigError(head, *differing)


def flatten(
    tree: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()
) -> dict[str, Any]:
    """`{"training": {"seed": 0}}` -> `{"training.seed": 0}`; not below the keys of `whole`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in whole:
            flat |= flatten(value, f"{prefix}{key}.", whole)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _spell(value: Any) -> str:
    return "null" if value is None else str(value)
