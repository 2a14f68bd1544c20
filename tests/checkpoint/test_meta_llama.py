"""Meta's layout in: a model written by an independent conversion loads to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import (
    Checkpoints,
    assert_same_bits,
    assert_same_files,
    edit_json,
    edit_tensors,
    logits,
    refused,
)
from torch import Tensor

from qlora_builders.checkpoint import load_checkpoint, read_arch, save_checkpoint
from qlora_builders.checkpoint.formats.meta import _with_positions
from qlora_builders.models import LLAMA_ARCHS, RopeScaling

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 2
PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "vocab_size": -1,  # as in Llama 2
    "multiple_of": 32,
    "norm_eps": 1e-05,
}


# Hugging Face's name -> Meta's
TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Element c of pair j is row j + c * d / 2 of a head in Hugging Face's order."""
    return torch.stack(
        [
            weight[head * HEAD_DIM + component * HEAD_DIM // 2 + pair]
            for head in range(heads)
            for pair in range(HEAD_DIM // 2)
            for component in range(2)
        ]
    )


def to_meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in TOP.items()} | {
        f"model.layers.{layer}.{theirs}.weight": f"layers.{layer}.{ours}.weight"
        for layer in range(LAYERS)
        for theirs, ours in LAYER.items()
    }
    out = {ours: tensors[theirs] for theirs, ours in names.items()}
    for name in out:
        heads = {"wq": HEADS, "wk": KV_HEADS}.get(name.split(".")[-2])
        if heads:
            out[name] = interleaved(out[name], heads)
    return out | {"rope.freqs": torch.ones(HEAD_DIM // 2)}


def write_meta(path: Path, tensors: dict[str, Tensor], shards: int, embedding_axis: int) -> None:
    axes = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
    axes["tok_embeddings"] = embedding_axis
    path.mkdir()
    for shard in range(shards):
        part = {}
        for name, tensor in tensors.items():
            axis = axes.get(name.removesuffix(".weight").rpartition(".")[2])
            piece = tensor if axis is None else tensor.chunk(shards, axis)[shard]
            part[name] = piece.clone()
        torch.save(part, path / f"consolidated.{shard:02d}.pth")
    (path / "params.json").write_text(json.dumps(PARAMS))


@pytest.fixture
def hf(own_copy: Checkpoints) -> Path:
    """With an even vocabulary, so that Llama 3's split by rows works."""
    path = own_copy("gqa", torch.bfloat16)
    edit_json(path / "config.json", {"vocab_size": 60, "max_position_embeddings": 4096})
    model = load_file(path / "model.safetensors")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rows = {name: model[name][:60].contiguous() for name in names}
    return edit_tensors(path / "model.safetensors", rows)


@pytest.fixture
def meta(hf: Path, tmp_path: Path) -> Path:
    write_meta(tmp_path / "meta", to_meta(load_file(hf / "model.safetensors")), 2, 0)
    return tmp_path / "meta"


@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("kind", ["linear", "frozen_nf4"])
def test_meta_equals_hugging_face(
    hf: Path, tmp_path: Path, shards: int, embedding_axis: int, kind: str
) -> None:
    tensors = to_meta(load_file(hf / "model.safetensors"))
    write_meta(tmp_path / "meta", tensors, shards, embedding_axis)
    plan = [{"match": "layers.**", "kind": kind}]
    expected, ours = load_checkpoint(hf, plan), load_checkpoint(tmp_path / "meta", plan)
    assert ours.spec.arch == expected.spec.arch
    assert_same_bits(ours, expected, quantized=14 if kind == "frozen_nf4" else 0)
    assert torch.equal(logits(ours), logits(expected))


def test_meta_to_hugging_face_directory(hf: Path, meta: Path, tmp_path: Path) -> None:
    (meta / "tokenizer.model").write_text("x")
    save_checkpoint(load_checkpoint(meta), tmp_path / "out", companions=meta)
    assert_same_files(hf / "model.safetensors", tmp_path / "out/model.safetensors")
    assert (tmp_path / "out/tokenizer.model").exists()


@pytest.mark.parametrize("name", sorted(LLAMA_ARCHS))
def test_published_sizes_get_their_positions(name: str) -> None:
    """params.json names neither positions nor scaling factor; both come from the row."""
    row = LLAMA_ARCHS[name]
    bare = replace(row, max_position_embeddings=1, rope_scaling=None, tie_word_embeddings=False)
    found = _with_positions(bare, scaled=row.rope_scaling is not None)
    assert found == row


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (4096, None)),
        ({"rope_theta": 500000.0}, (8192, None)),
        (
            {"rope_theta": 500000.0, "use_scaled_rope": True},
            (131_072, RopeScaling(rope_type="llama3", factor=8.0)),
        ),
    ],
)
def test_other_sizes(meta: Path, change: dict[str, Any], expected: tuple) -> None:
    arch = read_arch(edit_json(meta / "params.json", change))
    assert (arch.max_position_embeddings, arch.rope_scaling) == expected
    assert arch.rope_theta == change.get("rope_theta", 10_000.0)
    assert (arch.vocab_size, arch.intermediate_size, arch.head_dim) == (60, 96, 16)


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None}, "missing keys: dim"),
        ({"n_heads": 0}, "params.json: n_heads is 0; expected an integer >= 1 and <= 16,384"),
        ({"n_heads": 3}, "dim is 64 and n_heads 3; without head_dim"),
        ({"n_kv_heads": 3}, "n_heads is 4 and n_kv_heads 3; the first must be a multiple"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even one"),
        ({"norm_eps": 10**400}, "norm_eps is 1000"),
        ({"use_scaled_rope": "no"}, "use_scaled_rope is 'no'; expected true or false, or null"),
        ({"model": [2]}, r"params.json: model is \[2\]; expected an object"),
        ({"n_layers": "2"}, "n_layers is '2'; expected an integer >= 1"),
        ({"n_heads": 8}, "k_proj.weight has shape .*; the model needs"),
        ({"n_layers": 10**9}, "n_layers is 1000000000; expected an integer >= 1 and <= 1,024"),
        ({"n_layers": 1000}, "1000 layers are announced, but there are 21 tensors"),
        ({"rope_theta": -1}, "rope_theta is -1; expected a number > 0"),
        ({"norm_eps": "x"}, "norm_eps is 'x'; expected a number > 0"),
        ({"n_kv_heads": 1}, "1 key-value heads in 2 files; take the release with fewer files"),
        ({"moe": {"num_experts": 8}}, "mixture-of-experts and quantized models are not supported"),
    ],
)
def test_bad_params(meta: Path, change: dict[str, Any], message: str) -> None:
    edit_json(meta / "params.json", change)
    refused(message, load_checkpoint, meta)


