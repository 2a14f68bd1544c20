"""config.json in both spellings, in and out; what cannot be is refused by the name of its key."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import LLAMA3, SIZES, checkpoints
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from qlora_builders.checkpoint import (
    arch_from_config,
    config_from_arch,
    load_checkpoint,
    read_arch,
    save_checkpoint,
)
from qlora_builders.checkpoint.formats.hf import FAMILY_KEYS, KEYS
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LLAMA_ARCHS, LlamaArch, RopeScaling

SOUND = SIZES | {"model_type": "llama", "head_dim": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# as transformers 4 writes it
OLD_STYLE: dict[str, Any] = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3,
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


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def test_both_spellings() -> None:
    assert arch_from_config(OLD_STYLE) == ARCH
    old = without(OLD_STYLE, "rope_theta", "rope_scaling")
    rope = OLD_STYLE["rope_scaling"] | {"rope_theta": OLD_STYLE["rope_theta"]}
    assert arch_from_config(old | {"rope_parameters": rope}) == ARCH
    # and transformers means the same by them
    new = LlamaConfig(**copy.deepcopy(OLD_STYLE)).to_dict()  # it writes into its arguments
    assert "rope_parameters" in new
    assert arch_from_config(new) == ARCH


def test_first_llama_needs_neither_kv_heads_nor_rope() -> None:
    keys = ("num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps", "hidden_act")
    arch = arch_from_config(without(OLD_STYLE, *keys))
    assert (arch.num_kv_heads, arch.rope_theta, arch.rope_scaling) == (4, 10_000.0, None)
    assert (arch.norm_eps, arch.hidden_act) == (1e-6, "silu")  # transformers' defaults


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, None),
        ({"rope_type": "default"}, None),
        ({"type": "linear", "factor": 2.0}, RopeScaling(rope_type="linear", factor=2.0)),
        (LINEAR, RopeScaling(rope_type="linear", factor=2.0)),
    ],
)
def test_rope_types(rope: dict | None, expected: RopeScaling | None) -> None:
    assert arch_from_config(OLD_STYLE | {"rope_scaling": rope}).rope_scaling == expected


VALUES: dict[type, tuple[str, list[Any]]] = {
    int: (
        "an integer >= 1 and <= ",
        [True, False, 0, -1, 64.0, 0.5, "64", [64], {"a": 64}, 10**12, 10**400, float("inf")],
    ),
    float: (
        "a number >",
        [True, -1, -1e-9, "1", [1], {}, 1e31, 10**400, float("nan"), float("inf")],
    ),
    bool: ("true or false", [None, 0, 1, "false", "", [], {}]),
}


@pytest.mark.parametrize("key", [key for key, rule in KEYS.items() if rule.kind in VALUES])
def test_a_value_of_another_kind_or_out_of_range(key: str) -> None:
    expected, values = VALUES[KEYS[key].kind]
    for value in values:
        with pytest.raises(CheckpointError) as caught:
            arch_from_config(SOUND | {key: value}, source="x/config.json")
        said = f"x/config.json: {key} is {value!r}; expected {expected}"
        assert str(caught.value).startswith(said)


# change of the sound config -> what is said of it
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"attention_dropout": 2}, "attention_dropout is 2; expected a number >= 0 and <= 1, or null"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; expected a number > 0 and <= 1"),
    ({"rope_theta": 0}, "rope_theta is 0; expected a number > 0 and <= 1e+30"),
    ({"rope_theta": None}, "rope_theta is None; expected a number > 0"),
    ({"vocab_size": None}, "vocab_size is None; expected an integer"),
    ({"max_position_embeddings": None}, "max_position_embeddings is None; expected an integer"),
    ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even one"),
    ({"head_dim": None, "num_attention_heads": 6}, "hidden_size is 64 and num_attention_heads 6"),
    ({"head_dim": None, "hidden_size": 60}, "head_dim is 15; rotary embedding needs an even one"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads 3; the first"),
    ({"num_key_value_heads": 8}, "num_attention_heads is 4 and num_key_value_heads 8; the first"),
    ({"hidden_act": "silo"}, "hidden_act is 'silo'; did you mean 'silu'?"),
    ({"hidden_act": None}, "hidden_act is None; expected a string"),
    ({"hidden_act": ["silu"]}, "hidden_act is ['silu']; expected a string"),
    ({"model_type": None}, "model_type is None; allowed: granite, llama, mistral"),
    ({"model_type": ["llama"]}, "model_type is ['llama']; did you mean 'llama'?"),
    ({"rope_scaling": [2.0]}, "rope_scaling is [2.0]; expected an object, or null"),
    ({"rope_scaling": 0}, "rope_scaling is 0; expected an object, or null"),
    ({"rope_parameters": "llama3"}, "rope_parameters is 'llama3'; expected an object, or null"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling: rope type ['linear'] is not"),
    ({"rope_scaling": {"rope_type": None}}, "rope_scaling: rope type None is not supported"),
    ({"rope_scaling": LINEAR | {"factor": None}}, "rope_scaling: factor is None; expected a num"),
    ({"rope_scaling": LINEAR | {"factor": True}}, "rope_scaling: factor is True; expected a num"),
    ({"rope_scaling": LINEAR | {"factor": {}}}, "rope_scaling: factor is an object; one set of"),
    ({"rope_scaling": LINEAR | {"type": "llama3"}}, "rope_type is 'linear' and type 'llama3'; kee"),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64.5}},
        "rope_scaling: original_max_position_embeddings is 64.5; expected an integer",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}},
        "rope_parameters: full_attention is an object; one set of numbers for all layers",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "5e5"}},
        "rope_parameters.rope_theta is '5e5'; expected a number > 0",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
        "rope_theta and rope_parameters.rope_theta contradict each other",
    ),
    (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
        "rope_parameters and rope_scaling contradict each other",
    ),
    (
        {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 4.0}},
        "rope_parameters and rope_scaling contradict each other",
    ),
    ({"model_type": "gemma"}, "model_type is 'gemma'; allowed: granite, llama, mistral"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0; expected an integer"),
    ({"model_type": "qwen2", "use_sliding_window": 1}, "use_sliding_window is 1; expected true"),
    ({"model_type": "qwen2", "layer_types": ["full"]}, "layer_types is ['full']; expected a list"),
    ({"model_type": "smollm3", "no_rope_layers": [2, 0]}, "no_rope_layers is [2, 0]; expected a"),
    ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0; expected a number > 0"),
    ({"rope_scaling": {"rope_type": "proportional"}}, "allowed: default, linear, dynamic, yarn, l"),
    ({"rope_scaling": LONG | {"long_factor": [1]}}, "long_factor has 1 numbers; it must have 8"),
    ({"rope_scaling": LONG | {"short_factor": [0]}}, "short_factor is [0]; expected a list of nu"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' needs short_factor, long_factor"),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2}, "rope_theta": 1},
        "rope_theta is 1.0 and rotated dimensions 16; rope type 'yarn' needs more than 1",
    ),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope type 'linear' needs factor"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
        "needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    ({"rope_theta": "nan"}, "rope_theta is 'nan'; expected a number > 0 and <= 1e+30"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None; expected a number > 0"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; expected a number > 0"),
    (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "low_freq_factor and high_freq_factor must differ",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[str(c) for c, _ in CHANGES])
def test_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        arch_from_config(SOUND | change)
    assert str(caught.value).startswith("config.json: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_null_is_the_default_where_it_is_so_for_transformers(key: str) -> None:
    """transformers checks no number inside, so that rope_theta is left out."""
    rule = KEYS[key]
    sound = without(SOUND, "head_dim", key)
    if rule.null:
        theirs = LlamaConfig(**sound, **{key: None}).to_dict()
        absent = LlamaConfig(**sound).to_dict()
        assert arch_from_config(sound | {key: None}) == arch_from_config(sound)
        assert theirs[key] == absent[key] or (key, theirs[key]) == ("attention_dropout", None)
    elif key != "rope_theta":
        with pytest.raises(Exception, match=key):
            LlamaConfig(**sound, **{key: None})


def test_missing_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match="missing keys: hidden_size, vocab_size"):
        arch_from_config(without(OLD_STYLE, "vocab_size", "hidden_size"))


def test_no_scaling() -> None:
    for key in ("rope_scaling", "rope_parameters"):
        for value in (None, {}):
            assert arch_from_config(SOUND | {key: value}) == arch_from_config(SOUND)


def test_both_spellings_may_stand_beside_each_other_when_they_agree() -> None:
    both = {
        "rope_theta": 500_000,
        "rope_scaling": LLAMA3,
        "rope_parameters": LLAMA3 | {"rope_theta": 5e5, "type": "llama3"},
    }
    arch = arch_from_config(SOUND | both)
    assert arch == arch_from_config(SOUND | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    assert arch.rope_theta == 5e5


def test_every_published_size_is_in_range() -> None:
    for arch in LLAMA_ARCHS.values():
        assert all(rule.holds(getattr(arch, rule.field)) for rule in KEYS.values())
        read = [FAMILY_KEYS[name] for name in arch.family.keys if name in FAMILY_KEYS]
        assert all(rule.holds(getattr(arch, rule.field)) for rule in read)


@pytest.mark.parametrize("variant", ["gqa", "tied", "biased", "linear_rope"])
def test_written_by_transformers(variant: str) -> None:
    path = checkpoints(variant)
    assert arch_from_config(LlamaConfig.from_pretrained(path).to_dict()) == read_arch(path)


@pytest.mark.parametrize("arch", [ARCH, *LLAMA_ARCHS.values()])
def test_ours_is_read_back_by_us_and_by_transformers(arch: LlamaArch) -> None:
    config = json.loads(json.dumps(config_from_arch(arch, torch.bfloat16)))
    assert arch_from_config(config) == arch
    theirs = AutoConfig.for_model(**config)
    assert arch_from_config(theirs.to_dict()) == arch
    assert theirs.dtype == torch.bfloat16


def test_a_mistral_stays_one(tmp_path: Path) -> None:
    config = MistralConfig(**SIZES, head_dim=20, sliding_window=None)
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
