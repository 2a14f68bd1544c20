"""PiSSA and LoftQ from a checkpoint on: what they start from, where they must not be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import FROZEN, assert_close, checkpoints, logits, refused

from qlora_builders.checkpoint import (
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    merge_adapter,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.errors import CheckpointError, PlanError
from qlora_builders.modules import CausalLM, LoRALinear

ALL = {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}
PISSA, LOFTQ = ALL | {"init_lora_weights": "pissa"}, ALL | {"init_lora_weights": "loftq"}
HEAD = {"match": "lm_head", "kind": "lora", "rank": 4, "alpha": 8, "init_lora_weights": "pissa"}


def load(path: Path, *rules: dict) -> CausalLM:
    return load_checkpoint(path, rules, dtype=torch.float32)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_pissa_starts_as_the_base(variant: str, use_dora: bool) -> None:
    path = checkpoints(variant)
    dora = {"use_dora": use_dora}
    model = load(path, PISSA | dora, HEAD | dora)
    assert_close(model, load(path, FROZEN), rtol=1e-4, atol=1e-4)
    for module in (model.lm_head, model.model.layers[1].mlp.up_proj):
        largest = torch.linalg.svdvals(module.weight.to(torch.float32))[:4]
        part = module.scaling * module.lora_B.weight @ module.lora_A.weight
        torch.testing.assert_close(torch.linalg.svdvals(part)[:4], largest, rtol=1e-4, atol=0)


def test_loftq_starts_nearer_to_the_original() -> None:
    path = checkpoints()
    originals = load_file(path / "model.safetensors")
    model = load(path, LOFTQ)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            change = originals[f"{name}.weight"] - module.weight.dequantize()
            left = (change - module.lora_delta()).norm()
            torch.testing.assert_close(left, torch.linalg.svdvals(change)[4:].norm())
    expected = logits(load(path))
    off = (logits(model) - expected).norm()
    assert off < 0.9 * (logits(load(path, FROZEN)) - expected).norm()


def test_the_start_is_that_of_the_file_on_another_machine(tmp_path: Path) -> None:
    """Singular vectors have no sign of their own; what trained belongs to the start it had."""
    path = checkpoints()
    model = load(path, PISSA)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                for factor in (module.lora_A.weight, module.lora_B.weight):
                    factor += 0.1 * torch.randn_like(factor)
    save_adapter(model, tmp_path)
    other = load(path, PISSA)
    for module in other.modules():
        if isinstance(module, LoRALinear):
            module.lora_A_init.data.neg_()
            module.lora_B_init.data.neg_()
    load_adapter(other, tmp_path)
    for (name, own), (_, loaded) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert name.endswith("weight") or torch.equal(own, loaded)
    assert torch.equal(logits(other), logits(model))


def test_pissa_merges() -> None:
    model = load(checkpoints("tied"), PISSA, HEAD)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.weight.mul_(1.2)
    merged = merge_adapter(model)
    assert_close(merged, model, rtol=1e-4, atol=1e-4)


# ---- LoftQ belongs to one quantization ----------------------------------------------------------


def test_loftq_needs_weights_that_are_not_quantized_yet(tmp_path: Path) -> None:
    save_checkpoint(load(checkpoints(), FROZEN), tmp_path / "nf4", format="nf4")
    refused(r"weight is stored in 4 bits, and init_lora_weights", load, tmp_path / "nf4", LOFTQ)
    load(tmp_path / "nf4", PISSA)


def test_a_loftq_adapter_is_not_for_another_quantization(tmp_path: Path) -> None:
    path = checkpoints()
    save_adapter(load(path, LOFTQ), tmp_path)
    for quantize in ("auto", "nf4"):  # the same one
        load_with_adapter(path, tmp_path, quantize=quantize)
    with pytest.raises(CheckpointError, match="quantization: the NF4 of these slots differs"):
        load_with_adapter(path, tmp_path, quantize="none")
    load_with_adapter(path, tmp_path, quantize="none", allow_base_mismatch=True)


def test_loftq_is_not_merged_onto_the_originals() -> None:
    model = load(checkpoints(), LOFTQ)
    with pytest.raises(CheckpointError, match="started as LoftQ correct their quantized base"):
        merge_adapter(model, base=checkpoints())
    merge_adapter(model)


def test_a_rank_that_a_slot_does_not_have() -> None:
    with pytest.raises(PlanError, match=r"rule 'layers\.\*\*': rank is 33; .* allows 32 at most"):
        load(checkpoints(), PISSA | {"rank": 33})


@pytest.mark.parametrize(
    ("rule", "train", "named"),
    [
        (ALL | {"use_dora": True}, [], "use_dora"),
        (PISSA, [], "init_lora_weights"),
        (ALL, ["embed_tokens[3]"], "train_tokens"),
    ],
)
def test_sharded_weights_are_no_start(rule: dict, train: list[str], named: str) -> None:
    with pytest.raises(PlanError, match=f"^{named} cannot be used with sharded weights"):
        load_checkpoint(checkpoints(), [rule], train=train, shard=lambda model: None)
