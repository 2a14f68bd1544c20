"""Mistakes that PEFT accepts, in silence or with a warning: each is shown to be, and refused here.

PEFT writes the adapter and loads it back, and its output shows that the mistake had its effect.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from shared import (
    DEPRECATED,
    checkpoints,
    edit_json,
    logits,
    quiet_peft,
    randomize_adapters,
    reference,
    trained_in_peft,
)
from torch import Tensor

from qlora_builders.checkpoint import load_checkpoint, load_with_adapter, save_adapter
from qlora_builders.errors import CheckpointError

pytestmark = quiet_peft


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """(config) -> the directory that PEFT writes, without a word, after training under it."""

    def train(**config: Any) -> Path:
        options = {"target_modules": ["q_proj", "up_proj"]} | config
        trained_in_peft(reference(checkpoints()), **options).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return train


def peft_logits(adapter: Path, *, warns: str | None = None) -> Tensor:
    """What PEFT computes with an adapter directory; `warns` is the most it says about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings(DEPRECATED.partition(":")[0], category=FutureWarning)
        result = logits(PeftModel.from_pretrained(reference(checkpoints()), adapter))
    said = [str(warning.message) for warning in caught]
    assert all(warns is not None and warns in message for message in said), said
    assert bool(said) == (warns is not None)
    return result


def loading_fails(adapter: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_with_adapter(checkpoints(), adapter)


def rename(adapter: Path, new_name: Callable[[str], str | None]) -> None:
    """Each tensor; it is dropped where the new name is None."""
    file = adapter / "adapter_model.safetensors"
    tensors = {new_name(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name is not None}, file)


@pytest.mark.parametrize(
    ("key", "entries", "unused"),
    [
        ("target_modules", ["q_proj", "up_porj"], "up_porj"),
        ("layers_to_transform", [1, 7], "7"),
        ("modules_to_save", ["lm_haed"], "lm_haed"),
    ],
)
def test_an_entry_that_selects_nothing(
    trained: Callable, key: str, entries: list, unused: str
) -> None:
    adapter = trained(**{key: entries})
    peft_logits(adapter)
    loading_fails(adapter, f"{key} entries without a module in the file: {unused}")


def test_extra_keys(trained: Callable) -> None:
    adapter = trained()
    before = peft_logits(adapter)
    file = adapter / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers.5.self_attn.q_proj"
    extra = {
        f"{prefix}.lora_A.weight": torch.ones(4, 64),
        f"{prefix}.lora_B.weight": torch.ones(64, 4),
    }
    save_file(load_file(file) | extra, file)
    assert torch.equal(peft_logits(adapter), before)
    loading_fails(adapter, r"does not fit .*: the layers are 0 to 1")
    save_file({k: v for k, v in load_file(file).items() if k not in extra}, file)
    save_file(load_file(file) | {f"{prefix}.scale": torch.ones(1)}, file)
    assert torch.equal(peft_logits(adapter), before)
    loading_fails(adapter, r"neither lora_A, .*layers\.5\.self_attn\.q_proj\.s")


def test_a_wrong_alpha(tmp_path: Path) -> None:
    """It cannot be seen in the weights; the record beside them knows it."""
    plan = [{"match": "layers.**", "kind": "lora", "rank": 4, "alpha": 8}]
    model = load_checkpoint(checkpoints(), plan, dtype=torch.float32)
    randomize_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    before = peft_logits(tmp_path / "adapter")
    edit_json(tmp_path / "adapter/adapter_config.json", {"lora_alpha": 16})
    assert (peft_logits(tmp_path / "adapter") - before).abs().max() > 0.1
    loading_fails(tmp_path / "adapter", r"rank or alpha differ: .*file: rank 4, scaling 4; ")


def test_keys_with_another_prefix(trained: Callable) -> None:
    adapter = trained()
    rename(adapter, lambda name: name.removeprefix("base_model."))
    ignored = peft_logits(adapter, warns="Found missing adapter keys")
    assert torch.equal(ignored, logits(reference(checkpoints())))  # the base alone
    loading_fails(adapter, "keys must begin with 'base_model")


def test_half_of_the_keys_missing(trained: Callable) -> None:
    adapter = trained()
    rename(adapter, lambda name: None if "layers.1.self_attn" in name else name)
    peft_logits(adapter, warns="Found missing adapter keys")
    with pytest.raises(
        CheckpointError,
        match=r"lacks what adapter_config.json selects: model\.layers\.1\.self_attn\.q_proj$",
    ):
        load_with_adapter(checkpoints(), adapter)


def test_a_saved_module_missing(trained: Callable) -> None:
    """Here PEFT fails too, with a KeyError."""
    adapter = trained(modules_to_save=["input_layernorm"])
    rename(adapter, lambda name: None if "layers.1.input" in name else name)
    loading_fails(adapter, r"selects: model\.layers\.1\.input_layernorm\.weigh")


@pytest.mark.parametrize(
    ("key", "entry"), [("rank_pattern", "q_porj"), ("alpha_pattern", "up_porj")]
)
def test_a_pattern_that_matches_nothing(trained: Callable, key: str, entry: str) -> None:
    adapter = trained()
    edit_json(adapter / "adapter_config.json", {key: {entry: 2}})
    loading_fails(adapter, f"{key} entries without a module in the file: ")


def test_several_mistakes_are_one_message(trained: Callable) -> None:
    adapter = trained()
    changes = {"target_modules": ["z", "a", "q_proj"], "alpha_pattern": {"v_proj": 3}}
    edit_json(adapter / "adapter_config.json", changes)
    with pytest.raises(CheckpointError) as caught:
        load_with_adapter(checkpoints(), adapter)
    for part in (
        "target_modules entries without a module in the file: a, z; ",
        "alpha_pattern entries without a module in the file: v_proj; ",
        "target_modules excludes: model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj",
        "correct the entries, or remove those that are not meant",
    ):
        assert part in str(caught.value)
