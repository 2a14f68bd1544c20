"""qlora_base.json: the base that an adapter belongs to is recorded, and another one refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import (
    FROZEN,
    Checkpoints,
    checkpoints,
    edit_json,
    edit_tensors,
    logits,
    randomize_adapters,
    refused,
)
from torch import Tensor, nn

from qlora_builders.checkpoint import (
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    read_tensors,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.checkpoint.base_record import ContentHash, hash_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.models import llama
from qlora_builders.modules import CausalLM

PLAN = [
    FROZEN,
    {"match": "layers.0.mlp.up_proj", "kind": "qlora", "rank": 4, "alpha": 8, "block_size": 32},
]
OTHER = "this is not the base that the adapter was trained on"
WAIVER = r"adapter\.allow_base_mismatch=true \(allow_base_mismatch=True in Python\)"


def build(plan: list = PLAN, dtype: torch.dtype = torch.float32) -> CausalLM:
    return load_checkpoint(checkpoints(), plan, dtype=dtype)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = build()
    randomize_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- the hash -----------------------------------------------------------------------------------


def content_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    content = ContentHash()
    for name, tensor in tensors:
        content.add(name, tensor)
    return content.hexdigest()


def stored_hash(path: Path, *, tied: bool = False) -> str:
    return hash_tensors(read_tensors(path).values(), tied=tied)


def tensors() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(f"w{i}", torch.randn(100, 50, generator=generator).bfloat16()) for i in range(4)]


def test_the_hash_depends_on_content_alone() -> None:
    expected = content_hash(tensors())
    assert content_hash(reversed(tensors())) == expected
    assert content_hash((name, t.t().contiguous().t()) for name, t in tensors()) == expected
    assert len(expected) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda name, t: (name + "x", t),
        lambda name, t: (name, t.reshape(50, 100)),
        lambda name, t: (name, t.view(torch.float16)),
        lambda name, t: (name, torch.cat([t[:1] + 1, t[1:]])),  # the first bytes
        lambda name, t: (name, torch.cat([t[:-1], t[-1:] + 1])),  # the last
        lambda name, t: (name, t * 1.01),  # what fine-tuning does to a weight
    ],
)
def test_one_changed_tensor_changes_the_hash(change: Callable) -> None:
    changed = [change(*t) if t[0] == "w2" else t for t in tensors()]
    assert content_hash(changed) != content_hash(tensors())


@pytest.mark.parametrize(
    ("shape", "index", "is_seen"),
    [
        ((1024,), 0, True),
        ((1024,), 500, True),
        ((1024,), 1023, True),
        ((100, 1000), 50_250, False),  # between the sampled bytes, as the docstring says
    ],
)
def test_what_the_hash_sees(shape: tuple, index: int, is_seen: bool) -> None:
    weight = torch.zeros(shape)
    changed = weight.clone()
    changed.view(-1)[index] += 1
    assert (content_hash([("w", changed)]) != content_hash([("w", weight)])) == is_seen


def test_the_sample_needs_no_whole_tensor() -> None:
    for tensor in read_tensors(checkpoints()).values():
        content = ContentHash()
        content.add_unread(tensor)
        assert content.hexdigest() == content_hash([(tensor.name, tensor.load())])


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_single_and_sharded_files_are_the_same_base(variant: str) -> None:
    tied = variant == "tied"
    single, sharded = checkpoints(variant), checkpoints(variant, sharded=True)
    assert stored_hash(single, tied=tied) == stored_hash(sharded, tied=tied)
    half = checkpoints(variant, dtype=torch.bfloat16)
    assert stored_hash(single, tied=tied) != stored_hash(half, tied=tied)


def test_a_stored_copy_of_a_tied_head_does_not_count(own_copy: Checkpoints) -> None:
    path = own_copy("tied")
    file = path / "model.safetensors"
    before = stored_hash(path, tied=True)
    edit_tensors(file, {"lm_head.weight": load_file(file)["model.embed_tokens.weight"].clone()})
    assert stored_hash(path, tied=True) == before
    assert load_checkpoint(path).spec.base.content_hash == before


def test_a_quantized_copy_is_another_content(tmp_path: Path) -> None:
    """But the same NF4 weights in our layout and in bitsandbytes' are the same."""
    rule = FROZEN | {"scale_format": "bnb"}
    hashes = [stored_hash(checkpoints())]
    quantized = load_checkpoint(checkpoints(), [rule])
    for format in ("nf4", "bnb-4bit"):
        save_checkpoint(quantized, tmp_path / format, format=format)
        loaded = load_checkpoint(tmp_path / format, [rule])
        assert loaded.spec.base.format == format
        hashes.append(stored_hash(tmp_path / format))
        assert loaded.spec.base.content_hash == hashes[-1]
    assert hashes[0] != hashes[1] == hashes[2]


# ---- the record ---------------------------------------------------------------------------------


def test_record(adapter: Path) -> None:
    record = json.loads((adapter / "qlora_base.json").read_text())
    assert record["checkpoint"] == {"format": "hf", "content_hash": stored_hash(checkpoints())}
    assert record["dtype"] == "float32"
    assert (record["components"], record["train"]) == (PLAN, [])
    default, fine = sorted(record["nf4"], key=lambda group: -group["block_size"])
    options = {"scale_block_size": 256, "scale_format": "geometric", "scale_search": False}
    assert fine == {"block_size": 32, **options, "slots": ["model.layers.0.mlp.up_proj"]}
    assert {**default, "slots": None} == {"block_size": 64, **options, "slots": None}
    assert len(default["slots"]) == 13
    info = read_adapter(adapter)
    assert info.base is not None
    assert info.base.nf4["model.layers.0.mlp.up_proj"]["block_size"] == 32


