"""Attention inside the documents of packed rows, at the cost of the documents and not of the rows.

A document is a run of equal `document_ids` in a row. CPUs call the flash kernel once per document,
behind an op of our own, so that a compiled layer serves any number of documents. GPUs get a block
mask for FlexAttention (https://arxiv.org/abs/2412.05496), which skips blocks without a pair to
attend. Where neither serves (attention dropout, other devices) there is the dense mask.

Shapes: b = batch, s = sequence, h = query heads, g = kv heads, d = head_dim, n = documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Documents(NamedTuple):
    """Which tokens of a batch belong together; made once per batch, used by every layer."""

    runs: Tensor  # [b, s], equal in one document
    borders: Tensor | None = None  # [n, 3] int64: row, first position, end; on CPUs
    block_mask: BlockMask | None = None  # on GPUs

    def dense_mask(self) -> Tensor:
        """bool [b, 1, s, s], True where attention is allowed."""
        same = self.runs[:, :, None] == self.runs[:, None, :]
        return same.tril()[:, None]


def find_documents(document_ids: Tensor) -> Documents:
    """[b, s] ids -> where documents begin and end."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    runs = starts.cumsum(1)
    if document_ids.is_cpu:
        first = starts.nonzero()  # [n, 2], row by row
        end = torch.full_like(first[:, :1], document_ids.shape[1])
        same_row = first[1:, 0] == first[:-1, 0]
        end[:-1, 0] = torch.where(same_row, first[1:, 1], end[:-1, 0])
        return Documents(runs, borders=torch.cat([first, end], dim=1))
    if document_ids.is_cuda:
        return Documents(runs, block_mask=make_block_mask(runs))
    return Documents(runs)


def attend_in_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor | None:
    """Causal attention of q [b, h, s, d] to k, v [b, g, s, d]; None where only a mask serves."""
    if documents.borders is not None:
        return DOCUMENT_ATTENTION(q, k, v, documents.borders)[0]
    if documents.block_mask is not None and q.shape[-1] in (16, 32, 64, 128, 256):
        compiling = torch.compiler.is_compiling()
        flex: Callable[..., Tensor] = flex_attention if compiling else _compiled_flex_attention()  # type: ignore[assignment]
        return flex(q, k, v, block_mask=documents.block_mask, enable_gqa=True)
    return None


def make_block_mask(runs: Tensor) -> BlockMask:
    """Causal inside runs [b, s]."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (runs[b, q] == runs[b, k])

    rows, length = runs.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(runs.device))


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


# ---- the op for CPUs ----------------------------------------------------------------------------


@torch.library.custom_op("qlora_builders::document_attention", mutates_args=(), device_types="cpu")
def document_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """(attention [b, h, s, d], log-sum-exp [b, h, s]) of every document by itself."""
    output, logsumexp = _document_attention_fake(q, k, v, borders)
    for document, keys, values in _each(borders, k, v, q.shape[1]):
        output[document], logsumexp[document] = _flash(q[document], keys, values, is_causal=True)
    return output, logsumexp


@document_attention.register_fake
def _document_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor]:
    b, h, s, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(b, s, h, d).transpose(1, 2), q.new_empty(b, h, s, dtype=wide)


@torch.library.custom_op(
    "qlora_builders::document_attention_backward", mutates_args=(), device_types="cpu"
)
def _document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(grad, q, k, v, out, logsumexp, borders)
    for document, keys, values in _each(borders, k, v, q.shape[1]):
        grad_out, own_q, own_out = grad[document], q[document], out[document]
        parts = _flash_backward(
            grad_out, own_q, keys, values, own_out, logsumexp[document], 0.0, is_causal=True
        )
        for total, part in zip(grads, parts, strict=True):
            total[document] = part.unflatten(1, (total.shape[1], -1)).sum(2)
    return grads


@_document_attention_backward.register_fake
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tensor.transpose(1, 2).shape for tensor in (q, k, v))  # memory as [b, s, h, d]
    grad_q, grad_k, grad_v = (q.new_empty(shape).transpose(1, 2) for shape in shapes)
    return grad_q, grad_k, grad_v


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders = inputs
    ctx.save_for_backward(q, k, v, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_document_attention_backward(grad, *ctx.saved_tensors), None


document_attention.register_autograd(_backward, setup_context=_keep_for_backward)
DOCUMENT_ATTENTION = torch.ops.qlora_builders.document_attention.default


def _each(
    borders: Tensor, k: Tensor, v: Tensor, num_heads: int
) -> Iterator[tuple[tuple[slice, ...], Tensor, Tensor]]:
    """What picks each document out of [b, heads, s, ...]; and its k and v, repeated for all heads
    [1, num_heads, t, d], because every kv head serves as many query heads."""
    repeats = num_heads // k.shape[1]
    for row, start, end in borders.tolist():
        document = slice(row, row + 1), slice(None), slice(start, end)
        keys, values = (t[document].repeat_interleave(repeats, dim=1) for t in (k, v))
        yield document, keys, values
