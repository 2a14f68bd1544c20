"""The schema's knobs and every message of `check` and `required`."""

from __future__ import annotations

import pytest

from qlora_builders.checkpoint.merge_report import MAX_ERROR
from qlora_builders.config.checks import check, in_bytes, required
from qlora_builders.config.schema import (
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
    QuantizeConfig,
)
from qlora_builders.config.sections import knobs
from qlora_builders.config.shipped import demo_path
from qlora_builders.config.verbs import VERBS
from qlora_builders.names import WRITTEN_FORMATS


def finetune() -> FinetuneConfig:
    cfg = FinetuneConfig(optimizer={"component": "torch.optim.AdamW", "lr": 1e-3})
    cfg.data.train, cfg.data.eval = "train.jsonl", "eval.jsonl"
    return cfg


@pytest.mark.parametrize("root", [row.root for row in VERBS.values()])
def test_every_leaf_has_a_meaning(root: type) -> None:
    leaves = knobs(root)
    assert leaves
    assert all(knob.meaning for knob in leaves.values())


def test_knobs_are_dotted_leaves_in_order() -> None:
    leaves = knobs(FinetuneConfig)
    assert list(leaves)[:3] == ["checkpoint.dir", "checkpoint.format", "model.arch"]
    assert leaves["training.batch_size"].default == 8
    assert leaves["method.targets"].default[0] == "q_proj"
    assert "training" not in leaves


def test_defaults_are_not_shared() -> None:
    FinetuneConfig().components.append({})
    FinetuneConfig().method.targets.clear()
    assert FinetuneConfig().components == []
    assert len(FinetuneConfig().method.targets) == 7


def test_merging_is_as_strict_from_the_command_line_as_from_python() -> None:
    leaves = knobs(MergeConfig)
    assert leaves["max_error"].default == MAX_ERROR
    assert leaves["format"].choices == WRITTEN_FORMATS


def test_good_config_has_no_problems() -> None:
    assert check(finetune()) == []
    assert required(finetune()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("checkpoint.format", "hff", "checkpoint.format='hff' is not allowed; allowed: auto, hf"),
        ("data.format", "chatt", "allowed: chat, instruct, text, preference; did you mean 'chat'?"),
        ("data.train_on", "prompt", "allowed: assistant, completion, all"),
        ("data.max_seq_len", 1, "data.max_seq_len=1 must be >= 2"),
        ("data.max_rows", 0, "data.max_rows=0 must be >= 1"),
        ("method.rank", 0, "method.rank=0 must be >= 1"),
        ("method.alpha", 0.0, "method.alpha=0.0 must be > 0"),
        ("method.alpha", float("nan"), "method.alpha=nan must be a finite number"),
        ("method.dropout", 1.0, "method.dropout=1.0 must be < 1"),
        ("method.rank", None, "method.rank=None: method=qlora needs a value"),
        ("method.targets", [], r"method.targets=[]: method=qlora needs a value"),
        ("lr_schedule.name", "cosin", "did you mean 'cosine'?"),
        ("lr_schedule.warmup_ratio", 1.5, "lr_schedule.warmup_ratio=1.5 must be <= 1"),
        ("training.batch_size", 0, "training.batch_size=0 must be >= 1"),
        ("training.dtype", "bf16", "allowed: float32, bfloat16, float16; did you mean 'bfloat16'?"),
        ("training.compute_dtype", "half", "allowed: auto, float32, bfloat16, float16"),
        ("training.clip_grad_norm", -1.0, "training.clip_grad_norm=-1.0 must be > 0"),
        ("device", "cuda:x", "device='cuda:x' is not allowed; allowed: auto, cpu, cuda, cuda:N"),
        ("optimizer", {"lr": 1.0}, "optimizer.component is missing"),
        ("optimizer", {"component": "a.B", "lr": 0}, "optimizer.lr=0 must be a number > 0"),
        ("optimizer", {"component": "a.B", "lr": float("nan")}, "optimizer.lr=nan must be"),
    ],
)
def test_finetune_values(key: str, value: object, message: str) -> None:
    cfg = finetune()
    section, _, leaf = key.rpartition(".")
    setattr(getattr(cfg, section) if section else cfg, leaf, value)
    problems = check(cfg)
    assert len(problems) == 1
    assert message in problems[0]


