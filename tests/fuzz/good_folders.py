"""One sound folder of every kind that the product reads, small and the same every time."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers.decoders import ByteLevel

from qlora_builders.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from qlora_builders.models import LlamaArch, RopeScaling, llama
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.runs.state import capture_step, write_step

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
NF4 = [{"match": "layers.**", "kind": "frozen_nf4"}]
ADAPTED = [
    *NF4,
    {"match": "layers.*.self_attn.q_proj", "kind": "qlora", "rank": 4, "alpha": 8},
    {"match": "layers.0.mlp.up_proj", "kind": "qlora", "rank": 2, "alpha": 3},
]
QUARTER = [{"match": "layers.*.self_attn.q_proj", "kind": "lora", "rank": 2, "alpha": 4}]
FULL = [{"match": "layers.*.self_attn.k_proj", "kind": "linear", "trainable": True}]
PARAMS = {
    "dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "multiple_of": 32,
    "ffn_dim_multiplier": 1.5, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ '<|start|>' + message['role'] + '\n' + message['content'] | trim + '<|end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
SPECIALS = ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>", "<|pad|>"]
_CORPUS = ["system user assistant two red dresses and 12 green hats\n", "what is it? It is a hat."]
EXPERIMENT = """# @package _global_
defaults:
  - override /data: chat
  - override /optimizer: sgd
output_dir: runs/fuzz
checkpoint:
  dir: base
data:
  train: rows.jsonl
  eval: null
  max_seq_len: 128
training:
  max_steps: 3
  seed: 7
  compute_dtype: float32
components:
  - {match: "layers.0.**", kind: linear}
  - match: lm_head
    kind: qlora
    rank: 2
    alpha: 4.0
train: [norm]
optimizer:
  lr: 2.0e-3
  momentum: 0.9
"""
RULES = """components:
  - {match: "layers.**", kind: qlora, rank: 4, alpha: 8}
  - {match: "layers.0.mlp.*_proj", kind: frozen_nf4, block_size: 32}
  - match: lm_head
    kind: lora
    rank: 2
    alpha: 4.0
