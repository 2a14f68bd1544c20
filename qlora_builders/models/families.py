"""Model families, and the shape of a Llama as data: `LlamaArch`, and one row per published size.

A family is a Llama with other defaults in its config.json, and with keys that it does not have;
what differs in the modules themselves are fields of `LlamaArch`. Its rows are those of
transformers' config classes. Numbers of a size are those of each model's config.json on the Hugging
Face hub, named at each group. A parameter count that the model card publishes is checked by a test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        fixed: keys that the family does not read, with what it does instead.
        keys: those that a Llama has not, of `checkpoint.formats.hf.FAMILY_KEYS`.
        windows: which layers have the sliding window of config.json: all, those from
            `max_window_layers` on, those without RoPE; None: the family has no such key.
        rope_theta: where config.json says none.
        has_output_bias: whether `attention_bias` is of o_proj too.
        qk_norm: RMSNorm of queries and keys before they are rotated: of every head by itself, or of
            all of a token's at once; None: there is none.
        is_fused: one projection for q, k and v, and one for gate and up.
        norms_after: the norms of a layer are of what attention and MLP give, not of what they get.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: Sequence[str] = ()
    windows: Literal["all", "last", "without rope"] | None = None
    rope_theta: float = 10_000.0
    has_output_bias: bool = True
    qk_norm: Literal["heads", "width"] | None = None
    is_fused: bool = False
    norms_after: bool = False


_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 2**15, "sliding_window": 4096}
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
        windows="all",
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN,
        fixed={"attention_bias": True, "mlp_bias": False},
        windows="last",
        has_output_bias=False,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults={**_QWEN, "head_dim": 128},
        fixed={"mlp_bias": False},
        windows="last",
        qk_norm="heads",
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 2**15,
            "tie_word_embeddings": True,
        },
        keys=("no_rope_layers",),
        windows="without rope",
        rope_theta=2e6,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults={"attention_multiplier": 1.0},
        keys=(
            "embedding_multiplier",
            "residual_multiplier",
            "attention_multiplier",
            "logits_scaling",
        ),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        fixed={"attention_bias": False, "mlp_bias": False},
        keys=("partial_rotary_factor",),
        windows="all",
        is_fused=True,
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        defaults={"rms_norm_eps": 1e-5},
        fixed={"mlp_bias": False},
        qk_norm="width",
        norms_after=True,
    ),
}


def family_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with all that its family says too.

    Raises:
        QLoRAError: for a family that cannot be built.
    """
    name = config.get("model_type", "llama")
    if not isinstance(name, str) or name not in FAMILIES:
        raise QLoRAError(f"model_type is {name!r}{did_you_mean(str(name), FAMILIES)}")
    family = FAMILIES[name]
    return {**family.defaults, **config, **family.fixed}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies were changed for a longer context; see `modules/rope.py`.

    Of the fields each type has those that its function there takes. `factor` None is
    max_position_embeddings / original_max_position_embeddings, `attention_factor` None what the
    paper says.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LlamaArch:
    """Everything that decides the modules and parameters of a Llama, or of a family like it.

    Attributes:
        model_type: a key of `FAMILIES`.
        sliding_window: positions that a token sees, with its own; None: all.
        sliding_layers: those with the window; None: all.
        nope_layers: those without rotary embedding.
        partial_rotary_factor: the part of a head that is rotated.
        attention_multiplier: of attention's logits; None: 1 / sqrt(head_dim).

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
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] | None = None
    nope_layers: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0

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
        self._check_rope()

    def _check_rope(self) -> None:
        scaling, rotated = self.rope_scaling, self.rotary_dim
        if rotated < 2 or rotated % 2:
            raise QLoRAError(
                f"partial_rotary_factor is {self.partial_rotary_factor}; of {self.head_dim} "
                f"dimensions that rotates {rotated}, which must be an even number"
            )
        if scaling is None:
            return
        if scaling.rope_type in ("yarn", "dynamic") and not (self.rope_theta > 1 and rotated > 2):
            raise QLoRAError(
                f"rope_theta is {self.rope_theta} and rotated dimensions {rotated}; rope type "
                f"{scaling.rope_type!r} needs more than 1 and more than 2"
            )
        for name in ("short_factor", "long_factor"):
            count = len(getattr(scaling, name))
            if scaling.rope_type == "longrope" and count != rotated // 2:
                raise QLoRAError(
                    f"{name} has {count} numbers; it must have {rotated // 2}, one for each "
                    "rotated pair"
                )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def rope(self) -> tuple[int, float, int, RopeScaling | None]:
        """What `modules.rotary_embedding` takes."""
        limit = self.max_position_embeddings
        return self.rotary_dim, self.rope_theta, limit, self.rope_scaling

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def window(self, layer: int) -> int | None:
        slides = self.sliding_layers is None or layer in self.sliding_layers
        return self.sliding_window if slides else None


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
_TIED = {"tie_word_embeddings": True}
# HuggingFaceTB/SmolLM2-{135M,360M,1.7B}
_SMOLLM2 = _TIED | {
    "vocab_size": 49_152,
    "rope_theta": 100_000.0,
    "max_position_embeddings": 8192,
}
# HuggingFaceTB/SmolLM3-3B
_SMOLLM3 = _TIED | {
    "model_type": "smollm3",
    "vocab_size": 128_256,
    "rope_theta": 5e6,
    "max_position_embeddings": 65_536,
    "norm_eps": 1e-6,
    "nope_layers": tuple(range(3, 36, 4)),
}
# mistralai/Mistral-7B-v0.3, mistralai/Mistral-Nemo-Base-2407
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32_768,
    "rope_theta": 1e6,
    "max_position_embeddings": 32_768,
}
_NEMO = _MISTRAL | {"vocab_size": 131_072, "max_position_embeddings": 131_072, "head_dim": 128}
# Qwen/Qwen2.5-{0.5B,1.5B,3B,7B,14B,32B,72B}-Instruct
_QWEN2_5 = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "rope_theta": 1e6,
    "max_position_embeddings": 32_768,
    "norm_eps": 1e-6,
    "attention_bias": True,
}
_QWEN2_5_TIED = _QWEN2_5 | _TIED | {"vocab_size": 151_936}
# Qwen/Qwen3-{0.6B,1.7B,4B,8B,14B,32B}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "norm_eps": 1e-6,
}
_PHI = {"model_type": "phi3", "vocab_size": 32_064}
_PHI4 = {"vocab_size": 100_352, "rope_theta": 250_000.0, "max_position_embeddings": 16_384}
# ibm-granite/granite-3.3-{2b,8b}-instruct
_GRANITE3_3 = _TIED | {
    "model_type": "granite",
    "vocab_size": 49_159,
    "rope_theta": 1e7,
    "max_position_embeddings": 131_072,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 1 / 64,
    "logits_scaling": 8.0,
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
    "smollm2_135m": _row(576, 1536, 30, 9, 3, **_SMOLLM2),
    "smollm2_360m": _row(960, 2560, 32, 15, 5, **_SMOLLM2),
    "smollm2_1_7b": _row(2048, 8192, 24, 32, 32, **_SMOLLM2 | {"rope_theta": 130_000.0}),
    "smollm3_3b": _row(2048, 11_008, 36, 16, 4, **_SMOLLM3),
    "mistral_7b": _row(4096, 14_336, 32, 32, 8, **_MISTRAL),
    "mistral_nemo_12b": _row(5120, 14_336, 40, 32, 8, **_NEMO),
    "qwen2_5_0_5b": _row(896, 4864, 24, 14, 2, **_QWEN2_5_TIED),
    "qwen2_5_1_5b": _row(1536, 8960, 28, 12, 2, **_QWEN2_5_TIED),
    "qwen2_5_3b": _row(2048, 11_008, 36, 16, 2, **_QWEN2_5_TIED),
    "qwen2_5_7b": _row(3584, 18_944, 28, 28, 4, **_QWEN2_5),
    "qwen2_5_14b": _row(5120, 13_824, 48, 40, 8, **_QWEN2_5),
    "qwen2_5_32b": _row(5120, 27_648, 64, 40, 8, **_QWEN2_5),
    "qwen2_5_72b": _row(8192, 29_568, 80, 64, 8, **_QWEN2_5),
    "qwen3_0_6b": _row(1024, 3072, 28, 16, 8, **_QWEN3 | _TIED),
    "qwen3_1_7b": _row(2048, 6144, 28, 16, 8, **_QWEN3 | _TIED),
    "qwen3_4b": _row(2560, 9728, 36, 32, 8, **_QWEN3 | _TIED),
    "qwen3_8b": _row(4096, 12_288, 36, 32, 8, **_QWEN3),
    "qwen3_14b": _row(5120, 17_408, 40, 40, 8, **_QWEN3),
    "qwen3_32b": _row(5120, 25_600, 64, 64, 8, **_QWEN3),
    # microsoft/Phi-3-mini-4k-instruct, microsoft/phi-4
    "phi3_mini_4k": _row(3072, 8192, 32, 32, 32, **_PHI | {"sliding_window": 2047}),
    "phi4_14b": _row(5120, 17_920, 40, 40, 10, **_PHI | _PHI4),
    "granite3_3_2b": _row(2048, 8192, 40, 32, 8, **_GRANITE3_3),
    "granite3_3_8b": _row(
        4096, 12_800, 40, 32, 8,
        **_GRANITE3_3 | {"attention_multiplier": 1 / 128, "logits_scaling": 16.0},
    ),
}  # fmt: skip


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
