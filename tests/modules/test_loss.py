"""The loss against transformers' formula, and as a sum that any split adds up to."""

from __future__ import annotations

import pytest
import torch

from qlora_builders.modules import IGNORE_INDEX, next_token_loss, num_target_tokens


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator).to(dtype)
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[0, :4] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    return logits, labels


def test_equals_transformers() -> None:
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels = batch()
    expected = loss_utils.ForCausalLMLoss(logits, labels, vocab_size=11)
    got = next_token_loss(logits, labels) / num_target_tokens(labels)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_is_minus_the_log_probability_of_the_next_token() -> None:
    logits, labels = batch()
    log_probabilities = logits.log_softmax(-1)
    expected, count = 0.0, 0
    for row in range(3):
        for t in range(1, 7):
            if labels[row, t] != IGNORE_INDEX:
                expected -= float(log_probabilities[row, t - 1, labels[row, t]])
                count += 1
    assert num_target_tokens(labels) == count == 9
    assert float(next_token_loss(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_the_sum_does_not_depend_on_the_split() -> None:
    logits, labels = batch()
    parts = sum(next_token_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(3))
    torch.testing.assert_close(parts, next_token_loss(logits, labels))
    assert sum(num_target_tokens(labels[i : i + 1]) for i in range(3)) == num_target_tokens(labels)


def test_a_batch_without_targets_is_zero_with_zero_gradient() -> None:
    logits, labels = batch()
    logits.requires_grad_()
    loss = next_token_loss(logits, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert num_target_tokens(torch.full_like(labels, IGNORE_INDEX)) == 0


def test_the_first_token_has_nothing_before_it() -> None:
    logits, _ = batch()
    labels = torch.full((3, 7), IGNORE_INDEX)
    labels[:, 0] = 1
    assert num_target_tokens(labels) == 0
    assert next_token_loss(logits, labels) == 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = batch(torch.bfloat16)
    loss = next_token_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, next_token_loss(logits.float(), labels))