"""


def write_good_folders(path: Path) -> None:
    torch.manual_seed(0)
    _write_bases(path)
    _write_meta(path)
    _write_adapters(path)
    _write_tokenizer(path / "tokenizer")
    _write_rows(path / "rows")
    (path / "config" / "experiment").mkdir(parents=True)
    (path / "config" / "experiment" / "mine.yaml").write_text(EXPERIMENT)
    (path / "config" / "rules.yaml").write_text(RULES)
    _write_steps(path)
    _write_run(path)


# ---- weights ------------------------------------------------------------------------------------


def _write_bases(path: Path) -> None:
    model = llama(LlamaArch(**SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(model, path / "hf")
    scaled = llama(LlamaArch(**SIZES | {"rope_scaling": LLAMA3_ROPE}))
    save_checkpoint(scaled, path / "sharded", max_shard_bytes=20_000)
    save_checkpoint(load_checkpoint(path / "hf", NF4), path / "nf4", format="nf4")
    bnb = [rule | {"scale_format": "bnb"} for rule in NF4]
    save_checkpoint(load_checkpoint(path / "hf", bnb), path / "bnb", format="bnb-4bit")


_META = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
}  # fmt: skip


def name_of_meta(name: str) -> str:
    """Of a parameter of ours."""
    layer = "layers.0." if name.startswith("model.layers.") else ""
    short = name.removeprefix("model.layers.0.").removesuffix(".weight")
    return f"{layer}{_META[short]}.weight"


def _write_meta(path: Path) -> None:
    """Rows of a head interleaved."""
    tensors = load_file(path / "hf" / "model.safetensors")
    out = {}
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.view(-1, 2, SIZES["head_dim"] // 2, tensor.shape[1])
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        out[name_of_meta(name)] = tensor.clone()
    (path / "meta").mkdir()
    torch.save(out, path / "meta" / "consolidated.00.pth")
    (path / "meta" / "params.json").write_text(json.dumps(PARAMS))


def _randomize(model: CausalLM) -> None:
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight)


def _write_adapters(path: Path) -> None:
    model = load_checkpoint(path / "hf", ADAPTED, train=["norm"])
    _randomize(model)
    save_adapter(model, path / "adapter", base_model=str(path / "hf"))
    shutil.copytree(path / "adapter", path / "foreign")  # as another tool leaves it
    (path / "foreign" / "qlora_base.json").unlink()


# ---- tokenizers and rows ------------------------------------------------------------------------


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}|\s+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=SPECIALS,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzIĠĊ0123456789?.{}:"),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    bos = ("<|bos|>", backend.token_to_id("<|bos|>"))
    template = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[bos]
    )
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template]
    )
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    ids = {name: backend.token_to_id(f"<|{name}|>") for name in ("bos", "eos", "end", "pad")}
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 64,
            "bos_token": {"content": "<|bos|>", "lstrip": False, "special": True},
            "eos_token": "<|eos|>",
        },
        "special_tokens_map.json": {
            "bos_token": "<|bos|>",
            "eos_token": {"content": "<|eos|>", "special": True},
            "pad_token": "<|pad|>",
        },
        "generation_config.json": {"bos_token_id": ids["bos"], "eos_token_id": [ids["eos"],
        ids["end"]]},
        "config.json": {"vocab_size": 90, "bos_token_id": ids["bos"], "eos_token_id": ids["eos"]},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(folder, folder.parent / "templates")
    (folder.parent / "templates" / "chat_template.jinja").unlink()
    config = files["tokenizer_config.json"] | {"chat_template": TEMPLATE}
    (folder.parent / "templates" / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def _turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def _write_rows(folder: Path) -> None:
    folder.mkdir()
    pairs = [(f"{n} red dresses", f"it is {n} and {n + 1} hats") for n in range(2, 7)]
    instruct = [{"prompt": a, "completion": b} for a, b in pairs]
    chat = [{"messages": _turns(a, b, "what is it?", "a hat.")} for a, b in pairs]
    preference = [{"prompt": a, "chosen": b, "rejected": "a hat."} for a, b in pairs]
    for name, rows in (("instruct", instruct), ("chat", chat), ("preference", preference)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "instruct.json").write_text(json.dumps({"data": instruct}))
    for name, rows in (("instruct", instruct), ("chat", chat)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    for file in (folder.parent / "tokenizer").iterdir():
        shutil.copy(file, folder)


# ---- runs ---------------------------------------------------------------------------------------


def seed_everything() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def step_model(path: Path, kind: str) -> tuple[CausalLM, torch.optim.Optimizer]:
    """What a run of that kind has before it reads a checkpoint."""
    seed_everything()
    components, train = (FULL, []) if kind in ("full", "parts") else (QUARTER, ["norm"])
    model = load_checkpoint(path / "hf", components, train=train, compute_dtype=torch.float32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-2)


def _write_steps(path: Path) -> None:
    for kind in ("step", "full", "parts"):
        model, optimizer = step_model(path, kind)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        run = path / kind
        folder = run / "checkpoints" / "step_4"
        about = {"total_steps": 9, "config": {"training.seed": 7}, "compile": "off"}
        state = capture_step(model, optimizer, step=4, about=about, base_model=str(path / "hf"))
        if kind == "parts":
            state = _in_parts(state, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is taken for a single process
            write_step(folder, state)
        (run / "config.yaml").write_text(EXPERIMENT)
        rows = [{"step": step, "loss": 3.0 / step} for step in range(1, 6)]
        rows.insert(2, {"step": 2, "eval_loss": 2.5, "eval_tokens": 50})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _in_parts(state: Any, model: CausalLM) -> Any:
    """As ranks write what they hold of sharded weights, here one rank of all."""
    parts = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = state.whole["optimizer"]["state"]
    for index, values in tensors.items():
        for key in ("exp_avg", "exp_avg_sq"):
            parts[f"optimizer.{index}.{key}"] = values.pop(key)
    return replace(state, parts=parts, write_trained=None)


def _write_run(path: Path) -> None:
    """As finetune leaves it, for `report`."""
    run = path / "run"
    shutil.copytree(path / "adapter", run / "adapter")
    (run / "config.yaml").write_text(EXPERIMENT.replace("dir: base", f"dir: {path / 'hf'}"))
    rows: list[dict[str, Any]] = [
        {
            "step": step, "loss": 3.0 / step, "lr": 1e-3, "grad_norm": 1.0 / step,
            "target_tokens": 9,
            "tokens_per_s": 100.5, "step_s": 0.1, "peak_memory_mib": 500.0,
        }
        for step in range(1, 9)
    ]  # fmt: skip
    rows.insert(4, {"step": 4, "eval_loss": 2.5, "eval_tokens": 50})
    process = {
        "first_step": 0, "total_steps": 8, "started": "2024-01-01", "command": "qlora finetune",
        "directory": str(path), "threads": 1, "skipped_rows": ["rows.jsonl: 1 row skipped"],
    }  # fmt: skip
    sample = {
        "step": 4,
        "row": 0,
        "prompt": "two hats",
        "reference": "2",
        "answer": "3",
        "right": False,
    }
    for name, lines in (
        ("metrics.jsonl", rows),
        ("environment.jsonl", [process, process | {"first_step": 4}]),
        ("samples.jsonl", [sample, sample | {"step": 8, "answer": "2", "right": True}]),
    ):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