def test_bad_files(meta: Path) -> None:
    second = meta / "consolidated.01.pth"
    part = torch.load(second)
    torch.save({k: v for k, v in part.items() if "w2" not in k}, second)
    refused(r"layers\.0\.feed_forward\.w2\.weight has shapes", load_checkpoint, meta)
    torch.save(part | {"extra.weight": torch.ones(2)}, second)
    refused("lacks tensors of others: extra", load_checkpoint, meta)
    for wrong in ([1, 2], {3: torch.ones(2)}):
        torch.save(wrong, second)
        refused("expected a dictionary of tensors by name", load_checkpoint, meta)
    second.write_bytes(b"no pickle at all")
    refused(r"consolidated\.01\.pth: not a checkpoint of Meta", load_checkpoint, meta)
    second.unlink()
    (meta / "consolidated.00.pth").rename(meta / "consolidated.03.pth")
    refused(r"expected consolidated\.00\.pth.*found .*03\.pth", load_checkpoint, meta)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "layers.0.attention.wq.weight",
            r"00\.pth: layers\.0\.attention\.wq\.weight has shape \[\]",
        ),
        (
            "tok_embeddings.weight",
            r"00\.pth: tok_embeddings\.weight has shape \[\]; expected a matrix",
        ),
        ("output.weight", r"00\.pth: no matrix output\.weight"),
    ],
)
def test_what_is_no_matrix(meta: Path, name: str, message: str) -> None:
    for file in meta.glob("*.pth"):
        torch.save(torch.load(file) | {name: torch.tensor(1.0)}, file)
    refused(message, load_checkpoint, meta)


def test_code_in_a_pickle_is_not_run(meta: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"tok_embeddings.weight": Trap()}, meta / "consolidated.00.pth")
    refused(r"consolidated\.00\.pth: not a checkpoint of Meta", load_checkpoint, meta)
    assert not (tmp_path / "sprung").exists()
