"""The decoder stack and the causal language model around it, under Hugging Face's parameter names.

Shapes: b = batch, s = sequence, k = key positions (s without a cache).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_builders.modules.attention import Attention, KVCache, Mask, find_documents
from qlora_builders.modules.layers import (
    DecoderLayer,
    TokenEmbedding,
    TokenHead,
    input_on_host,
    scaled,
)
from qlora_builders.modules.lora import LoRALinear
from qlora_builders.modules.loss import chunked_next_token_loss, sequence_log_probs


class Decoder(nn.Module):
    """Token embedding, decoder layers, final norm. [b, s] ids -> [b, s, hidden]

    Args:
        rotary: (position_ids, dtype) -> cos, sin; shared by all layers.
        compute_dtype: dtype of the activations; every layer computes in its input's dtype.
        embedding_multiplier: of the embeddings.
        logits_scaling: what logits are divided by; here the hidden states are.

    Attributes:
        activation_checkpointing: what a layer keeps for backward, one of `CHECKPOINTING_MODES`.
    """

    def __init__(
        self,
        *,
        embed_tokens: nn.Module,
        layers: list[DecoderLayer],
        norm: nn.Module,
        rotary: nn.Module,
        compute_dtype: torch.dtype,
        embedding_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary
        self.compute_dtype = compute_dtype
        self.embedding_multiplier = embedding_multiplier
        self.logits_scaling = logits_scaling
        self.activation_checkpointing = "none"

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The arguments are those of `CausalLM`."""
        _check_inputs(input_ids, position_ids=position_ids, document_ids=document_ids)
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids cannot be combined with a KV cache")
        past, s = 0 if cache is None else cache.length, input_ids.shape[1]
        windows = [cast(Attention, layer.self_attn).window for layer in self.layers]
        masks: dict[int | None, Mask]
        if cache is not None and cache.rows is not None:
            position_ids = cache.rows[:, None]
            masks = {window: cache.row_mask(window) for window in set(windows)}
        else:
            if position_ids is None:
                position_ids = _positions(input_ids, document_ids, past)
            masks = {
                window: _attention_mask(document_ids, window, s=s, past=past, like=input_ids)
                for window in set(windows)
            }
        x = self.embed_tokens(input_ids).to(self.compute_dtype)
        x = scaled(x, self.embedding_multiplier)
        cos, sin = self.rotary(position_ids, self.compute_dtype)
        mode = self.activation_checkpointing
        for layer, window in zip(self.layers, windows, strict=True):
            with input_on_host(x) if mode == "offload" else nullcontext():
                x = layer(x, cos, sin, masks[window], cache, mode)
        if cache is not None:
            cache.advance(s)
        return scaled(self.norm(x), 1 / self.logits_scaling)


