"""Loss curves of QLoRA training: those of transformers + PEFT, however a step is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_builders.checkpoint import arch_from_config
from qlora_builders.data import Batch
from qlora_builders.models import llama
from qlora_builders.modules import CausalLM
from qlora_builders.names import CHECKPOINTING_MODES, PROJECTIONS
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

VOCAB = 61
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
PLAN = [{"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}]
LEARNING_RATE = 5e-3


def build(**options: Any) -> CausalLM:
    torch.manual_seed(0)
    plan = [PLAN[0] | options]
    return llama(arch_from_config(CONFIG.to_dict()), plan, dtype=torch.float32).train()


def on_peft(model: CausalLM, **options: Any) -> nn.Module:
    """transformers + PEFT with our dequantized base and our adapters."""
    state = model.state_dict()
    base = LlamaForCausalLM(CONFIG)
    base.load_state_dict({name: w for name, w in state.items() if "lora_" not in name})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM", **options
    )
    adapted = get_peft_model(base, config)
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, weight in state.items():
            if "lora_" in name and "pissa" not in options.values():  # PEFT finds the same start
                theirs = name.removesuffix(".weight") + ".default.weight"
                parameters[f"base_model.model.{theirs}"].copy_(weight)
    return adapted.train()


def rows(count: int, length: int, seed: int) -> Batch:
    """Rows with a pattern to learn, and a prompt that carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCAB, (count, 1), generator=generator)
    ids = (start + 7 * torch.arange(length)) % VOCAB
    labels = ids.clone()
    labels[:, : 1 + seed % 4] = -100
    return Batch(ids, labels, list(range(count)))


def curve(model: CausalLM, steps: list[list[Batch]]) -> list[float]:
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=LEARNING_RATE)
    return [train_step(model, batches, optimizer, clip_grad_norm=1.0).loss for batches in steps]


def peft_curve(model: nn.Module, steps: list[list[Batch]]) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    losses = []
    for (batch,) in steps:
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# PEFT asks transformers for an attribute under its old name
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_fifty_steps_are_those_of_peft(options: dict[str, Any]) -> None:
    steps = [[rows(4, 16 + step % 5, seed=step)] for step in range(50)]
    model = build(**options)
    expected = peft_curve(on_peft(model, **options), steps)
    assert curve(model, steps) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < (0.6 if "use_dora" in options else 0.5) * expected[0]


def test_one_row_eight_times_is_eight_rows_once() -> None:
    large = [rows(8, 16, seed=step) for step in range(10)]
    small = [
        [
            Batch(batch.input_ids[i : i + 1], batch.labels[i : i + 1], [i])
            for i in range(len(batch.rows))
        ]
        for batch in large
    ]
    for batch in large:
        batch.labels[::2, :7] = -100  # rows do not weigh the same
    assert curve(build(), small) == pytest.approx(curve(build(), [[b] for b in large]), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "dropout": 0.1}])
@pytest.mark.parametrize("mode", CHECKPOINTING_MODES[1:])
def test_checkpointing_changes_nothing(mode: str, options: dict[str, Any]) -> None:
    steps = [[rows(4, 16, seed=step)] for step in range(10)]
    model = build(**options)
    model.model.activation_checkpointing = mode
    assert curve(model, steps) == curve(build(**options), steps)
