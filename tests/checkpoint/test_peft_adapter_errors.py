"""Strictness: an adapter that does not fit, or cannot be understood, is never loaded in part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import Build, Checkpoints, Logits, edit_json, edit_tensors
from torch import Tensor

from qlora_builders.checkpoint import (
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    save_adapter,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
UNSUPPORTED: dict[str, Any] = {
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2]],
    "target_parameters": ["x"],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1},
}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
UP_A, UP_B = f"{PREFIX}{UP}.lora_A.weight", f"{PREFIX}{UP}.lora_B.weight"
NORM = f"{PREFIX}model.norm.weight"
PLAN = [{"match": "layers.0.{mlp.up_proj,self_attn.q_proj}", "kind": "lora", "rank": 4, "alpha": 8}]


@pytest.fixture
def build(checkpoints: Checkpoints) -> Callable[..., CausalLM]:
    def model(plan: list = PLAN, train: tuple = ("norm",)) -> CausalLM:
        return load_checkpoint(checkpoints(), plan, train=train, dtype=torch.float32)

    return model


@pytest.fixture
def adapter(build: Build, tmp_path: Path) -> Path:
    save_adapter(build(), tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- the directory by itself --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"use_dora": "yes"}, "use_dora is 'yes'; it must be true or false"),
        (
            {"use_dora": True},
            "lora_magnitude_vector is missing, but .* says use_dora=True, so .96.",
        ),
        ({"use_dora": True, "lora_bias": True}, "use_dora and lora_bias exclude each other"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"lora_bias": True}, "lora_B.bias is missing, but adapter_config.json says .*so .96."),
        *(({key: value}, f"{key}=.* is not supported") for key, value in UNSUPPORTED.items()),
        ({"trainable_token_indices": [1]}, r"tokens_delta is missing, but .* is \[1\]"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "indices of lm_head is not supported"),
        ({"trainable_token_indices": [1, 1]}, "it must be token ids >= 0, none twice"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "must be token ids >= 0, none twice"),
        ({"init_lora_weights": "pissa"}, "='pissa' is not supported: .* path_initial_model"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' is not supported"),
        ({"r": None}, "r is missing; it must be an integer >= 1"),
        ({"lora_alpha": None}, "lora_alpha is missing; it must be a finite number > 0"),
        ({"r": "8"}, "r is '8'; it must be an integer >= 1"),
        ({"r": -1}, "r is -1; it must be an integer >= 1"),
        ({"r": True}, "r is True; it must be an integer >= 1"),
        ({"r": 4.0}, r"r is 4\.0; it must be an integer >= 1"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; it must be a finite number > 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be a finite number > 0"),
        ({"lora_alpha": float("nan")}, "not JSON: NaN is not a number"),
        ({"lora_alpha": float("inf")}, "not JSON: Infinity is not a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; it must be true or false"),
        ({"rank_pattern": ["up_proj"]}, r"rank_pattern is \['up_proj'\]; it must be names to int"),
        ({"rank_pattern": {"up_proj": "4"}}, "rank_pattern is .*; it must be names to integers"),
        ({"rank_pattern": {"up_(": 4}}, r"rank_pattern entry 'up_\(' is no regex: missing \)"),
        ({"alpha_pattern": {"up_proj": -1}}, "alpha_pattern is .*; it must be names to numbers"),
        ({"target_modules": None}, "target_modules is missing; it must be a string or a list"),
        ({"target_modules": 3}, "target_modules is 3; it must be a string or a list of names"),
        ({"target_modules": ["up_proj", 3]}, "target_modules is .*; it must be a string or a"),
        ({"target_modules": "*_proj"}, r"target_modules entry '\*_proj' is no regex: nothing to"),
        ({"modules_to_save": "norm"}, "modules_to_save is 'norm'; it must be a list of names"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is .*; it must be an integer or a l"),
        ({"peft_type": 3}, "peft_type is 3; only LORA is read"),
        ({"bias": 0}, "bias=0 is not supported"),
        ({"r": 8}, f"{UP} has rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"up_proj": 2}}, f"{UP} has rank 4, but adapter_config.json says 2"),
    ],
)
def test_config(adapter: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(adapter / CONFIG, changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(adapter)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_alone(adapter: Path, init: Any) -> None:
    edit_json(adapter / CONFIG, {"init_lora_weights": init})
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
            f"{UP}.lora_magnitude_vector is .96., but adapter_config.json says use_dora=False",
        ),
        (
            {f"{PREFIX}{UP}.lora_B.bias": torch.ones(96)},
            f"{UP}.lora_B.bias is .96., but adapter_config.json says lora_bias=False",
        ),
        (
            {f"{PREFIX}{UP}.lora_A.bias": torch.ones(4)},
            f"modules_to_save of adapter_config.json: {UP}.lora_A.bias",
        ),
        (
            {UP_A: torch.ones(4, 64, dtype=torch.int8)},
            r"has dtype torch\.int8; allowed: float32, b",
        ),
        ({UP_B: torch.ones(96, 4, dtype=torch.float64)}, r"has dtype torch\.float64; allowed: fl"),
        (
            {f"{PREFIX}{UP}.weight": torch.ones(96, 64)},
            f"modules_to_save of adapter_config.json: {UP}.weight",
        ),
    ],
)
def test_tensors(adapter: Path, changes: dict[str, Tensor | None], message: str) -> None:
    edit_tensors(adapter / WEIGHTS, changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "qlora_base.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[]", "holds list"), ("[" * 9**5, ".*nested too deeply")],
    ids=["cut", "list", "deep"],
)
def test_unreadable_json(adapter: Path, name: str, text: str, message: str) -> None:
    (adapter / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        read_adapter(adapter)


def test_unreadable_weights(adapter: Path) -> None:
    file = adapter / WEIGHTS
    intact = file.read_bytes()
    for content in (b"", intact[:4], intact[:100], intact[:-1], intact + b"x"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read as"):
            read_adapter(adapter)
    save_file({}, file)
    with pytest.raises(CheckpointError, match=r"holds no lora_A and lora_B \(0 tensors\)"):
        read_adapter(adapter)
    save_file({NORM: torch.ones(64)}, file)
    with pytest.raises(CheckpointError, match=r"holds no lora_A and lora_B \(1 tensors\)"):
        read_adapter(adapter)


def test_missing_files(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing; expected a PEFT adapter directory"):
        read_adapter(tmp_path / "nowhere")
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    with pytest.raises(CheckpointError, match=r"did you mean .*run/adapter\?"):
        read_adapter(tmp_path / "run")
    stopped = tmp_path / "stopped" / "checkpoints"
    for step in (9, 10):
        shutil.copytree(adapter, stopped / f"step_{step}")
    with pytest.raises(CheckpointError, match=r"did you mean .*stopped/checkpoints/step_10\?"):
        read_adapter(tmp_path / "stopped" / "adapter")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
        read_adapter(adapter)


# ---- against a model ----------------------------------------------------------------------------


def rule(match: str, **options: Any) -> dict[str, Any]:
    return {"match": match, "kind": "lora", "rank": 4, "alpha": 8} | options


def test_dora_into_lora_and_back(build: Build, tmp_path: Path) -> None:
    dora = [PLAN[0] | {"use_dora": True}]
    save_adapter(build(dora), tmp_path / "dora")
    save_adapter(build(), tmp_path / "lora")
    with pytest.raises(CheckpointError, match=f"in the file but not in the model: {UP}, {Q}"):
        load_adapter(build(), tmp_path / "dora")
    with pytest.raises(CheckpointError, match=f"DoRA magnitudes .* not in the file: {UP}, {Q}"):
        load_adapter(build(dora), tmp_path / "lora")


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
def test_model_of_another_plan(build: Build, adapter: Path, plan: list, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_adapter(build(plan), adapter)


def test_same_scaling_spelled_otherwise_fits(build: Build, adapter: Path) -> None:
    """alpha 4 / sqrt(4) is alpha 8 / 4."""
    plan = [PLAN[0] | {"alpha": 4, "use_rslora": True}]
    load_adapter(build(plan), adapter)


def test_lora_bias_must_agree(build: Build, tmp_path: Path) -> None:
    """Zeros stand for the modules without one, because PEFT has one switch for all."""
    plan = [PLAN[0], rule("layers.0.mlp.up_proj", lora_bias=True)]
    save_adapter(build(plan), tmp_path / "adapter")
    load_adapter(build(plan), tmp_path / "adapter")
    bias = f"{PREFIX}{Q}.lora_B.bias"
    assert not load_file(tmp_path / "adapter" / WEIGHTS)[bias].any()
    edit_tensors(tmp_path / "adapter" / WEIGHTS, {bias: torch.ones(64)})
    message = rf"{Q}\.lora_B\.bias is not zero, but the model has no lora_bias there"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(build(plan), tmp_path / "adapter")
    save_adapter(build(), tmp_path / "none")
    with pytest.raises(CheckpointError, match=rf"no {UP}\.lora_B\.bias, but the model has lora_b"):
        load_adapter(build(plan), tmp_path / "none")


def test_trained_parameters_must_agree(build: Build, adapter: Path) -> None:
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
        ({UP_A: torch.full((4, 64), torch.nan)}, rf"{UP}\.lora_A\.weight holds NaN or infinity"),
        ({NORM: torch.full((64,), torch.inf)}, r"model\.norm\.weight holds NaN or infinity"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_model_untouched(
    build: Build, adapter: Path, changes: dict[str, Tensor], message: str
) -> None:
    edit_tensors(adapter / WEIGHTS, changes)
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, adapter)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_adapter_of_a_base_with_other_shapes(checkpoints: Checkpoints, adapter: Path) -> None:
    """The recorded plan fits by name; its tensors do not."""
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.weight has shape \[64, 4\]"):
        load_with_adapter(checkpoints("biased"), adapter, allow_base_mismatch=True)


def test_unknown_quantize(checkpoints: Checkpoints, adapter: Path) -> None:
    for given in (adapter, None):
        with pytest.raises(CheckpointError, match="quantize is 'nf3'; did you mean 'nf4'"):
            load_with_adapter(checkpoints(), given, quantize="nf3")


def test_without_an_adapter(checkpoints: Checkpoints, logits: Logits) -> None:
    path = checkpoints()
    plain = load_checkpoint(path, dtype=torch.float32)
    for quantize in ("auto", "none"):
        bare = load_with_adapter(path, None, quantize=quantize, dtype=torch.float32)
        assert torch.equal(logits(bare), logits(plain))
    quantized = load_with_adapter(path, None, quantize="nf4", dtype=torch.float32)
    assert not torch.equal(logits(quantized), logits(plain))
