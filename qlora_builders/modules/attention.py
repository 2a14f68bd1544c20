"""Causal self-attention with grouped key/value heads (https://arxiv.org/abs/2305.13245), in a
window where a layer has one, and the keys and values of positions decoded before.

Packed rows attend inside their documents, at the cost of the documents and not of the rows. A
document is a run of equal `document_ids` in a row. CPUs call the flash kernel once per document,
behind an op of our own, so that a compiled layer serves any number of documents. GPUs get a block
mask for FlexAttention (https://arxiv.org/abs/2412.05496), which skips blocks without a pair to
attend. Where neither serves (attention dropout, other devices) there is the dense mask.

Shapes: b = batch, s = query positions, k = key positions (s without a cache), h = num_heads,
g = num_kv_heads, d = head_dim, m = max_seq_len, n = documents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from qlora_builders.modules.rope import apply_rope

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Documents(NamedTuple):
    """Which tokens of a batch belong together; made once per batch, used by every layer."""

    runs: Tensor  # [b, s], equal in one document
    borders: Tensor | None = None  # [n, 3] int64: row, first position, end; on CPUs
    block_mask: BlockMask | None = None  # on GPUs

    window: int | None = None

    def dense_mask(self) -> Tensor:
        """bool [b, 1, s, s], True where attention is allowed."""
        allowed = (self.runs[:, :, None] == self.runs[:, None, :]).tril()
        if self.window is not None:
            allowed = allowed.triu(1 - self.window)
        return allowed[:, None]


def find_documents(document_ids: Tensor, window: int | None = None) -> Documents:
    """[b, s] ids -> where documents begin and end.

    Args:
        window: positions that a token sees, with its own; None: all.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    runs = starts.cumsum(1)
    if document_ids.is_cpu:
        first = starts.nonzero()  # [n, 2], row by row
        end = torch.full_like(first[:, :1], document_ids.shape[1])
        same_row = first[1:, 0] == first[:-1, 0]
        end[:-1, 0] = torch.where(same_row, first[1:, 1], end[:-1, 0])
        if window is not None and bool((end[:, 0] - first[:, 1] > window).any()):
            return Documents(runs, window=window)
        return Documents(runs, borders=torch.cat([first, end], dim=1))
    if document_ids.is_cuda:
        return Documents(runs, block_mask=make_block_mask(runs, window), window=window)
    return Documents(runs, window=window)


def attend_in_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None = None
) -> Tensor | None:
    """Causal attention of q [b, h, s, d] to k, v [b, g, s, d]; None where only a mask serves."""
    if documents.borders is not None:
        return DOCUMENT_ATTENTION(q, k, v, documents.borders, scale)[0]
    if documents.block_mask is not None and q.shape[-1] in (16, 32, 64, 128, 256):
        compiling = torch.compiler.is_compiling()
        flex: Callable[..., Tensor] = flex_attention if compiling else _compiled_flex_attention()  # type: ignore[assignment]
        return flex(q, k, v, block_mask=documents.block_mask, scale=scale, enable_gqa=True)
    return None


def make_block_mask(runs: Tensor, window: int | None = None) -> BlockMask:
    """Causal inside runs [b, s], and in the window."""

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= k) & (runs[b, q] == runs[b, k])
        return seen if window is None else seen & (q - k < window)

    rows, length = runs.shape
    return create_block_mask(allowed, rows, None, length, length, device=str(runs.device))


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


# ---- the op for CPUs ----------------------------------------------------------------------------


@torch.library.custom_op("qlora_builders::document_attention", mutates_args=(), device_types="cpu")
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(attention [b, h, s, d], log-sum-exp [b, h, s]) of every document by itself."""
    output, logsumexp = _document_attention_fake(q, k, v, borders, scale)
    for document, keys, values in _each(borders, k, v, q.shape[1]):
        output[document], logsumexp[document] = _flash(
            q[document], keys, values, is_causal=True, scale=scale
        )
    return output, logsumexp


@document_attention.register_fake
def _document_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    b, h, s, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(b, s, h, d).transpose(1, 2), q.new_empty(b, h, s, dtype=wide)


@torch.library.custom_op(
    "qlora_builders::document_attention_backward", mutates_args=(), device_types="cpu"
)
def _document_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    borders: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _backward_fake(grad, q, k, v)
    for document, keys, values in _each(borders, k, v, q.shape[1]):
        grad_out, own_q, own_out = grad[document], q[document], out[document]
        sums = logsumexp[document]
        parts = _flash_backward(
            grad_out, own_q, keys, values, own_out, sums, 0.0, is_causal=True, scale=scale
        )
        for total, part in zip(grads, parts, strict=True):
            total[document] = part.unflatten(1, (total.shape[1], -1)).sum(2)
    return grads


@_document_attention_backward.register_fake
def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (tensor.transpose(1, 2).shape for tensor in (q, k, v))  # memory as [b, s, h, d]
    grad_q, grad_k, grad_v = (q.new_empty(shape).transpose(1, 2) for shape in shapes)
    return grad_q, grad_k, grad_v


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, borders, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, borders)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_document_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


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


# bool [b, 1, s, k], True where attention is allowed; the documents of packed rows; None is causal
# for s = k and everything for s = 1
Mask = Tensor | Documents | None


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Every stretch of x [..., n * width] that is as long as the norm's weight by itself."""
    weight = cast(Tensor, norm.weight)
    return norm(x.unflatten(-1, (-1, len(weight)))).flatten(-2)


