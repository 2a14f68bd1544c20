"""Compiled layers: the same losses, one graph for all layers and lengths; when `auto` compiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from archs import TINY, tiny_model
from torch import Tensor

from qlora_builders.data import Batch
from qlora_builders.modules import CausalLM
from qlora_builders.training import device as compile_module
from qlora_builders.training.device import compile_layers, matmul_seconds
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

PLAN = [{"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}]
# PyTorch's own deprecations, met while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def build(**options: float) -> CausalLM:
    return tiny_model([{**PLAN[0], **options}], num_layers=3).train()


def batch(rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(TINY["vocab_size"], (rows, length), generator=generator)
    return Batch(ids, ids, list(range(rows)))


def packed(length: int, document: int) -> Batch:
    rows = batch(2, length)
    ids = torch.arange(length).div(document, rounding_mode="floor").expand(2, -1)
    labels = rows.labels.clone()
    labels[:, ::document] = -100
    return Batch(rows.input_ids, labels, rows.rows, ids)


def losses(model: CausalLM, batches: list[Batch]) -> list[float]:
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    torch.manual_seed(1)
    return [train_step(model, [b], optimizer, clip_grad_norm=1.0).loss for b in batches]


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_all_layers_and_lengths_share_one_graph_and_the_losses_are_eager_ones() -> None:
    batches = [batch(2, 12), batch(2, 30), batch(3, 7), batch(2, 12)]
    expected = losses(build(), batches)
    model = build()
    assert compile_layers(model, "on", num_tokens=0)
    assert losses(model, batches) == pytest.approx(expected, rel=1e-5)
    assert expected[0] - expected[3] > 0.05
    assert graphs() == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
@pytest.mark.parametrize("rows", ["dropout", "packed"])
def test_checkpointing_dropout_and_packing_inside_the_graph(mode: str, rows: str) -> None:
    batches = [batch(2, 12), batch(2, 20), batch(2, 12)]
    if rows == "packed":
        batches = [packed(12, 5), packed(20, 7), packed(16, 3)]
    dropout = 0.3 if rows == "dropout" else 0.0  # with the numbers of uncompiled layers
    expected = losses(build(dropout=dropout), batches)
    model = build(dropout=dropout)
    model.model.activation_checkpointing = mode
    compile_layers(model, "on", num_tokens=0)
    assert losses(model, batches) == pytest.approx(expected, rel=1e-5)
    assert graphs() == 1


def test_names_and_weights_stay() -> None:
    model, plain = build(), build()
    compile_layers(model, "on", num_tokens=0)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_off_does_nothing() -> None:
    model = build()
    assert not compile_layers(model, "off", num_tokens=10**15)
    losses(model, [batch(1, 5)])
    assert graphs() == 0


def test_auto_compiles_long_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(compile_module.time, "perf_counter", lambda: next(clock) * 2**22 / 1e9)
    model = build()
    weights = sum(p.numel() for n, p in model.named_parameters() if "proj.weight" in n)
    seconds = partial(matmul_seconds, model, rows=1024, size=64)  # 2**22 products of two numbers
    assert seconds(7) == pytest.approx(2 * 7 * weights / 1e9)
    enough = compile_module._PAYS_AFTER_SECONDS["cpu"]
    tokens = round(enough * 1e9 / (2 * weights))
    monkeypatch.setattr(compile_module, "matmul_seconds", lambda _, num_tokens: seconds(num_tokens))
    assert not compile_layers(model, "auto", num_tokens=tokens - 1000)
    assert compile_layers(model, "auto", num_tokens=tokens + 1000)


def test_no_gradient_is_asked_for_in_evaluation() -> None:
    model = build()
    compile_layers(model, "on", num_tokens=0)
    with torch.no_grad():
        hidden: Tensor = model.model.embed_tokens(torch.tensor([[1]]))
    assert not hidden.requires_grad
