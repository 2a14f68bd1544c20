"""Model families, and the shape of a Llama as data: `LlamaArch`, and one row per published size.

A family is a Llama with other defaults in its config.json, and with keys that it does not have;
what differs in the modules themselves are fields of `LlamaArch`. Its rows are those of
transformers' config classes. Numbers of a size are those of each model's config.json on the Hugging
Face hub, named at each group. A parameter count that the model card publishes is checked by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from qlora_builders.errors import QLoRAError, did_you_mean
from qlora_builders.modules import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class Family:
    """
    Attributes:
        architecture: transformers' class, as config.json names it.
        defaults: what a missing key of config.json stands for, where that is not as for a Llama.
        fixed: keys that the family does not read.
        only: keys with the one value of which models can be built so far.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 2**17,
            "sliding_window": 4096,
        },
        fixed={"attention_bias": False, "mlp_bias": False},
        only={"sliding_window": None},
    ),
}


def family_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with all that its family says too.

    Raises:
        QLoRAError: for a family that cannot be built, or a key of one that has another value than
            it can have.
    """
    name = config.get("model_type", "llama")
    if not isinstance(name, str) or name not in FAMILIES:
        raise QLoRAError(f"model_type is {name!r}{did_you_mean(str(name), FAMILIES)}")
    family = FAMILIES[name]
    whole = {**family.defaults, **config, **family.fixed}
    for key, value in family.only.items():
        if whole.get(key) != value:
            shown = "null" if value is None else value
            raise QLoRAError(
                f"{key} is {whole.get(key)!r}; of {name} models only those with {key} {shown} "
                "can be built so far (a missing key is no null)"
            )
    return whole


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
        sizes = [field.name for field in fields(self) if field.default is MISSING]
        for name in sizes:
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
        for name, known in (("model_type", FAMILIES), ("hidden_act", ACTIVATIONS)):
            value = getattr(self, name)
            if value not in known:
                raise QLoRAError(f"{name} is {value!r}{did_you_mean(value, known)}")


# meta-llama/Llama-2-{7b,13b,70b}-hf, codellama/CodeLlama-{7b,13b,34b,70b}-hf
_CODE = {"vocab_size": 32_016, "rope_theta": 1e6, "max_position_embeddings": 16_384}
# meta-llama/Meta-Llama-3-{8B,70B}
_LLAMA3 = {"vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 8192}
# meta-llama/Llama-3.1-{8B,70B,405B}, meta-llama/Llama-3.3-70B-Instruct
_LLAMA3_1 = _LLAMA3 | {
    "max_position_embeddings": 131_072,
    "rope_scaling": RopeScaling(rope_type="llama3", factor=8.0),
}
# meta-llama/Llama-3.2-{1B,3B}
_LLAMA3_2 = _LLAMA3_1 | {
    "rope_scaling": RopeScaling(rope_type="llama3", factor=32.0),
    "tie_word_embeddings": True,
}


def _row(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any
) -> LlamaArch:
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 4096,
    }
    return LlamaArch(**sizes | other)


LLAMA_ARCHS: dict[str, LlamaArch] = {
    "llama2_7b": _row(4096, 11_008, 32, 32, 32),
    "llama2_13b": _row(5120, 13_824, 40, 40, 40),
    "llama2_70b": _row(8192, 28_672, 80, 64, 8),
    "codellama_7b": _row(4096, 11_008, 32, 32, 32, **_CODE),
    "codellama_13b": _row(5120, 13_824, 40, 40, 40, **_CODE),
    "codellama_34b": _row(8192, 22_016, 48, 64, 8, **_CODE | {"vocab_size": 32_000}),
    "codellama_70b": _row(8192, 28_672, 80, 64, 8, **_CODE),
    "llama3_8b": _row(4096, 14_336, 32, 32, 8, **_LLAMA3),
    "llama3_70b": _row(8192, 28_672, 80, 64, 8, **_LLAMA3),
    "llama3_1_8b": _row(4096, 14_336, 32, 32, 8, **_LLAMA3_1),
    "llama3_1_70b": _row(8192, 28_672, 80, 64, 8, **_LLAMA3_1),
    "llama3_1_405b": _row(16_384, 53_248, 126, 128, 8, **_LLAMA3_1),
    "llama3_2_1b": _row(2048, 8192, 16, 32, 8, **_LLAMA3_2),
    "llama3_2_3b": _row(3072, 8192, 28, 24, 8, **_LLAMA3_2),
    "llama3_3_70b": _row(8192, 28_672, 80, 64, 8, **_LLAMA3_1),
    # TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    "tinyllama_1_1b": _row(2048, 5632, 22, 32, 4, max_position_embeddings=2048),
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
