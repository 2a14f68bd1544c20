"""Layers: flat keyword arguments and finished submodules in, no config objects."""

from qlora_builders.modules.attention import Attention, KVCache
from qlora_builders.modules.decoder import CausalLM, Decoder
from qlora_builders.modules.layers import (
    ACTIVATIONS,
    DecoderLayer,
    FeedForward,
    RMSNorm,
    TokenEmbedding,
    TokenHead,
)
from qlora_builders.modules.linear import FrozenLinear, FrozenNF4Linear, Linear, quantize_
from qlora_builders.modules.lora import (
    LoRALinear,
    adapters_disabled,
    check_lora_options,
    is_adapter,
)
from qlora_builders.modules.lora_parts import DEFAULT_INIT, LOFTQ, stored_rank
from qlora_builders.modules.loss import (
    IGNORE_INDEX,
    chunked_next_token_loss,
    log_probabilities,
    next_token_loss,
    num_target_tokens,
    sequence_log_probs,
    trained_rows,
)
from qlora_builders.modules.rope import RotaryEmbedding, apply_rope, rotary_embedding

__all__ = [
    "ACTIVATIONS",
    "DEFAULT_INIT",
    "IGNORE_INDEX",
    "LOFTQ",
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
    "apply_rope",
    "check_lora_options",
    "chunked_next_token_loss",
    "is_adapter",
    "log_probabilities",
    "next_token_loss",
    "num_target_tokens",
    "quantize_",
    "rotary_embedding",
    "sequence_log_probs",
    "stored_rank",
    "trained_rows",
]
