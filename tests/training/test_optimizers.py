"""The learning rate over a run, and LoRA+ groups against PEFT's."""

from __future__ import annotations

import math
import re
from typing import Any

import peft
import pytest
import torch
from archs import TINY, tiny_arch
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_builders import llama
from qlora_builders.errors import ConfigError
from qlora_builders.training.optimizers import check_same_past, lora_plus_groups, lr_factor

PLAN = [{"match": "layers.*.self_attn.{q,v}_proj", "kind": "qlora", "rank": 2, "alpha": 4}]


def test_cosine_with_warmup() -> None:
    factor = lr_factor("cosine", total_steps=20, warmup_steps=4, min_lr_ratio=0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(12) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(20) == pytest.approx(0.1)
    assert factor(19) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 15 / 16)) / 2)


@pytest.mark.parametrize(("name", "middle"), [("linear", 0.5), ("constant", 1.0)])
def test_other_shapes(name: str, middle: float) -> None:
    factor = lr_factor(name, total_steps=10)
    assert (factor(0), factor(5)) == (1.0, middle)


def test_warmup_ratio_counts_whole_steps_and_steps_override_it() -> None:
    assert lr_factor("constant", total_steps=25, warmup_ratio=0.1)(0) == pytest.approx(1 / 3)
    assert lr_factor("constant", total_steps=25, warmup_ratio=0.1, warmup_steps=0)(0) == 1.0


def test_no_step_runs_at_zero() -> None:
    for name in ("cosine", "linear", "constant"):
        for total in (1, 2, 7):
            factor = lr_factor(name, total_steps=total, warmup_ratio=0.3)
            assert all(factor(step) > 0 for step in range(total))


@pytest.mark.parametrize(
    ("schedule", "total_steps", "done", "fits"),
    [
        ({"name": "cosine"}, 10, 4, True),
        ({"name": "cosine"}, 11, 4, False),
        ({"name": "cosine"}, 11, 1, True),  # the first step is the same
        ({"name": "cosine", "warmup_steps": 4}, 20, 4, True),
        ({"name": "cosine", "warmup_steps": 4}, 20, 6, False),
        ({"name": "constant", "warmup_steps": 2}, 20, 6, True),
        ({"name": "constant", "warmup_ratio": 0.5}, 20, 3, False),
    ],
)
def test_the_number_of_steps_may_change_if_no_step_done_is_touched(
    schedule: dict[str, Any], total_steps: int, done: int, fits: bool
) -> None:
    if fits:
        check_same_past(schedule, total_steps=total_steps, before=10, steps_done=done)
        return
    message = rf"cannot resume after step {done}: a run of {total_steps} steps has another learning"
    with pytest.raises(ConfigError, match=message):
        check_same_past(schedule, total_steps=total_steps, before=10, steps_done=done)


def test_fewer_steps_than_done_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"6 steps are done, but the run has only 5"):
        check_same_past({"name": "constant"}, total_steps=5, before=10, steps_done=6)
    check_same_past({"name": "constant"}, total_steps=6, before=10, steps_done=6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_learning_rates_are_pefts() -> None:
    config = LlamaConfig(
        vocab_size=TINY["vocab_size"],
        hidden_size=TINY["hidden_size"],
        intermediate_size=TINY["intermediate_size"],
        num_hidden_layers=TINY["num_layers"],
        num_attention_heads=TINY["num_heads"],
        num_key_value_heads=TINY["num_kv_heads"],
    )
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(LlamaForCausalLM(config), lora)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    wanted = rates(theirs, optimizer)
    ours = llama(tiny_arch(), PLAN)
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
    model = llama(tiny_arch(), PLAN, train=["norm"])
    slow, fast = lora_plus_groups(model, lr=0.1, ratio=4)
    assert any(parameter is model.model.norm.weight for parameter in slow["params"])
    assert (len(slow["params"]), slow["lr"]) == (5, 0.1)
    assert (len(fast["params"]), fast["lr"]) == (4, 0.4)


def test_without_adapters_it_is_an_error() -> None:
    model = llama(tiny_arch(), train=["norm"])
    with pytest.raises(ConfigError, match=r"lora_plus_ratio=16 needs adapters to train"):
        lora_plus_groups(model, lr=0.1, ratio=16)
