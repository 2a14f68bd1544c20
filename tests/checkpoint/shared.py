"""What the tests of checkpoints share: types of fixtures, a plan, changes to files, equal bits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora_builders.modules import CausalLM
from qlora_builders.tensor import NF4Tensor

Checkpoints = Callable[..., Path]
Reference = Callable[[Path], LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
Build = Callable[..., CausalLM]
Randomize = Callable[[nn.Module], None]

# of tiny models, as transformers names them
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FROZEN = {"match": "layers.**", "kind": "frozen_nf4"}
# every kind of adapter and base
QLORA = [
    {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8},
    {"match": "layers.1.**", "kind": "qlora", "rank": 3, "alpha": 5, "use_rslora": True},
    {"match": "layers.*.mlp.up_proj", "kind": "frozen_nf4"},
    {"match": "layers.0.self_attn.k_proj", "kind": "lora", "rank": 2, "alpha": 2},
]


# PEFT asks transformers for an attribute that transformers renamed
DEPRECATED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
quiet_peft = pytest.mark.filterwarnings(DEPRECATED)


def in_peft(model: LlamaForCausalLM, **config: Any) -> PeftModel:
    """A copy with adapters."""
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config
    return get_peft_model(copy.deepcopy(model), LoraConfig(**options))


def trained_in_peft(model: LlamaForCausalLM, **config: Any) -> PeftModel:
    """As training would leave it: all that trains is random."""
    return randomized(in_peft(model, **config))


def randomized(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def edit_json(file: Path, changes: dict[str, Any]) -> Path:
    """None removes a key. Gives the folder."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return file.parent


def edit_tensors(file: Path, changes: dict[str, Tensor | None]) -> Path:
    """None removes a tensor. Gives the folder."""
    tensors = load_file(file) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    return file.parent


def assert_same_bits(a: nn.Module, b: nn.Module, *, quantized: int) -> None:
    """Of all parameters, so many of them quantized."""
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        other = theirs.pop(name)
        assert (type(parameter), parameter.dtype) == (type(other), other.dtype), name
        if isinstance(parameter, NF4Tensor):
            quantized -= 1
            assert parameter.format == other.format, name
            for field in NF4Tensor.tensor_fields:
                assert torch.equal(getattr(parameter, field), getattr(other, field)), (name, field)
        else:
            assert torch.equal(parameter, other), name
    assert not theirs
    assert quantized == 0


def assert_same_files(a: Path, b: Path) -> None:
    """The same tensors in both safetensors files."""
    before, after = load_file(a), load_file(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
