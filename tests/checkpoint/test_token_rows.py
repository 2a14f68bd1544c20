"""Rows of single tokens that train: PEFT's function, losses and files, in memory for those rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shared import (
    checkpoints,
    in_peft,
    logits,
    quiet_peft,
    randomized,
    reference,
    refused,
    trained_in_peft,
)

from qlora_builders.checkpoint import (
    adapter_plan,
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    save_adapter,
    save_merged,
)
from qlora_builders.config.schema import FinetuneConfig, train_patterns
from qlora_builders.data import Batch
from qlora_builders.errors import PlanError
from qlora_builders.models import llama, summarize
from qlora_builders.modules import CausalLM
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

pytestmark = quiet_peft
RULE = {"match": "layers.*.self_attn.q_proj", "kind": "lora", "rank": 4, "alpha": 8}
TOKENS = [50, 3, 4, 5]
TRAIN = ["embed_tokens[50,3-5]"]
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"
EITHER_HEAD = pytest.mark.parametrize("variant", ["gqa", "tied"])


def load(path: Path, rule: dict[str, Any] = RULE, **options: Any) -> CausalLM:
    return load_checkpoint(path, [rule], train=TRAIN, **{"dtype": torch.float32} | options)


PEFT_CONFIG = {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS}


@EITHER_HEAD
def test_twenty_steps_are_those_of_peft(variant: str) -> None:
    ours = load(checkpoints(variant)).train()
    theirs = in_peft(reference(checkpoints(variant)), **PEFT_CONFIG).train()
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_A" in name:
                key = name.removesuffix("weight") + "default.weight"
                parameters[f"base_model.model.{key}"].copy_(parameter)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for model in (ours, theirs)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ids = torch.randint(53, (2, 10), generator=generator)
        ids[:, ::3] = 50
        own = train_step(ours, [Batch(ids, ids, [0, 1])], optimizers[0], clip_grad_norm=None)
        loss = theirs(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert own.loss == pytest.approx(loss.item(), rel=1e-4)
    rows = parameters[f"base_model.model.{DELTA}.default"]
    torch.testing.assert_close(ours.get_parameter(DELTA), rows, rtol=1e-3, atol=1e-3)
    embedding = ours.model.embed_tokens
    assert (rows - embedding.weight[TOKENS]).abs().mean() > 0.02
    start = load_checkpoint(checkpoints(variant), dtype=torch.float32)
    assert torch.equal(embedding.weight, start.model.embed_tokens.weight)  # frozen


@EITHER_HEAD
def test_peft_reads_ours(tmp_path: Path, variant: str) -> None:
    path = checkpoints(variant)
    model = randomized(load(path))
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == TOKENS
    assert config["modules_to_save"] is None
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{DELTA}"].shape == (4, 64)
    assert len(tensors) == 5
    theirs = PeftModel.from_pretrained(reference(path), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    again = load_with_adapter(path, tmp_path, dtype=torch.float32)
    assert again.spec == model.spec
    assert torch.equal(logits(again), logits(model))


@EITHER_HEAD
@pytest.mark.parametrize("tokens", [TOKENS, {"embed_tokens": TOKENS}])
def test_we_read_pefts(tmp_path: Path, variant: str, tokens: Any) -> None:
    base = reference(checkpoints(variant))
    theirs = trained_in_peft(base, **PEFT_CONFIG | {"trainable_token_indices": tokens})
    theirs.save_pretrained(tmp_path)
    assert adapter_plan(read_adapter(tmp_path))[1] == ["embed_tokens[50,3,4,5]"]
    ours = load_with_adapter(checkpoints(variant), tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(theirs) - logits(base)).abs().max() > 0.1


@EITHER_HEAD
def test_merged(tmp_path: Path, variant: str) -> None:
    model = randomized(load(checkpoints(variant), RULE | {"kind": "qlora"}))
    for base in ("dequantized", checkpoints(variant)):
        out = tmp_path / str(base == "dequantized")
        save_merged(model, out, base=base)
        merged = reference(out)
        rows = merged.model.embed_tokens.weight[TOKENS]
        assert torch.equal(rows, model.get_parameter(DELTA))
    torch.testing.assert_close(
        logits(reference(tmp_path / "True")), logits(model), rtol=1e-4, atol=1e-4
    )


@EITHER_HEAD
def test_only_rows_have_gradients(variant: str) -> None:
    model = load(checkpoints(variant), dtype=torch.bfloat16)
    ids = torch.tensor([[50, 3, 9, 50, 12]])
    model.loss(ids, ids).backward()
    assert model.model.embed_tokens.weight.grad is None
    assert model.lm_head.weight.grad is None
    gradient = model.get_parameter(DELTA).grad
    assert (gradient.shape, gradient.dtype) == ((4, 64), torch.float32)  # of a master
    unused = gradient[2:]  # tokens 4 and 5: as targets that did not come, a tied head pushes them
    assert bool(unused.any()) == (variant == "tied")
    assert sum(p.numel() for p in trainable_parameters(model)) == 2 * 2 * 4 * 64 + 4 * 64


@EITHER_HEAD
def test_untrained_rows_change_nothing_and_are_in_the_state_dict(variant: str) -> None:
    path = checkpoints(variant)
    model = load(path)
    torch.testing.assert_close(logits(model), logits(load_checkpoint(path, dtype=torch.float32)))
    randomized(model)
    other = load(path)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    rows = next(row for row in summarize(model) if row.name == "embed_tokens")
    assert (rows.trainable, rows.adapter_bytes) == (4 * 64, 4 * 4 * 64)
    assert sum(row.trainable for row in summarize(model)) == sum(
        p.numel() for p in trainable_parameters(model)
    )
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "rule", "message"),
    [
        (["embed_tokens[x]"], RULE, r"'x' is no token id or range; write embed_tokens\[5,8-11\]"),
        (["embed_tokens[]"], RULE, "'' is no token id or range"),
        (["embed_tokens[53]"], RULE, "there is no token 53; the vocabulary has 53"),
        (["embed_tokens[1-4]", "embed_tokens[2]"], RULE, r"named twice: \[2\]"),
        (["embed_tokens[1]", "embed_tokens"], RULE, "names both embed_tokens and some of its rows"),
        (["embed_tokens[1]"], {"match": "**", "kind": "linear"}, "and the plan has none; add a"),
        (["embed_tokens[1]"], RULE | {"match": "lm_head"}, "some rows of which train; leave the"),
    ],
)
def test_plans(train: list, rule: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_checkpoint(checkpoints("tied"), [rule], train=train)


def test_an_adapter_of_other_tokens(tmp_path: Path) -> None:
    save_adapter(load(checkpoints()), tmp_path)
    model = load_checkpoint(checkpoints(), [RULE], train=["embed_tokens[1]"], dtype=torch.float32)
    refused(r"tokens \[50, 3, 4, 5\], the model those of \[1\]", load_adapter, model, tmp_path)


def test_the_config_key() -> None:
    cfg = FinetuneConfig(train=["norm"], train_tokens=[7, 9])
    assert train_patterns(cfg) == ["norm", "embed_tokens[7,9]"]


def test_meta() -> None:
    arch = load(checkpoints("tied")).spec.arch
    model = llama(arch, [RULE], train=TRAIN, device="meta")
    assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).shape == (1, 3, 53)
