"""Log-probabilities in chunks equal those of all logits, in value and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_chunked_loss import BATCH, HEADS, HIDDEN, SEQ, VOCAB, make_labels
from torch import Tensor, nn

from qlora_builders.modules import (
    IGNORE_INDEX,
    Linear,
    LoRALinear,
    adapters_disabled,
    loss,
    sequence_log_probs,
)

WEIGHTS = torch.tensor([0.7, -2.0, 1.3])  # another factor for each sequence's gradient


def dense_log_probs(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """All logits, softmax and gather: [b]."""
    logs = head(hidden)[:, :-1].float().log_softmax(-1)  # [b, s - 1, vocab]
    targets = labels[:, 1:]
    picked = logs.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return (picked * (targets != IGNORE_INDEX)).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 25])
@pytest.mark.parametrize("head_name", HEADS)
def test_equals_all_logits(head_name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    head, hidden, labels = HEADS[head_name](), torch.randn(BATCH, SEQ, HIDDEN), make_labels()
    results = []
    for function in (sequence_log_probs, dense_log_probs):
        head.zero_grad()
        leaf = hidden.clone().requires_grad_()
        values = function(leaf, labels, head)
        (values @ WEIGHTS).backward()
        grads = {n: p.grad for n, p in head.named_parameters()}
        results.append((values.detach(), {"hidden": leaf.grad, **grads}))
    (values, grads), (expected, expected_grads) = results
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    assert values[1] == 0  # it has no target
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("head_name", HEADS)
def test_without_targets_gradients_are_zero(head_name: str) -> None:
    """A rank without rows takes part in backward all the same."""
    head = HEADS[head_name]()
    hidden = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
    values = sequence_log_probs(hidden, torch.full((BATCH, SEQ), IGNORE_INDEX), head)
    assert values.tolist() == [0.0] * BATCH
    values.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_the_logits_of_a_chunk_are_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; what waits between them is not [tokens, vocab]."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", 5 * VOCAB)
    head, labels = Linear(HIDDEN, VOCAB).requires_grad_(False), make_labels()
    seen: list[int] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    sizes: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor,
        lambda tensor: tensor,
    )
    with keep:
        hidden = torch.randn(BATCH, SEQ, HIDDEN, requires_grad=True)
        values = sequence_log_probs(hidden, labels, head)
    assert sum(seen) == 16
    assert max(seen) <= 5
    assert all(size % VOCAB for size in sizes if size), "logits were kept"
    values.sum().backward()
    assert sum(seen) == 32


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
