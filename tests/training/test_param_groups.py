"""LoRA+ groups against PEFT's, and by what a step does."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_builders import LlamaArch, llama
from qlora_builders.errors import ConfigError
from qlora_builders.training.optimizers import lora_plus_groups

ARCH = LlamaArch(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=32,
)
PLAN = [{"match": "layers.*.self_attn.{q,v}_proj", "kind": "qlora", "rank": 2, "alpha": 4}]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_learning_rates_are_pefts() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(LlamaForCausalLM(config), lora)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    wanted = rates(theirs, optimizer)
    ours = llama(ARCH, PLAN)
    groups = lora_plus_groups(ours, lr=1e-3, ratio=16.0)
    assert rates(ours, torch.optim.AdamW(groups)) == wanted
    assert set(wanted.values()) == {1e-3, 16e-3}


def rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rate by parameter, under the names that both libraries share."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        re.sub(r"^base_model\.model\.|\.default", "", names[parameter]): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_what_trains_beside_adapters_is_in_the_first_group() -> None:
    model = llama(ARCH, PLAN, train=["norm"])
    slow, fast = lora_plus_groups(model, lr=0.1, ratio=4)
    assert any(parameter is model.model.norm.weight for parameter in slow["params"])
    assert (len(slow["params"]), slow["lr"]) == (5, 0.1)
    assert (len(fast["params"]), fast["lr"]) == (4, 0.4)


def test_without_adapters_it_is_an_error() -> None:
    model = llama(ARCH, train=["norm"])
    with pytest.raises(ConfigError, match=r"lora_plus_ratio=16 needs adapters to train"):
        lora_plus_groups(model, lr=0.1, ratio=16)
