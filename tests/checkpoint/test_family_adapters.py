"""Adapters of every family to PEFT and back, and merged: the same logits there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from shared import SIZES, quiet_peft, randomized, refused, trained_in_peft
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_builders.checkpoint import (
    load_checkpoint,
    load_with_adapter,
    merge_adapter,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.models import FAMILIES

pytestmark = [
    quiet_peft,
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]
LORA = {"match": "layers.**", "kind": "lora", "rank": 4, "alpha": 8}
IDS = torch.arange(40).view(2, 20) % 61


def base(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | SIZES | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    randomized(model).save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_in_peft_and_merged_in_transformers(family: str, tmp_path: Path) -> None:
    theirs = base(family, tmp_path / "base")
    own = load_checkpoint(tmp_path / "base", components=[LORA], dtype=torch.float32)
    randomized(own)
    save_adapter(own.eval(), tmp_path / "adapter")
    save_checkpoint(merge_adapter(own, dtype=torch.float32), tmp_path / "merged")
    logits = own(IDS)
    there = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()(IDS).logits
    torch.testing.assert_close(there, logits, rtol=1e-4, atol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_with_us(family: str, tmp_path: Path) -> None:
    theirs = base(family, tmp_path / "base")
    trained = trained_in_peft(theirs, target_modules="all-linear")
    trained.save_pretrained(tmp_path / "adapter")
    own = load_with_adapter(tmp_path / "base", tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(own(IDS), trained.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "slot"),
    [("qwen2", "self_attn.o_proj"), ("qwen2", "mlp.up_proj"), ("mistral", "self_attn.q_proj")],
)
def test_a_bias_that_a_family_cannot_have(family: str, slot: str, tmp_path: Path) -> None:
    base(family, tmp_path / "base")
    rule = LORA | {"match": f"layers.*.{slot}", "lora_bias": True}
    own = load_checkpoint(tmp_path / "base", components=[rule], dtype=torch.float32)
    randomized(own)
    refused(f"{slot} has a lora_bias, but {family} models have", merge_adapter, own)
