"""A tiny model for the tests of the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_builders.models import LlamaArch, llama
from qlora_builders.modules import CausalLM

VOCAB = 61


def build(components: Any = (), *, dtype: torch.dtype = torch.float32, **arch: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    model = llama(LlamaArch(**{**sizes, **arch}), components, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def ids(batch: int = 2, seq: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))
