"""Strictness: an adapter that does not fit, or cannot be understood, is never loaded in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_builders.checkpoint import (
    adapter_plan,
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    save_adapter,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM

PREFIX = "base_model.model."
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
UP_A, UP_B = f"{PREFIX}{UP}.lora_A.weight", f"{PREFIX}{UP}.lora_B.weight"
NORM = f"{PREFIX}model.norm.weight"
PLAN = [{"match": "layers.0.{mlp.up_proj,self_attn.q_proj}", "kind": "lora", "rank": 4, "alpha": 8}]


@pytest.fixture
def build(checkpoints: Callable[..., Path]) -> Callable[..., CausalLM]:
    def model(plan: list = PLAN, train: tuple = ("norm",)) -> CausalLM:
        return load_checkpoint(checkpoints(), plan, train=train, dtype=torch.float32)

    return model


@pytest.fixture
def adapter(build: Callable[..., CausalLM], tmp_path: Path) -> Path:
    save_adapter(build(), tmp_path / "adapter")
    return tmp_path / "adapter"


def set_config(path: Path, **changes: Any) -> None:
    """None removes a key."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def set_tensors(path: Path, changes: dict[str, Tensor | None]) -> None:
    """None removes a tensor."""
    file = path / "adapter_model.safetensors"
    tensors = load_file(file) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, file)


# ---- the directory by itself --------------------------------------------------------------------


def test_intact(build: Callable[..., CausalLM], adapter: Path) -> None:
    load_adapter(build(), adapter)  # what the tests below damage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters=.* is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* is not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.* is not supported"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config=.* is not supported"),
        ({"kasa_config": {"beta": 1}}, "kasa_config=.* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is not supported"),
        ({"r": None}, "r missing"),
        ({"lora_alpha": None}, "lora_alpha missing"),
        ({"r": 8}, f"{UP} has rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"up_proj": 2}}, f"{UP} has rank 4, but adapter_config.json says 2"),
    ],
)
def test_config(adapter: Path, changes: dict[str, Any], message: str) -> None:
    set_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(adapter)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_alone(adapter: Path, init: Any) -> None:
    set_config(adapter, init_lora_weights=init)
    assert set(read_adapter(adapter).modules) == {UP, Q}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.norm.scale": torch.ones(2)},
            "keys must begin with 'base_model.model.', .* model.no",
        ),
        ({UP_B: None}, f"{UP} needs lora_A .* got lora_A \\[4, 64\\] and lora_B none"),
        ({UP_A: torch.ones(3, 64)}, "got lora_A \\[3, 64\\] and lora_B \\[96, 4\\]"),
        ({UP_A: torch.ones(4)}, "got lora_A \\[4\\] and lora_B \\[96, 4\\]"),
        (
            {f"{PREFIX}{UP}.lora_magnitude_vector": torch.ones(96)},
            f"neither lora_A, lora_B nor in modules_to_save: {UP}.lora_magnitude_vector",
        ),
        ({f"{PREFIX}{UP}.weight": torch.ones(96, 64)}, f"modules_to_save: {UP}.weight"),
    ],
)
def test_tensors(adapter: Path, changes: dict[str, Tensor | None], message: str) -> None:
    set_tensors(adapter, changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "qlora_base.json"])
