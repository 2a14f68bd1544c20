"""The shape of a Llama as data: `LlamaArch`, and one row per published size.

Numbers are those of each model's config.json on the Hugging Face hub, named at each group. A
parameter count that the model card publishes is checked against every row by a test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from qlora_builders.errors import QLoRAError, did_you_mean
from qlora_builders.models.families import FAMILIES
from qlora_builders.modules import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies were changed for a longer context; see `modules/attention.py`.

    `linear` uses `factor` alone.
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class LlamaArch:
    """Everything that decides the modules and parameters of a Llama, or of a family like it.

    Attributes:
        model_type: a key of `FAMILIES`.

    Raises:
        QLoRAError: if sizes are not positive integers or do not divide as they must.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise QLoRAError(f"{name} is {value!r}; it must be an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise QLoRAError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise QLoRAError(f"head_dim is {self.head_dim}; rotary embedding needs an even one")
        if self.model_type not in FAMILIES:
            raise QLoRAError(
                f"model_type is {self.model_type!r}{did_you_mean(self.model_type, FAMILIES)}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise QLoRAError(
                f"hidden_act is {self.hidden_act!r}{did_you_mean(self.hidden_act, ACTIVATIONS)}"
            )


# meta-llama/Llama-2-{7b,13b,70b}-hf
_LLAMA2_7B = LlamaArch(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
)
_LLAMA2_13B = replace(
    _LLAMA2_7B,
    hidden_size=5120,
    intermediate_size=13_824,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
)
_LLAMA2_70B = replace(
    _LLAMA2_7B,
    hidden_size=8192,
    intermediate_size=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
)

# meta-llama/Meta-Llama-3-{8B,70B}
_LLAMA3_8B = LlamaArch(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
)
_LLAMA3_70B = replace(
    _LLAMA3_8B, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
)

# Llama 3.1 and later: 128k positions
_LONG = {
    "max_position_embeddings": 131_072,
    "rope_scaling": RopeScaling(rope_type="llama3", factor=8.0),
}
_LLAMA3_1_8B = replace(_LLAMA3_8B, **_LONG)  # type: ignore[arg-type]
_LLAMA3_1_70B = replace(_LLAMA3_70B, **_LONG)  # type: ignore[arg-type]

# meta-llama/Llama-3.2-{1B,3B}
_LLAMA3_2_1B = replace(
    _LLAMA3_1_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    head_dim=64,
    rope_scaling=RopeScaling(rope_type="llama3", factor=32.0),
    tie_word_embeddings=True,
)

LLAMA_ARCHS: dict[str, LlamaArch] = {
    "llama2_7b": _LLAMA2_7B,
    "llama2_13b": _LLAMA2_13B,
    "llama2_70b": _LLAMA2_70B,
    # codellama/CodeLlama-{7b,13b,34b,70b}-hf
    "codellama_7b": replace(
        _LLAMA2_7B, vocab_size=32_016, rope_theta=1e6, max_position_embeddings=16_384
    ),
    "codellama_13b": replace(
        _LLAMA2_13B, vocab_size=32_016, rope_theta=1e6, max_position_embeddings=16_384
    ),
    "codellama_34b": replace(
        _LLAMA2_70B,
        intermediate_size=22_016,
        num_layers=48,
        rope_theta=1e6,
        max_position_embeddings=16_384,
    ),
    "codellama_70b": replace(
        _LLAMA2_70B, vocab_size=32_016, rope_theta=1e6, max_position_embeddings=16_384
    ),
    "llama3_8b": _LLAMA3_8B,
    "llama3_70b": _LLAMA3_70B,
    # meta-llama/Llama-3.1-{8B,70B,405B}
    "llama3_1_8b": _LLAMA3_1_8B,
    "llama3_1_70b": _LLAMA3_1_70B,
    "llama3_1_405b": replace(
        _LLAMA3_1_8B,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_layers=126,
        num_heads=128,
    ),
    "llama3_2_1b": _LLAMA3_2_1B,
    "llama3_2_3b": replace(
        _LLAMA3_2_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128
    ),
    # meta-llama/Llama-3.3-70B-Instruct
    "llama3_3_70b": _LLAMA3_1_70B,
    # TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    "tinyllama_1_1b": replace(
        _LLAMA2_7B,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    ),
}


def get_arch(arch: LlamaArch | str) -> LlamaArch:
    """
    Raises:
        QLoRAError: for a name that is not in `LLAMA_ARCHS`, with the nearest one.
    """
    if isinstance(arch, LlamaArch):
        return arch
    if arch not in LLAMA_ARCHS:
        raise QLoRAError(f"unknown arch {arch!r}{did_you_mean(arch, LLAMA_ARCHS)}")
    return LLAMA_ARCHS[arch]
