"""state_dict of an NF4 model is a plain one, and loading it gives back every bit."""

from __future__ import annotations

import pytest
import torch
from shared import assert_same_bits, checkpoints

from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.models import llama
from qlora_builders.tensor import NF4Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAN = [
    {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8},
    {"match": "layers.0.mlp.*", "kind": "frozen_nf4", "block_size": 32},
    {"match": "layers.1.mlp.*", "kind": "frozen_nf4", "scale_format": "none"},
]
PLAIN_PLAN = [
    {"match": "layers.**", "kind": "lora", "rank": 4, "alpha": 8},
    {"match": "layers.*.mlp.*", "kind": "linear"},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("variant", ["biased", "tied"])
def test_three_round_trips(variant: str, dtype: torch.dtype, assign: bool) -> None:
    first = load_checkpoint(checkpoints(variant), PLAN, dtype=dtype)
    model = first
    for _ in range(3):
        state = model.state_dict()
        assert not any(isinstance(tensor, NF4Tensor) for tensor in state.values())
        model = llama(first.spec.arch, PLAN, dtype=dtype, device="meta" if assign else "cpu")
        model.load_state_dict(state, strict=True, assign=assign)
        assert_same_bits(first, model, quantized=14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["biased", "tied"])
def test_same_state_dict_loads_into_the_plain_build(variant: str, dtype: torch.dtype) -> None:
    quantized = load_checkpoint(checkpoints(variant), PLAN, dtype=dtype)
    plain = llama(quantized.spec.arch, PLAIN_PLAN, dtype=dtype)
    plain.load_state_dict(quantized.state_dict(), strict=True)
    own = dict(plain.named_parameters())
    assert set(own) == {name for name, _ in quantized.named_parameters()}
    for name, parameter in quantized.named_parameters():
        weight = parameter.dequantize() if isinstance(parameter, NF4Tensor) else parameter
        assert torch.equal(own[name], weight), name