@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "holds list, expected")])
def test_unreadable_json(adapter: Path, name: str, text: str, message: str) -> None:
    (adapter / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        read_adapter(adapter)


def test_missing_files(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing; expected a PEFT adapter directory"):
        read_adapter(tmp_path / "nowhere")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter(adapter)


def test_recorded_plan_without_its_keys(adapter: Path) -> None:
    (adapter / "qlora_base.json").write_text('{"components": []}')
    with pytest.raises(
        CheckpointError, match=r"qlora_base\.json: needs lists components and train"
    ):
        adapter_plan(read_adapter(adapter))


# ---- against a model ----------------------------------------------------------------------------


def rule(match: str, **options: Any) -> dict[str, Any]:
    return {"match": match, "kind": "lora", "rank": 4, "alpha": 8} | options


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            [*PLAN, rule("layers.1.mlp.up_proj")],
            r"adapters of the model that are not in the file: model\.layers\.1\.mlp\.up_proj; "
            "in the file but not in the model: none",
        ),
        (
            [rule("layers.0.mlp.up_proj")],
            "not in the file: none; in the file but not in the model: "
            r"model\.layers\.0\.self_attn\.q_proj",
        ),
        (
            [*PLAN, rule("layers.0.mlp.up_proj", rank=2, alpha=4)],
            r"differ: .*up_proj \(file: rank 4, scaling 2; model: rank 2, scaling 2\)",
        ),
        (
            [*PLAN, rule("layers.0.mlp.up_proj", alpha=16)],
            r"\(file: rank 4, scaling 2; model: rank 4, scaling 4\)",
        ),
        (
            [*PLAN, rule("layers.0.mlp.up_proj", use_rslora=True)],
            r"\(file: rank 4, scaling 2; model: rank 4, scaling 4\)",
        ),
    ],
)
def test_model_of_another_plan(
    build: Callable[..., CausalLM], adapter: Path, plan: list, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(build(plan), adapter)


def test_same_scaling_spelled_otherwise_fits(build: Callable[..., CausalLM], adapter: Path) -> None:
    """alpha 4 / sqrt(4) is alpha 8 / 4."""
    plan = [PLAN[0] | {"alpha": 4, "use_rslora": True}]
    load_adapter(build(plan), adapter)


def test_trained_parameters_must_agree(build: Callable[..., CausalLM], adapter: Path) -> None:
    with pytest.raises(CheckpointError, match=r"in the file but not in the model: model\.norm\.w"):
        load_adapter(build(train=()), adapter)
    with pytest.raises(
        CheckpointError, match=r"parameters of the model that are not in the file: model\.embed"
    ):
        load_adapter(build(train=("norm", "embed_tokens")), adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP_A: torch.ones(4, 63)}, rf"{UP}\.lora_A\.weight has shape \[4, 63\]; .* \[4, 64\]"),
        ({UP_B: torch.ones(97, 4)}, rf"{UP}\.lora_B\.weight has shape \[97, 4\]; .* \[96, 4\]"),
        ({NORM: torch.ones(65)}, r"model\.norm\.weight has shape \[65\]; the model needs \[64\]"),
    ],
)
def test_wrong_shape_leaves_the_model_untouched(
    build: Callable[..., CausalLM],
    adapter: Path,
    changes: dict[str, Tensor],
    message: str,
) -> None:
    set_tensors(adapter, changes)
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, adapter)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_adapter_of_a_base_with_other_shapes(
    checkpoints: Callable[..., Path], adapter: Path
) -> None:
    """The recorded plan fits by name; its tensors do not."""
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.weight has shape \[64, 4\]"):
        load_with_adapter(checkpoints("biased"), adapter)


def test_unknown_quantize(checkpoints: Callable[..., Path], adapter: Path) -> None:
    for given in (adapter, None):
        with pytest.raises(CheckpointError, match="quantize is 'nf3'; did you mean 'nf4'"):
            load_with_adapter(checkpoints(), given, quantize="nf3")


def test_without_an_adapter(
    checkpoints: Callable[..., Path], logits: Callable[[nn.Module], Tensor]
) -> None:
    path = checkpoints()
    plain = load_checkpoint(path, dtype=torch.float32)
    for quantize in ("auto", "none"):
        bare = load_with_adapter(path, None, quantize=quantize, dtype=torch.float32)
        assert torch.equal(logits(bare), logits(plain))
    quantized = load_with_adapter(path, None, quantize="nf4", dtype=torch.float32)
    assert not torch.equal(logits(quantized), logits(plain))


def test_a_recorded_dtype_that_weights_cannot_have_is_an_error(
    adapter: Path, checkpoints: Callable[..., Path]
) -> None:
    file = adapter / "qlora_base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "int8"}))
    with pytest.raises(CheckpointError, match=r"dtype is 'int8'; allowed: float32, bfloat16"):
        load_with_adapter(checkpoints(), adapter)
