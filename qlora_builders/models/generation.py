"""Token-by-token decoding with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from qlora_builders.errors import QLoRAError
from qlora_builders.modules import CausalLM, KVCache


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, without the stop token.

    Ends at a stop token, after `max_new_tokens`, or where the model's positions end.

    Args:
        model: built by `llama`; dropout is off while decoding only if it is in eval mode.
        prompt_ids: at least one token.
        temperature: 0 takes the likeliest token, else logits are divided by it.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the likeliest tokens that together have this probability
            (https://arxiv.org/abs/1904.09751).
        generator: source of randomness, on the model's device.

    Raises:
        QLoRAError: for an empty prompt, or one longer than the model's positions.
    """
    arch = model.spec.arch
    room = arch.max_position_embeddings - len(prompt_ids)
    if not prompt_ids or room < 0:
        raise QLoRAError(
            f"the prompt has {len(prompt_ids)} tokens; allowed: 1 to {arch.max_position_embeddings}"
        )
    device = model.get_parameter("model.norm.weight").device
    cache = KVCache(
        num_layers=arch.num_layers,
        batch_size=1,
        num_kv_heads=arch.num_kv_heads,
        max_seq_len=len(prompt_ids) + min(max_new_tokens, room),
        head_dim=arch.head_dim,
        device=device,
        dtype=model.model.compute_dtype,
    )
    tokens = torch.tensor([list(prompt_ids)], device=device)
    for _ in range(min(max_new_tokens, room)):
        hidden = model.model(tokens, cache=cache)
        logits = model.lm_head(hidden[:, -1])[
            0
        ]  # [vocab]; the prompt's other logits are not needed
        token = next_token(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        if token in stop_token_ids:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def next_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> int:
    """Choose a token from logits [vocab]."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
    if top_k is not None:
        probabilities[top_k:] = 0
    if top_p is not None:
        # a token stays if the likelier ones have not reached top_p yet, so one always stays
        probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
