"""Token-by-token decoding with a KV cache, for one prompt or several at once.

Shapes: b = prompts, vocab = logits of one position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_builders.errors import QLoRAError
from qlora_builders.models.families import LlamaArch
from qlora_builders.modules import CausalLM, KVCache

_COLD = 1e-5  # dividing by less could overflow, and the likeliest token is certain anyway
_GRAPHS = 64  # of the decoding step: sizes of the cache, times batch sizes and models


def generate(model: CausalLM, prompt_ids: Sequence[int], **options: Any) -> Iterator[int]:
    """Yield the tokens that follow a prompt, without the stop token.

    Args:
        prompt_ids: at least one token.
        options: those of `generate_batch`.

    Raises:
        QLoRAError: as `generate_batch`.
    """
    for (token,) in generate_batch(model, [prompt_ids], **options):
        assert token is not None
        yield token


@torch.inference_mode()
def generate_batch(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of every prompt; None after its stop token.

    Ends when every prompt has met a stop token, after `max_new_tokens`, or where the model's
    positions end for the longest prompt.

    Args:
        model: built by `llama`; dropout is off while decoding only if it is in eval mode.
        prompts: token ids, at least one each.
        temperature: 0 (or below 1e-5) takes the likeliest token, else logits are divided by it.
        top_k: sample from the k likeliest tokens.
        top_p: sample from the likeliest tokens that together have this probability
            (https://arxiv.org/abs/1904.09751).
        generator: source of randomness, on the model's device.
        compile: compile the decoding step; on GPUs it is replayed as one CUDA graph.

    Raises:
        QLoRAError: for an empty prompt, one longer than the model's positions, or a token that the
            model does not have.
    """
    arch = model.spec.arch
    for prompt in prompts:
        check_prompt(arch, prompt)
    num_steps = max_steps(arch, prompts, max_new_tokens)
    max_seq_len = max(len(prompt) for prompt in prompts) + num_steps
    if compile:
        max_seq_len = 1 << (max_seq_len - 1).bit_length()  # few sizes, and a graph for each
    logits, cache = _read_prompts(model, prompts, max_seq_len=max_seq_len)
    if compile or len(prompts) > 1:
        cache.start_rows([len(prompt) for prompt in prompts])
    decode = _compiled_decode(logits.device) if compile else _decode
    running = [True] * len(prompts)
    for step in range(num_steps):
        tokens = next_tokens(
            logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
        )
        host = _start_copy(tokens)
        if logits.is_cuda and step + 1 < num_steps:  # the GPU goes on while the host reads
            logits = decode(model, tokens, cache)
        values = _finish_copy(*host)
        running = [
            on and token not in stop_token_ids for on, token in zip(running, values, strict=True)
        ]
        if not any(running):
            return
        yield [token if on else None for on, token in zip(running, values, strict=True)]
        if not logits.is_cuda and step + 1 < num_steps:
            logits = decode(model, tokens, cache)


def check_prompt(arch: LlamaArch, prompt: Sequence[int]) -> None:
    """
    Raises:
        QLoRAError: if a prompt is empty, or has more tokens or others than a model can have.
    """
    positions, vocab_size = arch.max_position_embeddings, arch.vocab_size
    if not 0 < len(prompt) <= positions:
        raise QLoRAError(f"the prompt has {len(prompt)} tokens; allowed: 1 to {positions}")
    if max(prompt) >= vocab_size:
        raise QLoRAError(
            f"the prompt has token {max(prompt)}, but the model's vocabulary has {vocab_size} "
            "entries; tokenizer and model do not belong together"
        )


def max_steps(arch: LlamaArch, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Steps that `generate_batch` takes unless all prompts meet a stop token before."""
    longest = max(len(prompt) for prompt in prompts)
    return min(max_new_tokens, arch.max_position_embeddings - longest)


def next_tokens(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Choose a token of each row: [b, vocab] -> [b]. Nothing is sent to the host."""
    if temperature < _COLD:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, min(top_k, probabilities.shape[1]) :] = 0
    if top_p is not None:
        # a token stays if the likelier ones have not reached top_p yet, so one always stays
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, choice).squeeze(-1)


def _read_prompts(
    model: CausalLM, prompts: Sequence[Sequence[int]], *, max_seq_len: int
) -> tuple[Tensor, KVCache]:
    """Logits [b, vocab] after each prompt's last token, and the cache of all prompts.

    Shorter prompts are padded at their ends; what the cache holds of the padding is overwritten or
    hidden by whoever goes on.
    """
    arch = model.spec.arch
    device = model.get_parameter("model.norm.weight").device
    cache = KVCache(
        num_layers=arch.num_layers,
        batch_size=len(prompts),
        num_kv_heads=arch.num_kv_heads,
        max_seq_len=max_seq_len,
        head_dim=arch.head_dim,
        device=device,
        dtype=model.model.compute_dtype,
    )
    longest = max(len(prompt) for prompt in prompts)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    hidden = model.model(torch.tensor(padded, device=device), cache=cache)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    return model.lm_head(hidden[rows, last]), cache  # the prompts' other logits are not needed


def _decode(model: CausalLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append a token [b] to each row: logits [b, vocab] of the next."""
    return model.lm_head(model.model(tokens[:, None], cache=cache)[:, -1])


def _compiled_decode(device: torch.device) -> Callable[..., Tensor]:
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(_decode, fullgraph=True, dynamic=False, mode=mode)


def _start_copy(tokens: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """To the host, in the order of the stream, without waiting for it."""
    if not tokens.is_cuda:
        return tokens, None
    host = torch.empty_like(tokens, device="cpu", pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _finish_copy(host: Tensor, event: torch.cuda.Event | None) -> list[int]:
    if event is not None:
        event.synchronize()
    values: list[int] = host.tolist()
    return values