class CausalLM(nn.Module):
    """A decoder and the projection of its hidden states onto the vocabulary.

    With `tie_word_embeddings` the head's weight *is* the embedding's. Loading a state_dict keeps it
    so: one without `lm_head.weight` is complete, one whose head differs from its embedding is an
    error.

    Attributes:
        spec: what a builder built it from, for whoever writes a checkpoint; nothing here reads it.
    """

    spec: Any = None

    def __init__(
        self, *, model: Decoder, lm_head: nn.Module, tie_word_embeddings: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.lm_head = lm_head
        self.tie_word_embeddings = tie_word_embeddings
        if tie_word_embeddings:
            self.tie_weights()
            if isinstance(lm_head, LoRALinear):
                lm_head.init_from_base()
            self.register_load_state_dict_pre_hook(_tie_state_dict)
            self.register_load_state_dict_post_hook(_tie_after_load)

    def tie_weights(self) -> None:
        """Make the head share the embedding's weight; call it after replacing either."""
        if self.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
            if isinstance(self.lm_head, LoRALinear):
                self.lm_head.base_changed()
            embedding = self.model.embed_tokens
            if isinstance(self.lm_head, TokenHead) and isinstance(embedding, TokenEmbedding):
                self.lm_head.token_adapter = embedding.token_adapter

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [b, s, vocab] in the compute dtype.

        Args:
            input_ids: [b, s] token ids.
            position_ids: [b, s]; by default they count from 0, from the cache's length, or from the
                start of each document.
            document_ids: [b, s]; a token attends only to earlier ones of its own document, which
                is a run of equal ids.
            cache: keys and values of earlier positions; this call's are appended to it.

        Raises:
            ValueError: for inputs of another shape or dtype.
        """
        hidden = self.model(
            input_ids, position_ids=position_ids, document_ids=document_ids, cache=cache
        )
        return self.lm_head(hidden)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """`next_token_loss` of the logits, without ever holding those of all tokens.

        Args:
            labels: [b, s], the token ids with `IGNORE_INDEX` where not trained; the first token of
                a document is not a target.

        Raises:
            ValueError: as `forward`, and for labels of another shape.
        """
        _check_inputs(input_ids, labels=labels)
        hidden = self.model(input_ids, position_ids=position_ids, document_ids=document_ids)
        return chunked_next_token_loss(hidden, labels, self.lm_head)

    def log_probs(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """`sequence_log_probs` of the model, float32 [b]; the arguments are those of `loss`."""
        _check_inputs(input_ids, labels=labels)
        return sequence_log_probs(self.model(input_ids), labels, self.lm_head)


def _check_inputs(input_ids: Tensor, **others: Tensor | None) -> None:
    """Broadcasting would hide a mistake in a loss that is wrong."""
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {list(input_ids.shape)}; integers of shape "
            "[batch, sequence] are needed, such as input_ids[None] for one sequence"
        )
    for name, tensor in others.items():
        if tensor is None or tensor.shape == input_ids.shape:
            continue
        if name == "position_ids" and tensor.shape == (1, input_ids.shape[1]):
            continue
        raise ValueError(
            f"{name} are of shape {list(tensor.shape)} and input_ids of {list(input_ids.shape)}; "
            "they must be of one shape"
        )


def _positions(input_ids: Tensor, document_ids: Tensor | None, past: int) -> Tensor:
    """[b, s] (or [1, s]) positions counted from `past`, or from the start of each document."""
    s = input_ids.shape[1]
    index = torch.arange(past, past + s, device=input_ids.device)[None, :]
    if document_ids is None:
        return index
    starts = torch.zeros_like(document_ids)
    starts[:, 1:] = torch.where(document_ids[:, 1:] != document_ids[:, :-1], index[:, 1:], 0)
    return index - starts.cummax(dim=1).values


def _attention_mask(
    document_ids: Tensor | None, window: int | None, *, s: int, past: int, like: Tensor
) -> Mask:
    """bool [b, 1, s, k], or None where SDPA's own causal (s = k) or full (s = 1) case serves."""
    if window is not None and past + s <= window:
        window = None
    if document_ids is not None:
        return find_documents(document_ids, window)
    if window is None and (past == 0 or s == 1):
        return None
    allowed = torch.ones(s, past + s, dtype=torch.bool, device=like.device).tril(past)
    return (allowed if window is None else allowed.triu(past + 1 - window))[None, None]


def _tie_state_dict(
    module: CausalLM, state_dict: dict[str, Any], prefix: str, *others: Any
) -> None:
    """load_state_dict pre-hook: the head's weight comes from the embedding."""
    error_msgs: list[str] = others[-1]
    embedding_key, head_key = prefix + "model.embed_tokens.weight", prefix + "lm_head.weight"
    embedding = state_dict.get(embedding_key)
    if embedding is None:
        return
    head = state_dict.get(head_key, embedding)
    if head is not embedding and not torch.equal(head, embedding):
        error_msgs.append(
            f"{head_key} differs from {embedding_key}, but the model ties them; "
            "set tie_word_embeddings to false to load both"
        )
    state_dict[head_key] = embedding


def _tie_after_load(module: CausalLM, incompatible_keys: Any) -> None:
    """load_state_dict post-hook: `assign=True` gave head and embedding a parameter each."""
    module.tie_weights()