class Attention(nn.Module):
    """softmax(q k^T * scale) v over finished projections.

    Args:
        q_proj: [b, s, hidden] -> [b, s, h * d]; o_proj the reverse.
        k_proj, v_proj: [b, s, hidden] -> [b, s, g * d].
        q_norm, k_norm: before rotating, of each head [..., d] or of all at once; None: none.
        num_heads: query heads; each kv head serves num_heads / num_kv_heads of them.
        layer: index of this layer in a KV cache.
        scale: of the logits; None: 1 / sqrt(d).
        use_rope: rotate queries and keys.
        window: positions that a token sees, with its own; None: all. `Decoder` makes the mask.
        attention_dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        *,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        o_proj: nn.Module,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        scale: float | None = None,
        use_rope: bool = True,
        window: int | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.o_proj = o_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.layer = layer
        self.scale = scale
        self.use_rope = use_rope
        self.window = window
        self.attention_dropout = attention_dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x [b, s, hidden]; cos, sin [b, 1, s, d]. x's positions are appended to the cache's."""
        b, s, _ = x.shape
        q, k = self.q_proj(x), self.k_proj(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        q = q.view(b, s, self.num_heads, self.head_dim).transpose(1, 2)  # [b, h, s, d]
        k = k.view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.use_rope:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [b, g, k, d]
        output = self._attend(q, k, v, mask, causal=mask is None and (cache is None or s > 1))
        return self.o_proj(output.transpose(1, 2).reshape(b, s, self.num_heads * self.head_dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, causal: bool) -> Tensor:
        """[b, h, s, d]"""
        dropout = self.attention_dropout if self.training else 0.0
        if isinstance(mask, Documents):
            output = attend_in_documents(q, k, v, mask, self.scale) if dropout == 0 else None
            if output is not None:
                return output
            mask = mask.dense_mask()
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )


# ---- positions decoded before -------------------------------------------------------------------


class KVCache:
    """One preallocated [b, g, m, d] pair per layer; every forward appends s positions to each.

    After `start_rows` each row has a length of its own, and every forward appends one position. The
    shapes are then the same at every step, which can be compiled, or replayed as a CUDA graph.

    Attributes:
        length: positions that every layer holds; of the longest row.
        rows: [b], the number of positions that each row holds; None while it is `length` for all.

    Raises:
        ValueError: when more than `max_seq_len` positions are written.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (num_layers, 2, batch_size, num_kv_heads, max_seq_len, head_dim)
        self.tensor = torch.zeros(shape, device=device, dtype=dtype)
        self.max_seq_len = max_seq_len
        self.length = 0
        self.rows: Tensor | None = None

    def start_rows(self, lengths: Sequence[int]) -> None:
        """From now on row i goes on at position lengths[i]; what it held from there is dropped.

        The host does not follow the rows: at most `max_seq_len - max(lengths)` more positions may
        be written.
        """
        self.rows = torch.tensor(lengths, device=self.tensor.device)
        if self.tensor.is_cuda:
            for tensor in (self.tensor, self.rows):  # CUDA graphs may write to them
                torch._dynamo.mark_static_address(tensor)

    def row_mask(self, window: int | None = None) -> Tensor:
        """bool [b, 1, 1, m]: what the one new position of each row may attend to."""
        assert self.rows is not None
        index = torch.arange(self.max_seq_len, device=self.rows.device)
        allowed = index <= self.rows[:, None]
        if window is not None:
            allowed &= index > self.rows[:, None] - window
        return allowed[:, None, None]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [b, g, s, d] at the end of `layer`; returns all its keys and values so far."""
        keys, values = self.tensor[layer]
        if self.rows is not None:
            batch = torch.arange(len(self.rows), device=self.rows.device)
            keys[batch, :, self.rows] = key[:, :, 0]
            values[batch, :, self.rows] = value[:, :, 0]
            return keys, values  # row_mask hides the rest
        end = self.length + key.shape[2]
        if end > self.max_seq_len:
            raise ValueError(
                f"the KV cache holds {self.max_seq_len} positions, but {end} are needed; "
                "make it larger (max_seq_len) or generate fewer tokens"
            )
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Called once per forward, after every layer has written."""
        if self.rows is not None:
            self.rows += num_positions
        else:
            self.length += num_positions
