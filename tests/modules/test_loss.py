"""Losses and log-probabilities, in chunks too, equal those of all logits in value and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from archs import tiny_arch
from torch import Tensor, nn

from qlora_builders.models import llama
from qlora_builders.modules import (
    IGNORE_INDEX,
    FrozenNF4Linear,
    Linear,
    LoRALinear,
    adapters_disabled,
    chunked_next_token_loss,
    log_probabilities,
    loss,
    next_token_loss,
    num_target_tokens,
    sequence_log_probs,
)

HIDDEN, VOCAB, BATCH, SEQ = 48, 37, 3, 11
WEIGHTS = torch.tensor([0.7, -2.0, 1.3])  # another factor for each sequence's gradient


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
    """Six targets in the first row, none in the second, ten in the third."""
    labels = torch.randint(VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(2))
    labels[0, :5] = IGNORE_INDEX
    labels[1] = IGNORE_INDEX
    return labels


def make_hidden() -> Tensor:
    return torch.randn(BATCH, SEQ, HIDDEN, generator=torch.Generator().manual_seed(0))


NO_TARGETS = torch.full((BATCH, SEQ), IGNORE_INDEX)


def picked_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(next token | tokens before), zero where not trained: [b, s - 1]."""
    logs, targets = logits[:, :-1].float().log_softmax(-1), labels[:, 1:]
    picked = logs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return picked * (targets != IGNORE_INDEX)


# (hidden, labels, head) -> value: in chunks, and from all logits
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "loss": (
        lambda hidden, labels, head: chunked_next_token_loss(hidden, labels, head) / 7,
        lambda hidden, labels, head: next_token_loss(head(hidden), labels) / 7,
    ),
    "log_probs": (
        sequence_log_probs,
        lambda hidden, labels, head: picked_log_probs(head(hidden), labels).sum(-1),
    ),
}
either = pytest.mark.parametrize("name", FUNCTIONS)
any_head = pytest.mark.parametrize("head_name", HEADS)


def value_and_gradients(
    function: Callable[..., Tensor], hidden: Tensor, labels: Tensor, head: nn.Module
) -> tuple[Tensor, dict[str, Tensor | None]]:
    head.zero_grad()
    leaf = hidden.clone().requires_grad_()
    value = function(leaf, labels, head)
    (value @ WEIGHTS if value.dim() else value).backward()
    return value.detach(), {"hidden": leaf.grad, **{n: p.grad for n, p in head.named_parameters()}}


# ---- the loss of given logits -------------------------------------------------------------------


def test_the_loss_is_that_of_transformers() -> None:
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels = torch.randn(BATCH, SEQ, VOCAB), make_labels()
    expected = loss_utils.ForCausalLMLoss(logits, labels, vocab_size=VOCAB)
    got = next_token_loss(logits, labels) / num_target_tokens(labels)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_the_loss_is_minus_the_log_probabilities_of_targets_however_it_is_split() -> None:
    logits, labels = torch.randn(BATCH, SEQ, VOCAB), make_labels()
    value = next_token_loss(logits, labels)
    torch.testing.assert_close(value, -picked_log_probs(logits, labels).sum())
    rows = [(logits[i : i + 1], labels[i : i + 1]) for i in range(BATCH)]
    torch.testing.assert_close(sum(next_token_loss(*row) for row in rows), value)
    assert [num_target_tokens(row) for _, row in rows] == [6, 0, 10]
    assert num_target_tokens(labels) == 16


def test_the_first_token_has_nothing_before_it() -> None:
    labels = NO_TARGETS.clone()
    labels[:, 0] = 1
    assert num_target_tokens(labels) == 0
    assert next_token_loss(torch.randn(BATCH, SEQ, VOCAB), labels) == 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = torch.randn(BATCH, SEQ, VOCAB).bfloat16(), make_labels()
    value = next_token_loss(logits, labels)
    assert value.dtype == torch.float32
    assert torch.equal(value, next_token_loss(logits.float(), labels))


# ---- in chunks ----------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 25])
@any_head
def test_chunks_equal_all_logits(
    name: str, head_name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(loss, "_BLOCK_ELEMENTS", 2 * VOCAB)
    torch.manual_seed(0)
    arguments = make_hidden(), make_labels(), HEADS[head_name]()
    in_chunks, of_all = FUNCTIONS[name]
    value, grads = value_and_gradients(in_chunks, *arguments)
    expected, expected_grads = value_and_gradients(of_all, *arguments)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert value.dim() == 0 or value[1] == 0  # it has no target
    assert grads.keys() == expected_grads.keys()
    for parameter, grad in expected_grads.items():
        torch.testing.assert_close(grads[parameter], grad, rtol=1e-5, atol=2e-6, msg=parameter)


@any_head
def test_bfloat16_hidden_states(head_name: str) -> None:
    torch.manual_seed(0)
    arguments = make_hidden().bfloat16(), make_labels(), HEADS[head_name]()
    in_chunks, of_all = FUNCTIONS["loss"]
    value, grads = value_and_gradients(in_chunks, *arguments)
    expected, expected_grads = value_and_gradients(of_all, *arguments)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert value.dtype == torch.float32
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=2e-2, atol=2e-3, msg=name)


