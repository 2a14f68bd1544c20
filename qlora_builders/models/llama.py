"""The Llama builder: a `LlamaArch` and a component plan in, a model out.

Every projection is written once; what fills it is the plan's business. Parameters carry Hugging
Face's names, so a Hugging Face checkpoint needs no key map.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from qlora_builders.errors import PlanError
from qlora_builders.models.components import ComponentRule, build_linear, resolve
from qlora_builders.models.families import LlamaArch, get_arch
from qlora_builders.models.slot_patterns import match_names, token_ids
from qlora_builders.modules import (
    ACTIVATIONS,
    Attention,
    CausalLM,
    Decoder,
    DecoderLayer,
    FeedForward,
    RMSNorm,
    TokenEmbedding,
    TokenHead,
    rotary_embedding,
)


@dataclass(frozen=True)
class BaseCheckpoint:
    """Which weights a model was loaded from; the hash is `checkpoint.base_record`'s."""

    format: str
    content_hash: str


@dataclass(frozen=True)
class LlamaSpec:
    """What a model was built from; `model.spec` remembers it for whoever writes a checkpoint.

    Attributes:
        base: the checkpoint its weights came from; None where nobody recorded it.
    """

    arch: LlamaArch
    components: tuple[ComponentRule, ...] = ()
    train: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    base: BaseCheckpoint | None = None


