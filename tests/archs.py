"""The tiny architectures and models that tests build."""

from __future__ import annotations

from typing import Any

import torch

from qlora_builders.models import LlamaArch, llama
from qlora_builders.modules import CausalLM

# as keyword arguments; no two sizes that could be mixed up are equal
TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def tiny_arch(**changes: Any) -> LlamaArch:
    return LlamaArch(**TINY | changes)


def tiny_model(
    components: Any = (), *, dtype: torch.dtype = torch.float32, **changes: Any
) -> CausalLM:
    """Seeded; adapters have a B that is not zero. In eval mode."""
    torch.manual_seed(0)
    model = llama(tiny_arch(**changes), components, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()
