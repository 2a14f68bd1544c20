"""The loss in chunks equals the loss of all logits, in value and every gradient, for any head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_builders import LlamaArch, llama
from qlora_builders.modules import (
    IGNORE_INDEX,
    FrozenNF4Linear,
    Linear,
    LoRALinear,
    chunked_next_token_loss,
    loss,
    next_token_loss,
)

HIDDEN, VOCAB, BATCH, SEQ = 48, 37, 3, 11


def lora_head(**options: Any) -> LoRALinear:
    head = LoRALinear(HIDDEN, VOCAB, 4, 8.0, **options)
    nn.init.normal_(head.lora_B.weight, std=0.1)
    return head


HEADS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False),
    "frozen_bf16": lambda: Linear(HIDDEN, VOCAB, dtype=torch.bfloat16).requires_grad_(False),
    "trainable": lambda: Linear(HIDDEN, VOCAB, bias=True),
    "nf4": lambda: FrozenNF4Linear(HIDDEN, VOCAB),
    "lora": lora_head,
    "qlora": lambda: lora_head(quantize_base=True),
}


def make_labels() -> Tensor:
    labels = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))
    labels[0, :5] = IGNORE_INDEX
    labels[1] = IGNORE_INDEX
    return labels


def loss_and_gradients(
    head: nn.Module, hidden: Tensor, labels: Tensor, *, chunked: bool
) -> tuple[Tensor, dict[str, Tensor | None]]:
    head.zero_grad()
    leaf = hidden.clone().requires_grad_()
    if chunked:
        value = chunked_next_token_loss(leaf, labels, head)
    else:
        value = next_token_loss(head(leaf), labels)
    (value / 7).backward()
    return value.detach(), {"hidden": leaf.grad, **{n: p.grad for n, p in head.named_parameters()}}


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 25])
@pytest.mark.parametrize("head_name", HEADS)
def test_equals_the_loss_of_all_logits(
    head_name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(loss, "_BLOCK_ELEMENTS", 2 * VOCAB)
    torch.manual_seed(0)
    head, hidden, labels = HEADS[head_name](), torch.randn(BATCH, SEQ, HIDDEN), make_labels()
    value, grads = loss_and_gradients(head, hidden, labels, chunked=True)
    expected, expected_grads = loss_and_gradients(head, hidden, labels, chunked=False)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("head_name", HEADS)
def test_bfloat16_hidden_states(head_name: str) -> None:
    torch.manual_seed(0)
    head, labels = HEADS[head_name](), make_labels()
    hidden = torch.randn(BATCH, SEQ, HIDDEN).bfloat16()
    value, grads = loss_and_gradients(head, hidden, labels, chunked=True)
    expected, expected_grads = loss_and_gradients(head, hidden, labels, chunked=False)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert value.dtype == torch.float32
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=2e-2, atol=2e-3, msg=name)


def test_only_rows_with_a_target_reach_the_head() -> None:
    seen = []
    head = Linear(HIDDEN, VOCAB)
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    labels = make_labels()
    chunked_next_token_loss(torch.randn(BATCH, SEQ, HIDDEN), labels, head)
    assert sum(seen) == (labels[:, 1:] != IGNORE_INDEX).sum() == 6 + 10


def test_without_targets_it_is_zero_and_so_are_the_gradients() -> None:
    head, hidden = Linear(HIDDEN, VOCAB), torch.randn(BATCH, SEQ, HIDDEN)
    nothing = torch.full((BATCH, SEQ), IGNORE_INDEX)
    value, grads = loss_and_gradients(head, hidden, nothing, chunked=True)
    assert value == 0
    assert all(grad is not None and not grad.any() for grad in grads.values())


def test_without_gradients_nothing_is_kept() -> None:
    head, hidden, labels = Linear(HIDDEN, VOCAB), torch.randn(BATCH, SEQ, HIDDEN), make_labels()
    with torch.no_grad():
        value = chunked_next_token_loss(hidden.requires_grad_(), labels, head)
    assert not value.requires_grad
    torch.testing.assert_close(value, next_token_loss(head(hidden), labels).detach())


def test_a_second_backward_is_refused() -> None:
    hidden = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
    value = chunked_next_token_loss(hidden, make_labels(), Linear(HIDDEN, VOCAB))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward only"):
        value.backward()


def test_values_that_are_not_finite_show_in_the_loss() -> None:
    hidden = torch.randn(BATCH, SEQ, HIDDEN)
    hidden[2, 4, 0] = torch.inf
    assert not chunked_next_token_loss(hidden, make_labels(), Linear(HIDDEN, VOCAB)).isfinite()


@pytest.mark.parametrize("train", [(), ("embed_tokens",)])
def test_a_tied_head_and_its_embedding_get_one_gradient(train: tuple[str, ...]) -> None:
    arch = LlamaArch(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    plan = [{"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}]
    if train:
        plan.append({"match": "lm_head", "kind": "linear", "trainable": True})
    model = llama(arch, plan, train=train, dtype=torch.float32)
    labels = make_labels()
    ids = labels.clamp(min=0)
    results = []
    for chunked in (True, False):
        model.zero_grad()
        value = model.loss(ids, labels) if chunked else next_token_loss(model(ids), labels)
        value.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((value.detach(), grads))
    (value, grads), (expected, expected_grads) = results
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert grads.keys() == expected_grads.keys()
    assert ("model.embed_tokens.weight" in grads) is bool(train)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)
