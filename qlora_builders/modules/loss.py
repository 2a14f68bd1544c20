"""Next-token cross-entropy, as a sum and a count so that any split of a step adds up.

Shapes: b = batch, s = sequence, n = positions that predict a trained token, c = chunk of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.errors import TrainingError
from qlora_builders.modules.layers import run_checkpointed

IGNORE_INDEX = -100  # label of a token that is not trained on

# Logits held at once: 128 MiB in float32. Fewer would cast or decode the head's weight more often.
_CHUNK_ELEMENTS = 1 << 25
# Logits normalized at once on CPUs: 4 MiB stay in cache between the passes over them.
_BLOCK_ELEMENTS = 1 << 20


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over trained tokens of -log p(token | tokens before), in float32.

    Args:
        logits: [b, s, vocab]; position t predicts token t + 1.
        labels: [b, s], the token ids with `IGNORE_INDEX` where not trained.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def num_target_tokens(labels: Tensor) -> int:
    """Tokens that `next_token_loss` sums over; the first of a sequence has nothing before it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def sequence_log_probs(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """log p(trained tokens | tokens before) of each sequence, float32 [b], for any loss of them.

    The logits of a chunk of positions are there at a time. What its gradient is multiplied with is
    not known before backward, so that runs the head again.

    The arguments are those of `chunked_next_token_loss`.
    """
    rows, targets, positions = trained_rows(hidden, labels)

    def log_probs(rows: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head(rows).float(), targets, reduction="none")  # [c]

    chunks = _chunks(rows, targets, head)
    parts = [run_checkpointed("full", log_probs, *chunk) for chunk in chunks]
    sequences = positions // (labels.shape[1] - 1)  # [n]
    sums = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
    return sums.index_add(0, sequences, torch.cat(parts))


def trained_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The hidden states [n, hidden] that predict a trained token, that token, their positions in
    hidden[:, :-1]."""
    targets = labels[:, 1:].flatten()
    positions = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # [n]
    targets = targets[positions]
    rows = hidden[:, :-1].flatten(0, 1)
    if len(positions) < len(rows):
        rows = rows.index_select(0, positions)  # [n, hidden]
    return rows, targets, positions


def _chunks(rows: Tensor, targets: Tensor, head: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """A few rows and their targets at a time; one chunk if there are none."""
    count = max(1, -(-len(rows) * cast(int, head.out_features) // _CHUNK_ELEMENTS))
    return zip(rows.chunk(count), targets.chunk(count), strict=True)


def chunked_next_token_loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """`next_token_loss(head(hidden), labels)` without the logits of all tokens at once.

    Positions that predict no trained token never reach the head. The others do so in chunks, and
    each chunk's gradients are computed while its logits are there: the head runs once forward and
    once backward, and what waits for backward is the gradient of the hidden states.

    Args:
        hidden: [b, s, hidden], the final hidden states.
        labels: [b, s], the token ids with `IGNORE_INDEX` where not trained.
        head: [c, hidden] -> logits [c, vocab], of any kind with `out_features`; those of its
            parameters that train get their gradients.
    """
    rows, targets, _ = trained_rows(hidden, labels)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (rows.requires_grad or trained):
        return _ChunkedLoss.apply(head, targets, rows, *trained)
    return _loss_and_grads(head, targets, rows, [])[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets: Tensor, rows: Tensor, *trained: Tensor
    ) -> Tensor:
        inputs = [tensor for tensor in (rows, *trained) if tensor.requires_grad]
        loss, ctx.grads = _loss_and_grads(head, targets, rows, inputs)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("chunked_next_token_loss keeps its gradients for one backward only")
        torch._foreach_mul_(ctx.grads, grad)
        grads, ctx.grads = iter(ctx.grads), None
        return None, None, *(next(grads) if needed else None for needed in ctx.needs_input_grad[2:])


def _loss_and_grads(
    head: nn.Module, targets: Tensor, rows: Tensor, inputs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients with respect to `inputs`: `rows` or parameters of the head."""
    loss = torch.zeros((), dtype=torch.float32, device=rows.device)
    grads = [torch.zeros_like(tensor) for tensor in inputs]
    if len(rows) == 0:
        return loss, grads
    start = 0
    for chunk, chunk_targets in _chunks(rows, targets, head):
        leaf = chunk.detach().requires_grad_(rows.requires_grad)
        with torch.set_grad_enabled(bool(inputs)):
            logits = head(leaf)  # [c, vocab]
        grad_logits = logits.detach().float()
        loss += _cross_entropy_(grad_logits, chunk_targets)
        if inputs:
            leaves = [leaf if tensor is rows else tensor for tensor in inputs]
            new = torch.autograd.grad(logits, leaves, grad_logits.to(logits.dtype))
            for tensor, total, grad in zip(inputs, grads, new, strict=True):
                part = total[start : start + len(chunk)] if tensor is rows else total
                part += grad
        start += len(chunk)
    return loss, grads


def _cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[targets]; overwrites float32 logits [c, vocab] by its gradient.

    No head needs the values of its logits for its own backward; autograd would notice.
    """
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    block = max(1, _BLOCK_ELEMENTS // logits.shape[1]) if logits.is_cpu else len(logits)
    for p, target in zip(logits.split(block), targets[:, None].split(block), strict=True):
        p -= p.amax(1, keepdim=True)
        loss -= p.gather(1, target).sum()
        p.exp_()
        sums = p.sum(1, keepdim=True)
        loss += sums.log().sum()
        p /= sums
        p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
    return loss


@torch.no_grad()
def log_probabilities(head: nn.Module, rows: Tensor) -> Iterator[Tensor]:
    """Of the next token, float32 [c, vocab] for a few rows [c, hidden] at a time.

    Raises:
        TrainingError: if one is not a number.
    """
    count = max(1, _CHUNK_ELEMENTS // cast(int, head.out_features))
    for chunk in rows.split(count) if len(rows) else ():
        log_probs = head(chunk).float().log_softmax(-1)
        if log_probs.isnan().any():
            raise TrainingError(
                "the model's predictions are not numbers: its weights are damaged, or compute_dtype"
                " is too narrow for it; try float32"
            )
        yield log_probs
