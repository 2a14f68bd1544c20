"""What `test_malformed.py` reads: small sound checkpoints, adapters and rows, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import load_file, save_file

from qlora_builders import llama, load_checkpoint, save_adapter, save_checkpoint
from qlora_builders.config.shipped import demo_path
from qlora_builders.models import LlamaArch

BASE = Path(demo_path("base"))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TINY: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
LAYER = "model.layers.0"
NORM, Q_PROJ = "model.norm.weight", f"{LAYER}.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTED = f"base_model.model.{LAYER}.self_attn.q_proj"
PLAN = [{"match": "layers.*.self_attn.q_proj", "kind": "qlora", "rank": 2, "alpha": 4}]
Edit = Callable[[Path], object]


# ---- rows ---------------------------------------------------------------------------------------

ROW = {"prompt": "two red dresses", "completion": "- quantity: 2"}
GOOD = json.dumps(ROW)
ASKED_ELSE = {"role": "user", "content": "what else?"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def chat(*messages: Any) -> str:
    return json.dumps({"messages": messages})


def pair(**columns: Any) -> str:
    return json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"} | columns)


# name -> the lines of a .jsonl file, of which the last one is at fault
LINES: dict[str, tuple[str | bytes, ...]] = {
    "good": (GOOD,),
    "blank": ("", "  ", ""),
    "utf8": (GOOD, b'{"prompt": "\xff", "completion": "a"}'),
    "utf16": (GOOD.encode("utf-16"),),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00",),
    "broken": (GOOD, GOOD, '{"prompt": "a", "completion": '),
    "twice": (GOOD, '{"prompt": "a", "prompt": "b", "completion": "c"}'),
    "nan": ('{"prompt": "a", "completion": "c", "score": NaN}',),
    "deep": ("[" * 100_000,),
    "half": (GOOD, '{"prompt": "\\ud800", "completion": "a"}'),
    "list": (GOOD, '["a", "b"]'),
    "array": (f"[{GOOD}]",),
    "question": (GOOD, '{"question": "a", "answer": "b"}'),
    "alpaca": (GOOD, '{"instruction": "a", "input": "b", "output": "c"}'),
    "developer": (chat(*TURNS), chat({"role": "developer", "content": "s"}, *TURNS)),
    "two_systems": (
        json.dumps({"system": "a", "messages": TURNS}),
        json.dumps({"system": "a", "messages": [{"role": "system", "content": "b"}, *TURNS]}),
    ),
    "human": (chat(*TURNS), chat({"from": "human"}, TURNS[1])),
    "number": (GOOD, '{"prompt": 7, "completion": "a"}'),
    "null": (GOOD, '{"prompt": "a", "completion": null}'),
    "column": (GOOD, '{"promt": "a", "completion": "b"}'),
    "unanswered": (GOOD, '{"prompt": "a", "completion": "  "}'),
    "long": (json.dumps(ROW | {"completion": "word " * 200}),),
    "megabytes": (GOOD, '{"prompt": "' + "a" * 10_000_000),
    "megabyte_key": (GOOD, json.dumps({"k" * 10_000_000: 1})),
    "escape": (GOOD, json.dumps({"\x1b[2J": 1})),
    "no_messages": (chat(*TURNS), '{"text": "a"}'),
    "empty_chat": (chat(*TURNS), chat()),
    "role": (chat(*TURNS), chat(TURNS[0], {"role": "asistant", "content": "a"})),
    "no_content": (chat(*TURNS), chat({"role": "user"}, TURNS[1])),
    "no_role": (chat(*TURNS), chat({"text": "q"})),
    "picture": (chat(*TURNS), chat({"role": "user", "content": [{"image": "x"}]}, TURNS[1])),
    "questions": (chat(*TURNS), chat(TURNS[0])),
    "unasked": (chat(*TURNS), chat(TURNS[1])),
    "instructed": (chat(*TURNS), chat({"role": "system", "content": "s"})),
    "answer": ('{"prompt": "a"}', '{"prompt": "a", "completion": 7}'),
    "long_prompt": (GOOD, json.dumps({"prompt": "word " * 99})),
    "silent": (chat(*TURNS), chat(TURNS[0], {"role": "assistant", "content": ""})),
    "masked": ('{"text": "<|end_of_text|>"}',),
    "same": (pair(rejected="yes"), pair(rejected="yes")),
    "rejected": (pair(), '{"prompt": "q", "chosen": "yes"}'),
    "differ": (pair(), pair(prompt=None, chosen=TURNS, rejected=[ASKED_ELSE, TURNS[1]])),
}
JSON_FILES = {
    "rows": "{}",
    "trailing": f"{GOOD}\n{GOOD}",
    "values": f"[{GOOD}, 3]",
    "cut": f"[{GOOD}, ",
}


def write_rows(folder: Path) -> None:
    for name, lines in LINES.items():
        text = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(text))
    for name, content in JSON_FILES.items():
        (folder / f"{name}.json").write_text(content)
    (folder / "empty.jsonl").touch()
    (folder / "eval.jsonl").write_text(f"{GOOD}\n" * 20)
    (folder / "rows.csv").write_text("prompt,completion\na,b\n")
    (folder / "no.parquet").write_text("PAR1 but no more")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "long.txt").write_text("hi\n\n" + "word " * 99)
    (folder / "taken.json").touch()
    (folder / "stopped.jsonl.partial").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")


def write_parquet(folder: Path) -> None:
    table = pyarrow.table({"prompt": ["a"] * 9, "completion": ["b"] * 9})
    pyarrow.parquet.write_table(table, folder / "cut.parquet")
    cut("cut.parquet", -20)(folder)
    pyarrow.parquet.write_table(table.select(["completion"]), folder / "other.parquet")


# ---- checkpoints --------------------------------------------------------------------------------


def edit_json(file: str, **changes: Any) -> Edit:
    """`key=None` removes it."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return edit


