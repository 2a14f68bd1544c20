"""config.json with values that cannot be: each is refused by the name of its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from qlora_builders.checkpoint import arch_from_config, load_checkpoint
from qlora_builders.checkpoint.formats.hf import KEYS
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LLAMA_ARCHS

SOUND: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
INTEGERS = [key for key, rule in KEYS.items() if rule.kind is int]
NUMBERS = [key for key, rule in KEYS.items() if rule.kind is float]
FLAGS = [key for key, rule in KEYS.items() if rule.kind is bool]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize(
    "value", [True, False, 0, -1, 64.0, 0.5, "64", [64], {"a": 64}, 10**12, 10**400, float("inf")]
)
def test_no_integer_in_range(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        arch_from_config(SOUND | {key: value}, source="x/config.json")
    text = str(caught.value)
    assert text.startswith(f"x/config.json: {key} is {value!r}; expected an integer >= 1 and <= ")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "value", [True, -1, -1e-9, "1", [1], {}, 1e31, 10**400, float("nan"), float("inf")]
)
def test_no_number_in_range(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        arch_from_config(SOUND | {key: value}, source="x/config.json")
    assert str(caught.value).startswith(f"x/config.json: {key} is {value!r}; expected a number >")


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", [None, 0, 1, "false", "", [], {}])
def test_no_flag(key: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        arch_from_config(SOUND | {key: value})
    assert str(caught.value) == f"config.json: {key} is {value!r}; expected true or false"


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
    ({"model_type": None}, "model_type is None; allowed: llama, mistral"),
    ({"model_type": ["llama"]}, "model_type is ['llama']; did you mean 'llama'?"),
    ({"rope_scaling": [2.0]}, "rope_scaling is [2.0]; expected an object, or null"),
    ({"rope_scaling": []}, "rope_scaling is []; expected an object, or null"),
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
    sound = {k: v for k, v in SOUND.items() if k not in ("head_dim", key)}
    if rule.null:
        theirs = LlamaConfig(**sound, **{key: None}).to_dict()
        absent = LlamaConfig(**sound).to_dict()
        assert arch_from_config(sound | {key: None}) == arch_from_config(sound)
        assert theirs[key] == absent[key] or (key, theirs[key]) == ("attention_dropout", None)
    elif key != "rope_theta":
        with pytest.raises(Exception, match=key):
            LlamaConfig(**sound, **{key: None})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [None, {}])
def test_no_scaling(key: str, value: object) -> None:
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


@pytest.mark.parametrize(("key", "value"), [("rope_theta", "null"), ("vocab_size", "1e400")])
def test_in_a_file(tmp_path: Path, key: str, value: str) -> None:
    text = json.dumps(SOUND | {key: 1}).replace(f'"{key}": 1', f'"{key}": {value}')
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        load_checkpoint(tmp_path)
