"""Meta's layout in: a model written by an independent conversion loads to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_builders.checkpoint import load_checkpoint, read_arch, save_checkpoint
from qlora_builders.checkpoint.formats.meta import _with_positions
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LLAMA_ARCHS, RopeScaling
from qlora_builders.tensor import NF4Tensor

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


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Row by row: element c of pair j is row j + c * d / 2 of a head in Hugging Face's order."""
    rows = []
    for head in range(heads):
        for pair in range(HEAD_DIM // 2):
            for component in range(2):
                rows.append(weight[head * HEAD_DIM + component * HEAD_DIM // 2 + pair])
    return torch.stack(rows)


def to_meta(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
        "rope.freqs": torch.ones(HEAD_DIM // 2),
    }
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        attention = f"{theirs}.self_attn"
        out |= {
            f"{ours}.attention.wq.weight": interleaved(
                tensors[f"{attention}.q_proj.weight"], HEADS
            ),
            f"{ours}.attention.wk.weight": interleaved(
                tensors[f"{attention}.k_proj.weight"], KV_HEADS
            ),
            f"{ours}.attention.wv.weight": tensors[f"{attention}.v_proj.weight"],
            f"{ours}.attention.wo.weight": tensors[f"{attention}.o_proj.weight"],
            f"{ours}.feed_forward.w1.weight": tensors[f"{theirs}.mlp.gate_proj.weight"],
            f"{ours}.feed_forward.w2.weight": tensors[f"{theirs}.mlp.down_proj.weight"],
            f"{ours}.feed_forward.w3.weight": tensors[f"{theirs}.mlp.up_proj.weight"],
            f"{ours}.attention_norm.weight": tensors[f"{theirs}.input_layernorm.weight"],
            f"{ours}.ffn_norm.weight": tensors[f"{theirs}.post_attention_layernorm.weight"],
        }
    return out


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
def hf(own_copy: Callable[..., Path]) -> Path:
    """With an even vocabulary, so that Llama 3's split by rows works."""
    path = own_copy("gqa", torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    config["vocab_size"] = 60
    config["max_position_embeddings"] = 4096
    (path / "config.json").write_text(json.dumps(config))
    model = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model[name] = model[name][:60].contiguous()
    save_file(model, path / "model.safetensors")
    return path


@pytest.fixture
def meta(hf: Path, tmp_path: Path) -> Path:
    write_meta(tmp_path / "meta", to_meta(load_file(hf / "model.safetensors")), 2, 0)
    return tmp_path / "meta"


@pytest.mark.parametrize(("shards", "embedding_axis"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("kind", ["linear", "frozen_nf4"])
def test_meta_equals_hugging_face(
    hf: Path,
    logits: Callable[[nn.Module], Tensor],
    tmp_path: Path,
    shards: int,
    embedding_axis: int,
    kind: str,
) -> None:
    tensors = to_meta(load_file(hf / "model.safetensors"))
    write_meta(tmp_path / "meta", tensors, shards, embedding_axis)
    plan = [{"match": "layers.**", "kind": kind}]
    expected, ours = load_checkpoint(hf, plan), load_checkpoint(tmp_path / "meta", plan)
    assert ours.spec.arch == expected.spec.arch
    parameters = dict(expected.named_parameters())
    for name, parameter in ours.named_parameters():
        other = parameters.pop(name)
        if isinstance(parameter, NF4Tensor):
            for field in NF4Tensor.tensor_fields:
                assert torch.equal(getattr(parameter, field), getattr(other, field)), name
        else:
            assert torch.equal(parameter, other), name
    assert not parameters
    assert torch.equal(logits(ours), logits(expected))


def test_meta_to_hugging_face_directory(hf: Path, meta: Path, tmp_path: Path) -> None:
    (meta / "tokenizer.model").write_text("x")
    save_checkpoint(load_checkpoint(meta), tmp_path / "out", companions=meta)
    before, after = (load_file(p / "model.safetensors") for p in (hf, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
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
    (meta / "params.json").write_text(json.dumps(PARAMS | change))
    arch = read_arch(meta)
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
    params = {k: v for k, v in (PARAMS | change).items() if v is not None}
    (meta / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(meta)


def test_bad_files(meta: Path) -> None:
    second = meta / "consolidated.01.pth"
    part = torch.load(second)
    torch.save({k: v for k, v in part.items() if "w2" not in k}, second)
    with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward\.w2\.weight has shapes"):
        load_checkpoint(meta)
    torch.save(part | {"extra.weight": torch.ones(2)}, second)
    with pytest.raises(CheckpointError, match="lacks tensors of others: extra"):
        load_checkpoint(meta)
    for wrong in ([1, 2], {3: torch.ones(2)}):
        torch.save(wrong, second)
        with pytest.raises(CheckpointError, match="expected a dictionary of tensors by name"):
            load_checkpoint(meta)
    second.write_bytes(b"no pickle at all")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: not a checkpoint of Meta"):
        load_checkpoint(meta)
    second.unlink()
    (meta / "consolidated.00.pth").rename(meta / "consolidated.03.pth")
    with pytest.raises(CheckpointError, match=r"expected consolidated\.00\.pth.*found .*03\.pth"):
        load_checkpoint(meta)


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
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(meta)


def test_code_in_a_pickle_is_not_run(meta: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"tok_embeddings.weight": Trap()}, meta / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: not a checkpoint of Meta"):
        load_checkpoint(meta)
    assert not (tmp_path / "sprung").exists()
