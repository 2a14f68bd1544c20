"""Adapters that we write, as PEFT itself reads them, and as we read them back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shared import Build, Checkpoints, Logits, Randomize, quiet_peft
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_builders.checkpoint import (
    adapter_plan,
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.models import summary
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor import NF4Tensor

pytestmark = quiet_peft

ALL = {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}
HEAD = {"match": "lm_head", "kind": "lora", "rank": 4, "alpha": 8}
ATTENTION = {"match": "layers.*.self_attn.*_proj", "kind": "qlora", "rank": 4, "alpha": 8}

# name -> checkpoint variant, components, train
PLANS: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "uniform": ("gqa", [ALL], []),
    "biased": ("biased", [ALL], []),
    "mixed_ranks_and_alphas": (
        "gqa",
        [ALL, ATTENTION | {"rank": 2}, ALL | {"match": "layers.1.mlp.up_proj", "alpha": 3.5}],
        [],
    ),
    "rslora": ("gqa", [ALL | {"use_rslora": True}], []),
    "rslora_mixed_ranks": (
        "gqa", [ALL | {"use_rslora": True}, ATTENTION | {"rank": 3, "use_rslora": True}], []
    ),
    "rslora_in_some": ("gqa", [ALL, ATTENTION | {"rank": 3, "use_rslora": True}], []),
    "lora_bias": ("biased", [ALL | {"lora_bias": True}], []),
    "dora": ("biased", [ALL | {"use_dora": True}], []),
    "dora_plain_base": ("gqa", [ALL | {"kind": "lora", "use_dora": True}], []),
    "dora_rslora_mixed_ranks": (
        "gqa",
        [
            ALL | {"use_dora": True},
            ATTENTION | {"rank": 3, "use_rslora": True, "use_dora": True, "kind": "lora"},
        ],
        ["norm"],
    ),
    "dora_tied_head": ("tied", [ALL | {"use_dora": True}, HEAD | {"use_dora": True}], []),
    "lora_bias_in_some": ("biased", [ALL, ATTENTION | {"lora_bias": True}], []),
    "pissa": ("gqa", [ALL | {"init_lora_weights": "pissa"}], []),
    "pissa_plain_base": ("gqa", [ALL | {"kind": "lora", "init_lora_weights": "pissa"}], []),
    "pissa_dora_rslora": (
        "biased",
        [ALL | {"init_lora_weights": "pissa_niter_2", "use_dora": True, "use_rslora": True}],
        [],
    ),
    "pissa_in_some": ("gqa", [ALL, ATTENTION | {"rank": 2, "init_lora_weights": "pissa"}], []),
    "pissa_tied_head": ("tied", [ALL, HEAD | {"init_lora_weights": "pissa"}], []),
    "loftq": ("gqa", [ALL | {"init_lora_weights": "loftq"}], []),
    "one_layer": ("gqa", [ALL | {"match": "layers.1.**"}], []),
    "one_projection_of_one_layer": ("gqa", [ALL | {"match": "layers.1.self_attn.q_proj"}], []),
    "plain_base": ("gqa", [ALL | {"kind": "lora"}], []),
    "mixed_bases": ("gqa", [ALL, ATTENTION | {"kind": "lora"}], []),
    "head": ("gqa", [ALL, HEAD], []),
    "tied_head": ("tied", [ALL, HEAD], []),
    "final_norm": ("gqa", [ALL], ["norm"]),
    "all_norms": ("gqa", [ALL], ["**.{input,post_attention}_layernorm", "norm"]),
    "embedding": ("gqa", [ALL], ["embed_tokens"]),
    "tied_embedding": ("tied", [ALL], ["embed_tokens"]),
    "trained_head": ("gqa", [ALL, {"match": "lm_head", "kind": "linear", "trainable": True}], []),
    "trained_slot_with_bias": (
        "biased",
        [ALL, {"match": "layers.0.mlp.up_proj", "kind": "linear", "trainable": True}],
        [],
    ),
}  # fmt: skip


@pytest.fixture
def build(checkpoints: Checkpoints, randomize_adapters: Randomize) -> Callable[[str], CausalLM]:
    """A model of the plan as training would leave it: all that trains is random."""

    def trained(name: str) -> CausalLM:
        variant, components, train = PLANS[name]
        path = checkpoints(variant)  # writing it draws random numbers too
        torch.manual_seed(0)
        model = load_checkpoint(path, components, train=train, dtype=torch.float32)
        randomize_adapters(model)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.requires_grad and ".lora_" not in parameter_name:
                    parameter += 0.1 * torch.randn_like(parameter)
        return model.eval()

    return trained


def base_in_transformers(path: Path, plan: tuple) -> LlamaForCausalLM:
    """The base that the adapter was trained on, its NF4 weights dequantized."""
    _, components, _ = plan
    frozen = [
        {"match": r["match"], "kind": "frozen_nf4" if r["kind"] == "qlora" else "linear"}
        for r in components
    ]
    ours = load_checkpoint(path, frozen, dtype=torch.float32)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(path)).eval()
    model.load_state_dict(ours.state_dict())
    return model


@pytest.mark.filterwarnings(
    # both halves of a tied pair are in the file, so PEFT has nothing to tie
    "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
)
@pytest.mark.parametrize("name", PLANS)
def test_peft_gives_our_logits_and_we_read_it_back(
    build: Build, checkpoints: Checkpoints, logits: Logits, tmp_path: Path, name: str
) -> None:
    """With the plan on record, every bit; with the weights in the file alone, the same function."""
    model = build(name)
    variant = PLANS[name][0]
    save_adapter(model, tmp_path / "adapter")
    base = base_in_transformers(checkpoints(variant), PLANS[name])
    assert (logits(model) - logits(base)).abs().max() > 0.1
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    again = load_with_adapter(checkpoints(variant), tmp_path / "adapter", dtype=torch.float32)
    assert again.spec == model.spec
    assert torch.equal(logits(again), logits(model))

    (tmp_path / "adapter/qlora_base.json").unlink()
    info = read_adapter(tmp_path / "adapter")
    quantize = "none" if name.endswith("plain_base") else "nf4"
    # which slots were plain is only in the plan
    if name not in ("mixed_bases", "dora_rslora_mixed_ranks"):
        rules, patterns = adapter_plan(info, quantize=quantize)
        derived = load_checkpoint(
            checkpoints(variant), [*rules, *_plain_slots(name)], train=patterns, dtype=torch.float32
        )
        load_adapter(derived, tmp_path / "adapter")
        torch.testing.assert_close(logits(derived), logits(model), rtol=1e-5, atol=1e-5)


def _plain_slots(name: str) -> list[dict[str, Any]]:
    """Slots whose base the plan left alone, where adapter_plan(quantize="nf4") would not."""
    others = {
        "one_layer": ["layers.0.**"],
        "one_projection_of_one_layer": [
            "layers.0.**", "layers.1.mlp.*", "layers.1.self_attn.{k,v,o}_proj"
        ],
    }  # fmt: skip
    return [{"match": match, "kind": "linear"} for match in others.get(name, [])]


def test_layout(build: Build, tmp_path: Path) -> None:
    model = build("rslora_in_some")
    save_adapter(model, tmp_path / "adapter", base_model="some/base")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "qlora_base.json"
    ]  # fmt: skip
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["r"] == 3
    assert not {"use_rslora", "lora_bias"} & set(config)  # newer than rank_pattern, and not needed
    q_proj = "model.layers.0.self_attn.q_proj"
    assert config["rank_pattern"]["model.layers.0.mlp.up_proj"] == 4
    assert config["alpha_pattern"] == {
        f"model.layers.{i}.mlp.{n}_proj": 8 for i in (0, 1) for n in ("gate", "up", "down")
    }
    assert config["lora_alpha"] == pytest.approx(8 * 3**0.5)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 28
    a, b = (tensors[f"base_model.model.{q_proj}.lora_{part}.weight"] for part in "AB")
    assert (a.shape, b.shape) == ((3, 64), (64, 3))
    assert a.dtype == b.dtype == torch.float32


def test_dora_layout(build: Build, tmp_path: Path) -> None:
    save_adapter(build("dora"), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["use_dora"] is True
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 3 * 14
    magnitudes = tensors["base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"]
    assert (magnitudes.dtype, list(magnitudes.shape)) == (torch.float32, [96])


def test_pissa_is_written_as_a_lora_of_twice_the_rank(build: Build, tmp_path: Path) -> None:
    model = build("pissa_in_some")
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    mlp = {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    assert config["rank_pattern"] == {}  # 2 * 2 is 4
    assert config["alpha_pattern"] == dict.fromkeys(mlp, 8)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    q_proj = model.model.layers[0].self_attn.q_proj
    a, b = (
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"]
        for part in "AB"
    )
    assert torch.equal(a, torch.cat([q_proj.lora_A.weight, q_proj.lora_A_init]))
    assert torch.equal(b, torch.cat([q_proj.lora_B.weight, -q_proj.lora_B_init], dim=1))


def test_alphas_are_written_as_given(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """alpha / rank * rank is not alpha for every float."""
    rules = [ALL | {"rank": 49, "alpha": 1.0}, ATTENTION | {"use_rslora": True}]
    save_adapter(load_checkpoint(checkpoints(), rules), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert 1.0 / 49 * 49 != 1.0
    alphas = {config["lora_alpha"], *config["alpha_pattern"].values()}
    assert alphas == {1.0, 16.0}


@pytest.mark.parametrize(
    ("name", "target_modules"),
    [
        ("uniform", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("one_projection_of_one_layer", ["model.layers.1.self_attn.q_proj"]),
        ("trained_slot_with_bias", None),
    ],
)
def test_target_modules(
    build: Build, tmp_path: Path, name: str, target_modules: list | None
) -> None:
    """Bare names where they say the same as full ones."""
    model = build(name)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    adapted = sorted(n for n, m in model.named_modules() if isinstance(m, LoRALinear))
    assert config["target_modules"] == (target_modules or adapted)


def test_nothing_to_save(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoints(), train=["norm"])
    with pytest.raises(CheckpointError, match="no LoRALinear; write it with save_checkpoint"):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_overwritten_by_an_adapter(
    build: Build, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    save_checkpoint(load_checkpoint(checkpoints()), tmp_path / "out")
    model = build("uniform")
    with pytest.raises(CheckpointError, match="exists and would be replaced"):
        save_adapter(model, tmp_path / "out")
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")  # over its own kind it may
    assert (tmp_path / "out/config.json").exists()


def test_adapters_and_inspection_never_dequantize(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("final_norm")
    calls = []
    dequantize = NF4Tensor.dequantize
    monkeypatch.setattr(
        NF4Tensor, "dequantize", lambda *args: calls.append(args) or dequantize(*args)
    )
    save_adapter(model, tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")
    summary.summarize(model)
    repr(model)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert not calls
    model.state_dict()
    assert len(calls) == 14  # so the count does count