def llama(
    arch: LlamaArch | str,
    components: Iterable[ComponentRule | Mapping[str, Any]] = (),
    *,
    train: Sequence[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
) -> CausalLM:
    """Build a Llama with random weights (or none, on `device="meta"`).

    Args:
        arch: a `LlamaArch` or a name in `LLAMA_ARCHS`.
        components: the plan, a list of rules or of the dicts that YAML gives; () builds plain
            frozen layers.
        train: patterns of modules outside the linear slots whose parameters train: `norm`,
            `embed_tokens`, `layers.*.input_layernorm`; `embed_tokens[5,128256-128260]` trains the
            rows of these tokens alone, and those of a tied head.
        dtype: of the frozen parameters; those that train are float32.
        compute_dtype: of the activations; by default `dtype`.

    Raises:
        QLoRAError: for an unknown arch.
        PlanError: for a plan that does not fit the model.
    """
    arch = get_arch(arch)
    rules = [ComponentRule.parse(rule) for rule in components]
    plan = resolve(rules, linear_slots(arch))
    tokens = _resolve_tokens(train, arch, plan)
    trained = set(_resolve_train([p for p in train if token_ids(p) is None], arch))
    _check_tied_head(arch, plan["lm_head"], embedding_trains="embed_tokens" in trained)

    def linear(name: str, in_features: int, out_features: int, bias: bool = False) -> nn.Module:
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        if name == "lm_head" and tokens and arch.tie_word_embeddings:  # shares the trained rows
            return TokenHead(in_features, out_features, **options).requires_grad_(False)
        return build_linear(plan[name], in_features, out_features, **options)

    def norm(name: str, dim: int = arch.hidden_size) -> nn.Module:
        own = torch.float32 if name in trained else dtype
        module = RMSNorm(dim, eps=arch.norm_eps, device=device, dtype=own)
        return module.requires_grad_(name in trained)

    with _SkipMetaInit():
        decoder = Decoder(
            embed_tokens=_embedding(arch, tokens, "embed_tokens" in trained, device, dtype),
            layers=[_decoder_layer(arch, index, linear, norm) for index in range(arch.num_layers)],
            norm=norm("norm"),
            rotary=rotary_embedding(*arch.rope),
            compute_dtype=compute_dtype or dtype,
            embedding_multiplier=arch.embedding_multiplier,
            logits_scaling=arch.logits_scaling,
        )
        model = CausalLM(
            model=decoder,
            lm_head=linear("lm_head", arch.hidden_size, arch.vocab_size),
            tie_word_embeddings=arch.tie_word_embeddings,
        )
    model.spec = LlamaSpec(arch=arch, components=tuple(rules), train=tuple(train), dtype=dtype)
    return model


def _embedding(
    arch: LlamaArch,
    tokens: Sequence[int],
    trains: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> nn.Module:
    if not tokens:
        dtype = torch.float32 if trains else dtype
        embedding = nn.Embedding(arch.vocab_size, arch.hidden_size, device=device, dtype=dtype)
        return embedding.requires_grad_(trains)
    if trains:
        raise PlanError("train names both embed_tokens and some of its rows; drop one of them")
    return TokenEmbedding(arch.vocab_size, arch.hidden_size, tokens, device=device, dtype=dtype)


class _SkipMetaInit(TorchFunctionMode):
    """Filling a meta tensor changes nothing, but has torch import its compiler: 2 s, 150 MiB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            tensor = kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _decoder_layer(
    arch: LlamaArch, index: int, linear: Callable[..., nn.Module], norm: Callable[..., nn.Module]
) -> DecoderLayer:
    """One layer; `linear(name, in_features, out_features, bias)` fills a slot as the plan says."""
    at = f"layers.{index}"
    q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    slots = {
        part: {name: linear(f"{at}.{part}.{name}", *sizes) for name, sizes in names.items()}
        for part, names in layer_slots(arch).items()
    }
    widths = (q_size, kv_size) if arch.family.qk_norm == "width" else (arch.head_dim,) * 2
    norms = {name: norm(f"{at}.{name}") for name in _norms(arch) if "." not in name}
    qk_norms = {
        name: norm(f"{at}.self_attn.{name}", width)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True)
        if arch.family.qk_norm
    }
    return DecoderLayer(
        self_attn=Attention(
            **slots["self_attn"],
            **qk_norms,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            layer=index,
            scale=arch.attention_multiplier,
            use_rope=index not in arch.nope_layers,
            window=arch.window(index),
            attention_dropout=arch.attention_dropout,
        ),
        mlp=FeedForward(**slots["mlp"], activation=ACTIVATIONS[arch.hidden_act]),
        **norms,
        residual_multiplier=arch.residual_multiplier,
    )


def _norms(arch: LlamaArch) -> list[str]:
    """Of a layer."""
    before, after = "input_layernorm", "post_feedforward_layernorm"
    own = ["post_attention_layernorm", after if arch.family.norms_after else before]
    return sorted(own) + ["self_attn.q_norm", "self_attn.k_norm"] * bool(arch.family.qk_norm)


def layer_slots(arch: LlamaArch) -> dict[str, dict[str, tuple[int, int, bool]]]:
    """Part of a layer -> its linear slots -> in_features, out_features, and whether with a bias."""
    hidden, inner, family = arch.hidden_size, arch.intermediate_size, arch.family
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    into = (
        {"qkv_proj": q + 2 * kv} if family.is_fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
    )
    wide = (
        {"gate_up_proj": 2 * inner} if family.is_fused else {"gate_proj": inner, "up_proj": inner}
    )
    bias, mlp_bias = arch.attention_bias, arch.mlp_bias
    return {
        "self_attn": {
            **{name: (hidden, size, bias) for name, size in into.items()},
            "o_proj": (q, hidden, bias and family.has_output_bias),
        },
        "mlp": {
            **{name: (hidden, size, mlp_bias) for name, size in wide.items()},
            "down_proj": (inner, hidden, mlp_bias),
        },
    }


def linear_slots(arch: LlamaArch) -> list[str]:
    """Names of all linear slots, without the leading `model.`."""
    slots = [
        f"layers.{index}.{part}.{name}"
        for index in range(arch.num_layers)
        for part, names in layer_slots(arch).items()
        for name in names
    ]
    return [*slots, "lm_head"]


def hf_name(slot: str) -> str:
    """The Hugging Face module name of a slot, which plans name without `model.`."""
    return slot if slot == "lm_head" else f"model.{slot}"


def slot_name(parameter: str) -> str:
    """The slot of a module, or of its weight, by its Hugging Face name."""
    return parameter.removesuffix(".weight").removeprefix("model.")


def other_modules(arch: LlamaArch) -> list[str]:
    """Names of the modules with parameters outside the linear slots: what `train` may name."""
    norms = [f"layers.{index}.{name}" for index in range(arch.num_layers) for name in _norms(arch)]
    return ["embed_tokens", *norms, "norm"]


def _resolve_train(train: Sequence[str], arch: LlamaArch) -> list[str]:
    names: list[str] = []
    for pattern in train:
        try:
            names += match_names(pattern, other_modules(arch))
        except PlanError as error:
            raise PlanError(
                f"train {pattern!r}: {error}. `train` names modules outside the linear slots; a "
                "linear slot trains with a rule {match: ..., kind: linear, trainable: true}"
            ) from error
    return names


def _resolve_tokens(
    train: Sequence[str], arch: LlamaArch, plan: Mapping[str, ComponentRule]
) -> list[int]:
    """The tokens whose rows train."""
    tokens = [token for pattern in train for token in token_ids(pattern) or ()]
    if not tokens:
        return tokens
    outside = [token for token in tokens if token >= arch.vocab_size]
    if outside:
        raise PlanError(
            f"train embed_tokens[...]: there is no token {outside[0]}; the vocabulary has "
            f"{arch.vocab_size}"
        )
    if len(set(tokens)) < len(tokens):
        repeated = sorted(token for token, count in Counter(tokens).items() if count > 1)
        raise PlanError(f"train embed_tokens[...]: named twice: {repeated[:5]}")
    if not any(rule.adapter != "none" for rule in plan.values()):
        raise PlanError(
            "train embed_tokens[...] is stored with an adapter, and the plan has none; add a rule "
            "of kind 'lora' or 'qlora'"
        )
    head = plan["lm_head"]
    if arch.tie_word_embeddings and (head.kind != "linear" or head.trainable):
        raise PlanError(
            f"rule {head.match!r}: lm_head shares the embedding's weight in this model, some rows "
            "of which train; leave the head to them"
        )
    return tokens


def _check_tied_head(arch: LlamaArch, rule: ComponentRule, *, embedding_trains: bool) -> None:
    """The head of a model with tied embeddings can only be what the embedding is too."""
    if not arch.tie_word_embeddings:
        return
    shared = f"rule {rule.match!r}: lm_head shares the embedding's weight in this model"
    if rule.base != "none":
        raise PlanError(f"{shared} and cannot be quantized; use kind 'lora' or 'linear' for it")
    if rule.adapter != "none" and embedding_trains:
        raise PlanError(
            f"{shared}, which trains itself; drop this rule or 'embed_tokens' from `train`"
        )
    if rule.trainable and not embedding_trains:
        raise PlanError(f"{shared}; to train both add 'embed_tokens' to `train`")