def test_method_options_without_effect() -> None:
    cfg = finetune()
    cfg.method.name = "lora"
    assert check(cfg) == [
        "method.block_size=64 has no effect: method=lora does not take it; method=lora chooses a "
        "preset, method.name does not"
    ]
    cfg.method.block_size = 32
    assert check(cfg) == ["method.block_size=32 has no effect: method=lora does not take it"]
    cfg.method.name = "full"
    assert len(check(cfg)) == 8
    cfg.method.name = "qlor"
    assert check(cfg) == [
        "method.name='qlor' is not allowed; allowed: full, lora, qlora; did you mean 'qlora'?"
    ]


def test_eval_every_needs_eval_data() -> None:
    cfg = finetune()
    cfg.data.eval, cfg.training.eval_every = None, 10
    assert check(cfg) == ["training.eval_every=10 needs data.eval, which is null"]


def test_warmup_longer_than_the_run() -> None:
    cfg = finetune()
    cfg.lr_schedule.warmup_steps, cfg.training.max_steps = 11, 10
    assert check(cfg) == ["lr_schedule.warmup_steps=11 must be <= training.max_steps=10"]


def test_generate() -> None:
    assert check(GenerateConfig(prompt="a")) == []
    both = GenerateConfig(prompt="a", prompts_file="b", top_k=5, top_p=0.5)
    both.system, both.chat, both.output = "c", False, "d.json"
    assert check(both) == [
        "output=d.json must end in .jsonl",
        "prompt and prompts_file are both given; give one of them",
        "system is a chat message and has no effect with chat=false",
        "top_k=5 has no effect at temperature=0; set a temperature such as 0.7",
        "top_p=0.5 has no effect at temperature=0; set a temperature such as 0.7",
    ]
    cfg = GenerateConfig(prompts_file="b", chat=False)
    cfg.data.columns.system = "s"
    assert check(cfg) == ["data.columns.system is a chat message and has no effect with chat=false"]
    assert check(GenerateConfig(top_p=0.0, temperature=1.0)) == ["top_p=0.0 must be > 0"]
    assert check(GenerateConfig(quantize="int8"))[0].startswith("quantize='int8' is not allowed")
    assert required(GenerateConfig()) == [
        "a prompt is required: write prompt='...', prompts_file=FILE or interactive=true"
    ]


def test_interactive() -> None:
    cfg = GenerateConfig(interactive=True, system="s")
    assert check(cfg) == required(cfg) == []
    cfg = GenerateConfig(interactive=True, prompt="a", output="b.jsonl", batch_size=2, chat=False)
    head = "interactive=true is a conversation in the terminal and does not go with"
    assert check(cfg) == [
        f"{head} {name}; leave out one of them"
        for name in ("prompt", "output", "batch_size", "chat=false")
    ]
    cfg = GenerateConfig(interactive=True, prompts_file="a")
    assert check(cfg) == [f"{head} prompts_file; leave out one of them"]


def test_merge() -> None:
    cfg = MergeConfig()
    assert required(cfg) == [
        "output_dir is required: write output_dir=...",
        "adapter.path is required: write adapter.path=...",
    ]
    cfg.max_shard_size = "5 gigs"
    assert "max_shard_size='5 gigs' is not a size" in check(cfg)[0]


def test_quantize() -> None:
    cfg = QuantizeConfig()
    assert required(cfg) == ["output_dir is required: write output_dir=..."]
    cfg.max_shard_size, cfg.format, cfg.scale_format = "5", "hf", "bnbb"
    problems = "\n".join(check(cfg))
    assert "format='hf' is not allowed; allowed: nf4, native, bnb-4bit" in problems
    assert "scale_format='bnbb' is not allowed; allowed: geometric, none, bnb" in problems
    assert "max_shard_size='5' is not a size" in problems


@pytest.mark.parametrize(
    ("size", "count"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000)]
)
def test_size_in_bytes(size: str, count: int) -> None:
    assert in_bytes(size, "file") == count


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0GB", "5TB", ""])
def test_not_a_size(size: str) -> None:
    (problem,) = check(MergeConfig(max_shard_size=size))
    assert "is not a size: write a number with KB, MB or GB, such as 5GB" in problem


def test_demo_rows_are_instruct_rows() -> None:
    cfg = finetune()
    cfg.data.train, cfg.data.format = str(demo_path("train.jsonl")), "chat"
    assert required(cfg) == [
        "data.train is required: the demo file has instruct rows, but data.format=chat;"
        " write data.train=FILE"
    ]
    evaluate = EvaluateConfig()
    evaluate.data.eval, evaluate.data.format = str(demo_path("eval.jsonl")), "text"
    assert "data.eval is required: the demo file" in required(evaluate)[0]
    evaluate.data.eval = None
    assert required(evaluate) == ["data.eval is required: write data.eval=FILE"]