@either
@any_head
def test_without_targets_value_and_gradients_are_zero(name: str, head_name: str) -> None:
    """A rank without rows takes part in backward all the same."""
    for function in FUNCTIONS[name]:
        value, grads = value_and_gradients(function, make_hidden(), NO_TARGETS, HEADS[head_name]())
        assert not value.any()
        assert grads["hidden"] is not None
        assert not any(grad.any() for grad in grads.values() if grad is not None)


def test_only_rows_with_a_target_reach_the_head_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What waits for backward is never [tokens, vocab]; log-probabilities run the head again."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", 5 * VOCAB)
    seen: list[int] = []
    sizes: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    )
    head = Linear(HIDDEN, VOCAB).requires_grad_(False)
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for name, runs in (("loss", 1), ("log_probs", 2)):
        seen.clear()
        sizes.clear()  # of the loss: what its own graph keeps ends with it
        with keep:
            value = FUNCTIONS[name][0](make_hidden().requires_grad_(), make_labels(), head)
        assert sum(seen) == 16
        assert max(seen) <= 5
        value.sum().backward()
        assert sum(seen) == 16 * runs
    assert all(size % VOCAB for size in sizes if size), "logits were kept"


def test_without_gradients_nothing_is_kept() -> None:
    head, labels = Linear(HIDDEN, VOCAB), make_labels()
    with torch.no_grad():
        value = chunked_next_token_loss(make_hidden().requires_grad_(), labels, head)
    assert not value.requires_grad
    torch.testing.assert_close(value, next_token_loss(head(make_hidden()), labels).detach())


def test_a_second_backward_is_refused() -> None:
    hidden = make_hidden().requires_grad_()
    value = chunked_next_token_loss(hidden, make_labels(), Linear(HIDDEN, VOCAB))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward only"):
        value.backward()


def test_values_that_are_not_finite_show_in_the_loss() -> None:
    hidden = make_hidden()
    hidden[2, 4, 0] = torch.inf
    assert not chunked_next_token_loss(hidden, make_labels(), Linear(HIDDEN, VOCAB)).isfinite()


@pytest.mark.parametrize("train", [(), ("embed_tokens",)])
def test_a_tied_head_and_its_embedding_get_one_gradient(train: tuple[str, ...]) -> None:
    plan = [{"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}]
    if train:
        plan.append({"match": "lm_head", "kind": "linear", "trainable": True})
    torch.manual_seed(0)
    arch = tiny_arch(vocab_size=VOCAB, tie_word_embeddings=True)
    model = llama(arch, plan, train=train, dtype=torch.float32)
    labels = make_labels()
    ids = labels.clamp(min=0)
    (value, grads), (expected, expected_grads) = (
        value_and_gradients(function, make_hidden(), labels, model)
        for function in (
            lambda _, labels, model: model.loss(ids, labels),
            lambda _, labels, model: next_token_loss(model(ids), labels),
        )
    )
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert (grads["model.embed_tokens.weight"] is not None) is bool(train)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_head_with_dropout_drops_the_same_in_backward() -> None:
    """The gradient of a linear function says which inputs were dropped."""
    torch.manual_seed(0)
    head = LoRALinear(HIDDEN, VOCAB, 4, 8.0, dropout=0.5)
    nn.init.normal_(head.lora_B.weight)
    hidden, labels = torch.randn(1, 2, HIDDEN), torch.tensor([[0, 3]])
    torch.manual_seed(1)
    leaf = hidden.clone().requires_grad_()
    sequence_log_probs(leaf, labels, head).sum().backward()
    torch.manual_seed(1)
    expected = hidden[:, 0].clone().requires_grad_()
    head(expected).log_softmax(-1)[0, 3].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, 0], expected.grad)


@pytest.mark.parametrize(
    "options", [{"lora_bias": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_adapters_are_off_inside_and_as_before_after(options: dict[str, Any]) -> None:
    layers = nn.ModuleList([LoRALinear(6, 5, 2, 4.0, bias=True, **options) for _ in range(2)])
    for layer in layers:
        for parameter in layer.lora_B.parameters():
            nn.init.normal_(parameter)
    layers[1].adapter_enabled = False
    x = torch.randn(3, 6)
    base = nn.functional.linear(x, layers[0].weight, layers[0].bias)
    assert not torch.equal(layers[0](x), base)

    def fail_inside() -> None:
        with adapters_disabled(layers):
            assert torch.equal(layers[0](x), base)
            with adapters_disabled(layers):
                pass
            assert torch.equal(layers[0](x), base)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [layer.adapter_enabled for layer in layers] == [True, False]
    assert not torch.equal(layers[0](x), base)


@pytest.mark.parametrize("shift", [0.0, 200.0])
def test_log_probabilities_are_those_of_every_row(shift: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 30)
    with torch.no_grad():
        head.bias += shift  # too large for exp in float32, and no other distribution
    rows = torch.randn(7, 8)
    expected = head(rows).log_softmax(-1)
    torch.testing.assert_close(torch.cat([*log_probabilities(head, rows)]), expected)
    labels = torch.randint(30, (1, 7))
    value = chunked_next_token_loss(rows[None], labels, head)
    targets = labels[0, 1:, None]
    wanted = -expected[:-1].gather(1, targets).sum()
    torch.testing.assert_close(value, wanted)
    (gradient,) = torch.autograd.grad(value, head.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, head.weight)[0])
