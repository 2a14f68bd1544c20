"""config.json in both spellings, in and out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from qlora_builders.checkpoint import (
    arch_from_config,
    config_from_arch,
    load_checkpoint,
    read_arch,
    save_checkpoint,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LLAMA_ARCHS, LlamaArch, RopeScaling

# as transformers 4 writes it
OLD_STYLE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
}
ARCH = LlamaArch(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32),
    attention_bias=True,
    tie_word_embeddings=True,
)


def test_old_spelling() -> None:
    assert arch_from_config(OLD_STYLE) == ARCH


def test_new_spelling() -> None:
    old = {k: v for k, v in OLD_STYLE.items() if k not in ("rope_theta", "rope_scaling")}
    rope = OLD_STYLE["rope_scaling"] | {"rope_theta": OLD_STYLE["rope_theta"]}
    assert arch_from_config(old | {"rope_parameters": rope}) == ARCH


def test_transformers_reads_the_old_spelling_alike() -> None:
    """So the two tests above agree with transformers about what the spellings mean."""
    new = LlamaConfig(**copy.deepcopy(OLD_STYLE)).to_dict()  # it writes into its arguments
    assert "rope_parameters" in new
    assert arch_from_config(new) == ARCH


def test_first_llama_needs_neither_kv_heads_nor_rope() -> None:
    keys = ("num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act")
    arch = arch_from_config({k: v for k, v in OLD_STYLE.items() if k not in keys})
    assert (arch.num_kv_heads, arch.rope_theta, arch.rope_scaling) == (4, 10_000.0, None)
    assert (arch.norm_eps, arch.hidden_act) == (1e-6, "silu")  # transformers' defaults


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling(rope_type="linear", factor=2.0)),
        ({"rope_type": "linear", "factor": 2.0}, RopeScaling(rope_type="linear", factor=2.0)),
    ],
)
def test_rope_types(rope: dict | None, expected: RopeScaling | None) -> None:
    assert arch_from_config(OLD_STYLE | {"rope_scaling": rope}).rope_scaling == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; allowed: llama, mistral"),
        (
            {"model_type": "mistral"},
            "sliding_window is 4096; of mistral models only those with sliding_window null can be",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' .*; allowed: default, lin"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        ({"rope_scaling": [2.0]}, "config.json: "),
        ({"rope_theta": "much"}, "rope_theta is 'much'; expected a number > 0 and <= 1e\\+30"),
        ({"rope_theta": None}, "config.json: "),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected an integer >= 1 and <= 1,024"),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"hidden_size": "64"}, "config.json: "),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; expected a number > 0"),
        ({"rope_theta": "nan"}, "rope_theta is 'nan'; expected a number > 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; expected a number > 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None; expected a number > 0"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; expected true or false"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; expected a number > 0"),
        (
            {"rope_scaling": OLD_STYLE["rope_scaling"] | {"high_freq_factor": 1.0}},
            "low_freq_factor and high_freq_factor must differ",
        ),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        arch_from_config(OLD_STYLE | change, source="somewhere/config.json")
    assert str(caught.value).startswith("somewhere/config.json: ")


def test_missing_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match="missing keys: hidden_size, vocab_size"):
        arch_from_config(
            {k: v for k, v in OLD_STYLE.items() if k not in ("vocab_size", "hidden_size")}
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json: missing; expected a Hugging Face checkpoint directory"),
        ("{", "config.json: not JSON"),
        ('{"a": 1, "a": 2}', "config.json: not JSON: key 'a' appears twice"),
        ('{"a": NaN}', "config.json: not JSON: NaN is not a number"),
        ('{"a": 1e999}', "config.json: not JSON: 1e999 is too large a number"),
        ("[" * 100_000, "config.json: not JSON that can be read: nested too deeply"),
        ('{"a": "\xff"}', "config.json: not UTF-8 text: invalid start byte at byte 7"),
        ("[]", "config.json: holds list, expected an object"),
    ],
)
def test_unreadable_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        read_arch(tmp_path)


@pytest.mark.parametrize("variant", ["gqa", "tied", "biased", "linear_rope"])
def test_written_by_transformers(checkpoints: Callable[..., Path], variant: str) -> None:
    path = checkpoints(variant)
    assert arch_from_config(LlamaConfig.from_pretrained(path).to_dict()) == read_arch(path)


@pytest.mark.parametrize("arch", [ARCH, *LLAMA_ARCHS.values()])
def test_ours_is_read_back_by_us_and_by_transformers(arch: LlamaArch) -> None:
    config = json.loads(json.dumps(config_from_arch(arch, torch.bfloat16)))
    assert arch_from_config(config) == arch
    theirs = LlamaConfig(**config)
    assert arch_from_config(theirs.to_dict()) == arch
    assert theirs.dtype == torch.bfloat16


def test_a_mistral_stays_one(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=20,
        sliding_window=None,
    )
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    own = load_checkpoint(tmp_path / "theirs", dtype=torch.float32)
    save_checkpoint(own, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again) is type(theirs)
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    torch.testing.assert_close(own(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