def write(file: str, content: str | bytes) -> Edit:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def remove(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def cut(file: str, size: int) -> Edit:
    """Its first `size` bytes, or all but the last `-size`."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file(content, folder / file)

    return edit


def put(name: str, value: float, at: int = 5) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content[name].view(-1)[at].fill_(value)


def shape(name: str, *size: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content.update({name: torch.zeros(size, dtype=content[name].dtype)})


def index(weight_map: dict[str, Any]) -> Edit:
    return write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


WEIGHTS, CONFIG = "model.safetensors", "config.json"
# name -> what is done to a copy of the sound checkpoint
CHECKPOINTS: dict[str, Edit] = {
    "no_config": remove(CONFIG),
    "cut_config": cut(CONFIG, 40),
    "twice_config": write(CONFIG, '{"vocab_size": 1, "vocab_size": 2}'),
    "latin_config": write(CONFIG, b'{"a": "\xe9"}'),
    "list_config": write(CONFIG, "[]"),
    "gemma": edit_json(CONFIG, model_type="gemma"),
    "no_layers": edit_json(CONFIG, num_hidden_layers=None),
    "many_layers": edit_json(CONFIG, num_hidden_layers=1000),
    "negative": edit_json(CONFIG, hidden_size=-32),
    "heads": edit_json(CONFIG, num_key_value_heads=3),
    "text_size": edit_json(CONFIG, vocab_size="many"),
    "relu2": edit_json(CONFIG, hidden_act="relu2"),
    "proportional": edit_json(CONFIG, rope_scaling={"rope_type": "proportional"}),
    "no_factor": edit_json(CONFIG, rope_scaling={"rope_type": "linear"}),
    "gptq": edit_json(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
    "other_size": edit_json(CONFIG, intermediate_size=64),
    "other_vocab": edit_json(CONFIG, vocab_size=1000),
    "no_weights": remove(WEIGHTS),
    "cut_weights": cut(WEIGHTS, -100),
    "no_header": cut(WEIGHTS, 5),
    "html": write(WEIGHTS, "<html>404 not found</html>" * 9),
    "nan_norm": tensors(WEIGHTS, put(NORM, float("nan"))),
    "inf_embedding": tensors(WEIGHTS, put(EMBEDDING, float("inf"))),
    "nan_q": tensors(WEIGHTS, put(Q_PROJ, float("nan"))),
    "integers": tensors(WEIGHTS, lambda t: t.update({NORM: t[NORM].to(torch.int32)})),
    "vocab": tensors(WEIGHTS, shape(EMBEDDING, 1000, 32)),
    "small_vocab": lambda folder: [
        edit(folder)
        for edit in (
            edit_json(CONFIG, vocab_size=100),
            tensors(WEIGHTS, shape(EMBEDDING, 100, 32)),
            tensors(WEIGHTS, shape(HEAD, 100, 32)),
        )
    ],
    "shapes": tensors(WEIGHTS, shape(f"{LAYER}.mlp.down_proj.weight", 48, 32)),
    "missing": tensors(WEIGHTS, lambda t: t.pop(NORM)),
    "extra": tensors(WEIGHTS, lambda t: t.update({"model.bias": torch.zeros(2)})),
    "headless": tensors(WEIGHTS, lambda t: t.pop(HEAD)),
    "tied": edit_json(CONFIG, tie_word_embeddings=True),  # but the head is another
    "missing_shard": index({NORM: "model-00002-of-00002.safetensors"}),
    "absent_tensor": index({"model.absent.weight": WEIGHTS}),
    "no_map": index({}),
    "cut_index": write("model.safetensors.index.json", '{"weight_map": '),
    "no_tokenizer": remove("tokenizer.json"),
    "no_bos": edit_json("tokenizer.json", post_processor=None),
    "cut_tokenizer": cut("tokenizer.json", 1000),
    "stray_token": edit_json(
        "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    "empty_vocabulary": write(
        "tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'
    ),
    "stranger_eos": edit_json("tokenizer_config.json", eos_token="</s>"),
    "twice_tokens": write("tokenizer_config.json", '{"a": 1, "a": 2}'),
    "deep_tokens": write("tokenizer_config.json", "[" * 100_000),
    "untyped_template": edit_json("tokenizer_config.json", chat_template=3),
    "named_templates": edit_json("tokenizer_config.json", chat_template=[3, {"name": "rag"}]),
    "open_template": edit_json("tokenizer_config.json", chat_template="{% for m in messages %}"),
    "latin_template": write("chat_template.jinja", b"caf\xe9"),
    "no_template": edit_json("tokenizer_config.json", chat_template=None),
}


def write_checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    for name, dtype in (("tiny", torch.bfloat16), ("other", torch.bfloat16)):
        model = llama(LlamaArch(**TINY), [], dtype=dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        save_checkpoint(model, folder / name)
        for file in TOKENIZER_FILES:
            shutil.copy(BASE / file, folder / name)
    for name, edit in CHECKPOINTS.items():
        edit(Path(shutil.copytree(folder / "tiny", folder / name)))
    (folder / "nothing").mkdir()
    (folder / "file").write_text("")
    nf4 = load_checkpoint(folder / "tiny", [{"match": "layers.**", "kind": "frozen_nf4"}])
    save_checkpoint(nf4, folder / "nf4", format="nf4", companions=folder / "tiny")
    damaged = Path(shutil.copytree(folder / "nf4", folder / "damaged_nf4"))
    tensors("nf4.safetensors", lambda t: t[f"{Q_PROJ}.codes"][3:4].bitwise_xor_(1))(damaged)


# ---- adapters -----------------------------------------------------------------------------------

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = f"{ADAPTED}.lora_A.weight", f"{ADAPTED}.lora_B.weight"
# name -> what is done to a copy of the sound adapter
ADAPTERS: dict[str, Edit] = {
    "a_no_config": remove(ADAPTER_CONFIG),
    "a_cut_config": cut(ADAPTER_CONFIG, 50),
    "a_ia3": edit_json(ADAPTER_CONFIG, peft_type="IA3"),
    "a_no_rank": edit_json(ADAPTER_CONFIG, r=None),
    "a_rank": edit_json(ADAPTER_CONFIG, r=8),
    "a_alpha": edit_json(ADAPTER_CONFIG, lora_alpha="16"),
    "a_bias": edit_json(ADAPTER_CONFIG, bias="all"),
    "a_regex": edit_json(ADAPTER_CONFIG, target_modules="(q_proj"),
    "a_targets": edit_json(ADAPTER_CONFIG, target_modules=["q_proj", "w_proj"]),
    "a_lacks": edit_json(ADAPTER_CONFIG, target_modules=["q_proj"], modules_to_save=["norm"]),
    "a_tokens": edit_json(ADAPTER_CONFIG, trainable_token_indices=[1, 1]),
    "a_no_weights": remove(ADAPTER),
    "a_cut_weights": cut(ADAPTER, -10),
    "a_nan": tensors(ADAPTER, put(B, float("nan"))),
    "a_half": tensors(ADAPTER, lambda t: t.pop(A)),
    "a_shape": tensors(ADAPTER, shape(A, 2, 31)),
    "a_extra": tensors(ADAPTER, lambda t: t.update({f"{ADAPTED}.scale": torch.zeros(1)})),
    "a_prefix": tensors(ADAPTER, lambda t: t.update({"model.w": torch.zeros(1)})),
    "a_record": edit_json("qlora_base.json", components=3),
    "a_dtype": edit_json("qlora_base.json", dtype="int8"),
    "a_plan": edit_json("qlora_base.json", components=[PLAN[0] | {"rank": 4}]),
}


def write_adapters(folder: Path) -> None:
    model = load_checkpoint(folder / "tiny", PLAN)
    torch.nn.init.normal_(model.get_submodule(f"{LAYER}.self_attn.q_proj").lora_B.weight)
    save_adapter(model, folder / "adapter", base_model=str(folder / "tiny"))
    for name, edit in ADAPTERS.items():
        edit(Path(shutil.copytree(folder / "adapter", folder / name)))


# ---- configs ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sparse": "component: torch.optim.SparseAdam\n",
    "lbfgs": "component: torch.optim.LBFGS\n",
    "schedule": "component: torch.optim.lr_scheduler.StepLR\nstep_size: 1\n",
    "no_optimizer": "component: torch.nn.ParameterList\n",
}
RULE_FILES = {
    "bare_rules.yaml": "- {match: layers.9.mlp.up_proj, kind: linear}\n",
    "qlora_rules.yaml": "components: [{match: lm_head, kind: qlora, rank: 2, alpha: 4}]\n",
}


def write_configs(folder: Path) -> None:
    (folder / "configs" / "optimizer").mkdir(parents=True)
    (folder / "configs" / "experiment").mkdir()
    twice = "# @package _global_\ntraining:\n  seed: 1\n  seed: 2\n"
    (folder / "configs" / "experiment" / "twice.yaml").write_text(twice)
    for name, text in OPTIMIZERS.items():
        (folder / "configs" / "optimizer" / f"{name}.yaml").write_text(text)
    for name, text in RULE_FILES.items():
        (folder / name).write_text(text)


def write_files(folder: Path) -> None:
    write_rows(folder)
    write_checkpoints(folder)
    write_adapters(folder)
    write_configs(folder)
    write_parquet(folder)
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for step in (3, 20):
        (folder / "stopped" / "checkpoints" / f"step_{step}").mkdir(parents=True)
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "plan.json").write_text("{}")
