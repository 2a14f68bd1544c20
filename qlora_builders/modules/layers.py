"""A decoder layer, what it has besides attention ([b, s, hidden] -> [b, s, hidden]), and trained
rows of the embedding.

A few rows of the embedding, those of new tokens, train in memory for those rows alone: float32
parameters of their own that stand in for the embedding's, which stays frozen and as it was. Where
head and embedding are one weight, both use the same rows. The names of the module and its parameter
are PEFT's.

Activation checkpointing (https://arxiv.org/abs/1604.06174) is what a layer keeps for backward:

none       everything autograd asks for
selective  the layer's input and the attention's output; the rest is computed again
full       the layer's input
offload    as full, with the input in pinned host memory until backward

Shapes: b = batch, s = sequence, n = trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qlora_builders.modules.attention import DOCUMENT_ATTENTION, KVCache, Mask
from qlora_builders.modules.linear import Linear
from qlora_builders.tensor import linear

aten = torch.ops.aten
_KEPT_OPS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    DOCUMENT_ATTENTION,
}


def run_checkpointed(mode: str, function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """`function(x, *args)`, keeping for backward what `mode` says; "offload" is as "full" here."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(x, *args)
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(function, x, *args, use_reentrant=False, context_fn=contexts)
    return checkpoint(function, x, *args, use_reentrant=False)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT_OPS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def input_on_host(x: Tensor) -> Iterator[None]:
    """Where backward asks for `x`, it is kept in host memory: around a layer that keeps its input.

    Copies run in the order of the stream, so neither direction has to wait for the host.
    """
    pointer, shape = x.data_ptr(), x.shape  # the hooks live as long as the graph: not x itself

    def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if saved.data_ptr() != pointer or saved.shape != shape:
            return saved  # shared by all layers, or a parameter
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        return saved.device, host.copy_(saved, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with saved_tensors_hooks(pack, unpack):
        yield


Activation = Callable[[Tensor], Tensor]
_gelu_tanh = partial(F.gelu, approximate="tanh")
# Hugging Face's names for `hidden_act`: those that are functions of torch
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class DecoderLayer(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x)); each addend times `residual_multiplier`.

    With a `post_feedforward_layernorm` instead of an `input_layernorm` the norms come after:
    x + norm(self_attn(x)), then x + norm(mlp(x)).
    """

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module | None = None,
        post_attention_layernorm: nn.Module,
        post_feedforward_layernorm: nn.Module | None = None,
        residual_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        self.post_feedforward_layernorm = post_feedforward_layernorm
        self.residual_multiplier = residual_multiplier

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        cache: KVCache | None,
        checkpointing: str = "none",
    ) -> Tensor:
        return run_checkpointed(checkpointing, self._forward, x, cos, sin, mask, cache)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None
    ) -> Tensor:
        if self.input_layernorm is None:
            assert self.post_feedforward_layernorm is not None
            attended = self.self_attn(x, cos, sin, mask=mask, cache=cache)
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(x))
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask=mask, cache=cache)
        x = x + scaled(attended, self.residual_multiplier)
        return x + scaled(self.mlp(self.post_attention_layernorm(x)), self.residual_multiplier)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x * factor; x itself for the factor of nearly every model."""
    return x if factor == 1 else x * factor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (https://arxiv.org/abs/1910.07467), statistics in float32.

    The normalized value is rounded to the input's dtype before the weight multiplies, as
    transformers does it, so bfloat16 results agree bit for bit.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normalized.to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"


class FeedForward(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)) (https://arxiv.org/abs/2002.05202).

    Args:
        gate_proj, up_proj: [..., hidden] -> [..., intermediate]; down_proj the reverse.
        activation: elementwise; one of `ACTIVATIONS` in a Llama.
    """

    def __init__(
        self,
        *,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        activation: Activation = F.silu,
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)  # [..., intermediate]
        if torch.compiler.is_compiling():
            return self.down_proj(self.activation(gate) * up)
        return self.down_proj(_GatedProduct.apply(self.activation, gate, up))


class _GatedProduct(torch.autograd.Function):
    """activation(gate) * up, with the activation computed again in backward.

    Autograd would keep it as a third tensor of the intermediate size beside gate and up.
    """

    @staticmethod
    def forward(ctx: Any, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        grad_gate = grad_up = None
        if ctx.needs_input_grad[1]:
            (grad_gate,) = torch.autograd.grad(activated, leaf, grad * up)
        if ctx.needs_input_grad[2]:
            grad_up = activated.detach().mul_(grad)
        return None, grad_gate, grad_up


class TokenRows(nn.Module):
    """The trained rows: `trainable_tokens_delta` [n, hidden], whole ones in spite of its name."""

    token_ids: Tensor  # [n]
    row_of: Tensor  # [vocab]: the row of a token, n for those that do not train

    def __init__(
        self, tokens: Sequence[int], vocab_size: int, dim: int, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.vocab_size = vocab_size
        rows = torch.zeros(len(self.tokens), dim, device=device, dtype=torch.float32)
        self.trainable_tokens_delta = nn.Parameter(rows)
        for name in ("token_ids", "row_of"):
            self.register_buffer(name, None, persistent=False)
        self._index(rows.device)

    def _index(self, device: torch.device) -> None:
        self.token_ids = torch.tensor(self.tokens, device=device)
        row_of = torch.full((self.vocab_size,), len(self.tokens), device=device)
        row_of[self.token_ids] = torch.arange(len(self.tokens), device=device)
        self.row_of = row_of

    @torch.no_grad()
    def init_from(self, weight: Tensor) -> None:
        """Start as the rows of an embedding's weight [vocab, hidden]."""
        self._index(weight.device)
        rows = weight[self.token_ids].float()
        self.trainable_tokens_delta = nn.Parameter(rows)

    def put_into(self, weight: Tensor) -> Tensor:
        """A copy of a weight [vocab, hidden] with the trained rows in place of its own."""
        return weight.index_copy(0, self.token_ids, self.trainable_tokens_delta.to(weight))


class TokenEmbedding(nn.Embedding):
    """`nn.Embedding` with a frozen weight and some rows that train. [b, s] -> [b, s, hidden]"""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tokens: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        self.token_adapter = TokenRows(tokens, num_embeddings, embedding_dim, device)
        if not self.weight.is_meta:
            self.token_adapter.init_from(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        own = super().forward(input)  # [b, s, hidden]
        row = self.token_adapter.row_of[input]  # [b, s]
        rows = self.token_adapter.trainable_tokens_delta
        trains = row < len(rows)
        trained = F.embedding(row.clamp(max=len(rows) - 1), rows)  # [b, s, hidden]
        return torch.where(trains[..., None], trained.to(own.dtype), own)


class TokenHead(Linear):
    """A head tied to a `TokenEmbedding`: the logits of the trained tokens are of their rows."""

    token_adapter: TokenRows

    def forward(self, input: Tensor) -> Tensor:
        logits = linear(input, self.weight, self.bias)  # [..., vocab]
        own = linear(input, self.token_adapter.trainable_tokens_delta, None)  # [..., n]
        return logits.index_copy_(-1, self.token_adapter.token_ids, own)