def test_saving_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr("qlora_builders.checkpoint.base_record.ContentHash", None)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:  # nothing is there to be read
            owner, _, leaf = name.rpartition(".")
            meta = nn.Parameter(parameter.to("meta"), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, meta)
    save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32, bfloat16, float16"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\]; allowed"),
        ({"components": None}, "not a record of a base: no key 'components'"),
        ({"components": {}}, "not a record of a base: {} is not a list"),
        ({"components": [3]}, "not a record of a base: rule 3 is not a mapping"),
        ({"components": [{"match": "x", "kind": "qlroa"}]}, "unknown kind 'qlroa'; did you mean"),
        ({"train": [1]}, r"not a record of a base: \[1\] is not a list of str"),
        ({"nf4": "x"}, "not a record of a base: 'x' is not a list of dict"),
        ({"nf4": [{}]}, "not a record of a base: no key 'slots'"),
        ({"config": 3}, "not a record of a base: 3 is not a mapping"),
        ({"checkpoint": "x"}, "not a record of a base: "),
        ({"checkpoint": {"format": "hf"}}, "not a record of a base: .*content_hash"),
    ],
)
def test_a_record_that_cannot_be_understood(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    file = adapter / "qlora_base.json"
    edit_json(file, changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(adapter)
    assert str(file) in str(caught.value)


def test_a_plan_that_is_not_that_of_the_weights(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out before the base is loaded, or a rank from a damaged file allocated."""
    edit_json(adapter / "qlora_base.json", {"components": [PLAN[0], PLAN[1] | {"rank": 10**12}]})
    monkeypatch.setattr("qlora_builders.checkpoint.load.load_checkpoint", None)
    message = (
        r"plans other adapters, ranks or use_dora than .* holds: model\.layers\.0\.mlp\.up_proj$"
    )
    refused(message, load_with_adapter, checkpoints(), adapter)


# ---- another base -------------------------------------------------------------------------------


def test_other_weights(adapter: Path, own_copy: Checkpoints) -> None:
    """A fine-tuned sibling: every name and shape fits."""
    path = own_copy()
    file = path / "model.safetensors"
    edit_tensors(file, {name: tensor * 1.01 for name, tensor in load_file(file).items()})
    refused(rf"{OTHER} \(checkpoint: .*\).*{WAIVER}", load_with_adapter, path, adapter)
    waived = load_with_adapter(path, adapter, allow_base_mismatch=True)
    assert torch.isfinite(logits(waived)).all()


def test_other_quantization(adapter: Path) -> None:
    plan = [PLAN[0], {**PLAN[1], "block_size": 64}]
    message = rf"{OTHER} \(quantization: .*differs: model\.layers\.0\.mlp\.up_proj\)"
    refused(message, load_adapter, build(plan), adapter)
    load_adapter(build(plan), adapter, allow_base_mismatch=True)
    plain = [{"match": "layers.0.mlp.up_proj", "kind": "lora", "rank": 4, "alpha": 8}]
    refused(r"quantization: .* and 6 more\)", load_adapter, build(plain), adapter)


def test_other_dtype(adapter: Path) -> None:
    message = rf"{OTHER} \(dtype: trained on torch\.float32, here torch\.bfloat16\)"
    refused(message, load_adapter, build(dtype=torch.bfloat16), adapter)


OLD = {"rope_parameters": None}  # the spelling before it
OF = "of config.json: trained with"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 5e5, **OLD}, f"rope_theta {OF} 10000.0, here 5"),
        ({"rope_parameters": {"rope_theta": 5e5}}, f"rope_theta {OF}"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, **OLD},
            f"rope_scaling.factor {OF} not set, here 2.0; "
            f"rope_scaling.rope_type {OF} default, here linear",
        ),
        ({"rms_norm_eps": 1e-3}, f"rms_norm_eps {OF} 1e-05"),
        ({"hidden_act": "relu"}, f"hidden_act {OF} silu, here re"),
        ({"attention_dropout": 0.5}, f"attention_dropout {OF} "),
        # another spelling is the same function
        ({"max_position_embeddings": 4096}, None),
        (
            {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}, "rope_theta": 1e4},
            None,
        ),
        ({"rope_theta": 10_000, "rope_scaling": {"type": "default"}, **OLD}, None),
        ({"use_cache": False, "initializer_range": 1.0, "torch_dtype": "float16"}, None),
    ],
)
def test_another_config_is_another_function(
    adapter: Path, own_copy: Checkpoints, changes: dict[str, Any], message: str | None
) -> None:
    path = edit_json(own_copy() / "config.json", changes)
    if message is not None:
        with pytest.raises(CheckpointError, match=OTHER) as caught:
            load_with_adapter(path, adapter)
        assert message in str(caught.value)
    load_with_adapter(path, adapter, allow_base_mismatch=message is not None)


def test_a_record_without_the_newer_keys_is_readable(adapter: Path, own_copy: Checkpoints) -> None:
    edit_json(adapter / "qlora_base.json", {"config": None, "nf4": None, "checkpoint": None})
    path = edit_json(own_copy() / "config.json", {"rope_theta": 5e5, **OLD})
    load_with_adapter(path, adapter)


def test_what_the_caller_names_is_not_compared(adapter: Path) -> None:
    load_with_adapter(checkpoints(), adapter, quantize="none", dtype=torch.bfloat16)
    refused(OTHER, load_with_adapter, checkpoints(dtype=torch.bfloat16), adapter, quantize="none")


def test_weights_from_no_checkpoint_are_not_compared(adapter: Path) -> None:
    """Built from an arch and filled by hand: only the caller knows what they are."""
    model = build()
    bare = llama(model.spec.arch, PLAN, dtype=torch.float32)
    assert bare.spec.base is None
    load_adapter(bare, adapter)
