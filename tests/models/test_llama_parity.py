"""Logits and gradients of random tiny models of every family equal transformers' in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from qlora_builders.checkpoint import arch_from_config
from qlora_builders.models import LlamaArch, llama
from qlora_builders.modules import CausalLM, KVCache

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",  # not the kernel that we call
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide_heads": {"head_dim": 20, "num_key_value_heads": 2},
    "narrow_heads": {"head_dim": 6},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE},
    "llama3_rope_other_bands": {
        "rope_parameters": LLAMA3_ROPE
        | {"factor": 32.0, "low_freq_factor": 2.0, "rope_theta": 500_000.0},
        "head_dim": 32,
    },
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    },
    "other_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "odd_sizes": {"vocab_size": 7, "intermediate_size": 37, "num_hidden_layers": 3},
    "odd_vocabulary": {"vocab_size": 257},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "other_eps": {"rms_norm_eps": 1e-2},
    "mistral": {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2},
    "mistral_nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 20},
    "mistral_window": {"model_type": "mistral", "sliding_window": 7, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2_windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "num_key_value_heads": 2},
    "qwen3_bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "num_key_value_heads": 2},
    "smollm3_layers": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 10.0,
    },
    "dynamic_rope": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10_000.0},
    },
    "yarn": {"rope_parameters": YARN},
    "yarn_scales": {
        "rope_parameters": YARN
        | {"mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False, "beta_fast": 8.0}
    },
    "longrope_short": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}},
    "longrope_long": {"rope_parameters": LONGROPE},
    "everything": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "vocab_size": 53,
        "rope_parameters": LLAMA3_ROPE,
    },
}


LENGTH_MATTERS = ("dynamic_rope", "longrope_long")


def reference(name: str) -> PreTrainedModel:
    """transformers' model with every parameter random: biases and norms too."""
    torch.manual_seed(sorted(CONFIGS).index(name))
    config = {"model_type": "llama"} | BASE | CONFIGS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in parameter_name:
                parameter += 1
    return model


def arch_of(model: PreTrainedModel) -> LlamaArch:
    return arch_from_config(model.config.to_dict())


def ours(model: PreTrainedModel) -> CausalLM:
    """Our model with the same weights, all of them trained."""
    everything = [{"match": "**", "kind": "linear", "trainable": True}]
    own = llama(arch_of(model), everything, train=["**"], dtype=torch.float32)
    own.load_state_dict(model.state_dict(), strict=True)
    return own


def token_ids(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_every_gradient(name: str) -> None:
    theirs = reference(name)
    own = ours(theirs)
    ids = token_ids(theirs, 2, 40)
    expected, logits = theirs(ids).logits, own(ids)
    assert (logits - expected).abs().max() <= 1e-4
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    gradients = {n: p.grad for n, p in own.named_parameters()}
    assert gradients.keys() == {n for n, _ in theirs.named_parameters()}
    for parameter_name, parameter in theirs.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert scale > 0, parameter_name  # a comparison of zeros would prove nothing
        difference = (gradients[parameter_name] - parameter.grad).abs().max()
        assert difference <= 1e-5 * scale, parameter_name


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding(name: str) -> None:
    """A prefill in two pieces and then one token at a time gives the logits of the whole."""
    theirs = reference(name)
    own = ours(theirs)
    arch = arch_of(theirs)
    ids = token_ids(theirs, 2, 20)
    cache = KVCache(
        num_layers=arch.num_layers,
        batch_size=2,
        num_kv_heads=arch.num_kv_heads,
        max_seq_len=20,
        head_dim=arch.head_dim,
        dtype=torch.float32,
    )
    pieces = ids.split([9, 7, 1, 1, 1, 1], dim=1)
    with torch.no_grad():
        logits = torch.cat([own(piece, cache=cache) for piece in pieces], dim=1)
        if name in LENGTH_MATTERS:  # earlier keys were rotated by what held then
            past = DynamicCache(config=theirs.config)
            parts = [theirs(piece, past_key_values=past).logits for piece in pieces]
            expected = torch.cat(parts, dim=1)
        else:
            expected = theirs(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


def test_scaled_rope_matters_at_these_lengths() -> None:
    """Otherwise the rope cases above would pass with the scaling left out."""
    for name in ("llama3_rope", "llama3_rope_other_bands", "linear_rope", "other_theta"):
        theirs = reference(name)
        plain = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                "llama", **BASE | {k: v for k, v in CONFIGS[name].items() if k != "rope_parameters"}
            )
        )
        plain.load_state_dict(theirs.state_dict())
        ids = token_ids(theirs, 1, 40)
        with torch.no_grad():
            assert (theirs(ids).logits - plain(ids).logits).abs().max() > 1e-2


def test_position_ids_and_far_positions() -> None:
    theirs = reference("llama3_rope")
    own = ours(theirs)
    ids = token_ids(theirs, 2, 12)
    positions = torch.arange(12) * 3 + torch.tensor([[5], [80]])
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions).logits
        torch.testing.assert_close(own(ids, position_ids=positions), expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_logits_stay_close() -> None:
    theirs = reference("gqa").bfloat16()
    own = llama(arch_of(theirs), dtype=torch.bfloat16)
    own.load_state_dict(theirs.state_dict())
    ids = token_ids(theirs, 2, 40)
    with torch.no_grad():
        expected, logits = theirs(ids).logits.float(), own(ids).float()
    relative = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert relative < 0.02  # 2^-8 per operation, over two layers
