"""Causal self-attention with grouped key/value heads (https://arxiv.org/abs/2305.13245).

Shapes: b = batch, s = query positions, k = key positions (s without a cache), h = num_heads,
g = num_kv_heads, d = head_dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.modules.documents import Documents, attend_in_documents
from qlora_builders.modules.kv_cache import KVCache
from qlora_builders.modules.rope import apply_rope


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over finished projections.

    Args:
        q_proj: [b, s, hidden] -> [b, s, h * d].
        k_proj: [b, s, hidden] -> [b, s, g * d].
        v_proj: as k_proj.
        o_proj: [b, s, h * d] -> [b, s, hidden].
        num_heads: query heads; a multiple of num_kv_heads.
        num_kv_heads: key/value heads, each shared by num_heads / num_kv_heads query heads.
        head_dim: size of one head.
        layer: index of this layer in a KV cache.
        attention_dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        *,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        o_proj: nn.Module,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.o_proj = o_proj
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.layer = layer
        self.attention_dropout = attention_dropout

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        mask: Tensor | Documents | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """
        Args:
            x: [b, s, hidden].
            cos: [b, 1, s, d], and sin likewise.
            mask: bool [b, 1, s, k], True where attention is allowed; the documents of packed rows;
                None is causal for s = k and everything for s = 1.
            cache: holds the positions before x; x's are appended.
        """
        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, self.num_heads, self.head_dim).transpose(1, 2)  # [b, h, s, d]
        k = self.k_proj(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, s, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # [b, g, k, d]
        output = self._attend(q, k, v, mask, causal=mask is None and (cache is None or s > 1))
        return self.o_proj(output.transpose(1, 2).reshape(b, s, self.num_heads * self.head_dim))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None, *, causal: bool
    ) -> Tensor:
        """[b, h, s, d]"""
        dropout = self.attention_dropout if self.training else 0.0
        if isinstance(mask, Documents):
            output = attend_in_documents(q, k, v, mask) if dropout == 0 else None
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
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
