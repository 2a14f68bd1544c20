"""Layers: flat keyword arguments and finished submodules in, no config objects."""

from qlora_builders.modules.adapters import adapters_disabled
from qlora_builders.modules.attention import Attention
from qlora_builders.modules.decoder import CausalLM, Decoder, DecoderLayer
from qlora_builders.modules.feed_forward import ACTIVATIONS, FeedForward
from qlora_builders.modules.kv_cache import KVCache
from qlora_builders.modules.linear import FrozenLinear, FrozenNF4Linear, Linear, quantize_
from qlora_builders.modules.lora import LoRALinear, check_lora_options, is_adapter
from qlora_builders.modules.loss import (
    IGNORE_INDEX,
    chunked_next_token_loss,
    next_token_loss,
    num_target_tokens,
    sequence_log_probs,
)
from qlora_builders.modules.rms_norm import RMSNorm
from qlora_builders.modules.rope import (
    RotaryEmbedding,
    linear_scaled,
    llama3_scaled,
    rope_frequencies,
)
from qlora_builders.modules.token_rows import TokenEmbedding, TokenHead

__all__ = [
    "ACTIVATIONS",
    "IGNORE_INDEX",
    "Attention",
    "CausalLM",
    "Decoder",
    "DecoderLayer",
    "FeedForward",
    "FrozenLinear",
    "FrozenNF4Linear",
    "KVCache",
    "Linear",
    "LoRALinear",
    "RMSNorm",
    "RotaryEmbedding",
    "TokenEmbedding",
    "TokenHead",
    "adapters_disabled",
    "check_lora_options",
    "chunked_next_token_loss",
    "is_adapter",
    "linear_scaled",
    "llama3_scaled",
    "next_token_loss",
    "num_target_tokens",
    "quantize_",
    "rope_frequencies",
    "sequence_log_probs",
]
