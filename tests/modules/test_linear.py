"""FrozenNF4Linear and LoRALinear: what they hold, what they compute, what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.modules import FrozenNF4Linear, Linear, LoRALinear
from qlora_builders.tensor import NF4Format, NF4Tensor, to_nf4

IN, OUT, RANK, ALPHA = 70, 30, 4, 8.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(**options: Any) -> LoRALinear:
    """A LoRALinear whose B is not zero, so that its adapter does something."""
    torch.manual_seed(0)
    layer = LoRALinear(IN, OUT, RANK, ALPHA, **options)
    with torch.no_grad():
        layer.lora_B.weight.copy_(randn(OUT, RANK, seed=5))
    return layer


def parameters(layer: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    return {
        name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()
    }


# ---- FrozenNF4Linear ----------------------------------------------------------------------------


def test_frozen_nf4_linear_takes_the_options_of_to_nf4() -> None:
    options = {"block_size": 32, "scale_block_size": 7, "scale_format": "none"}
    layer = FrozenNF4Linear(IN, OUT, **options)
    assert isinstance(layer.weight, NF4Tensor)
    assert layer.weight.format.stored == options
    assert FrozenNF4Linear(IN, OUT).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_dtype", DTYPES)
def test_frozen_nf4_linear_computes_in_the_inputs_dtype(
    input_dtype: torch.dtype, bias: bool
) -> None:
    layer = FrozenNF4Linear(IN, OUT, bias)
    x = randn(2, 5, IN, dtype=input_dtype)
    own_bias = None if layer.bias is None else layer.bias.to(input_dtype)
    expected = F.linear(x, layer.weight.dequantize(input_dtype), own_bias)
    assert torch.equal(layer(x), expected)


def test_frozen_nf4_linear_starts_as_nn_linear_does() -> None:
    torch.manual_seed(0)
    layer = FrozenNF4Linear(IN, OUT, True, dtype=torch.float32)
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT)
    assert torch.equal(layer.weight.dequantize(), to_nf4(plain.weight).dequantize())
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("layer", [FrozenNF4Linear, Linear])
def test_nothing_is_allocated_on_meta(layer: type[nn.Module]) -> None:
    meta = layer(IN, OUT, device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta(torch.empty(3, IN, device="meta")).shape == (3, OUT)


def test_repr_says_what_the_weight_is() -> None:
    frozen = FrozenNF4Linear(IN, OUT)
    assert repr(frozen) == (
        "FrozenNF4Linear(in_features=70, out_features=30, bias=False, weight=NF4)"
    )
    described = lora(dtype=torch.bfloat16, bias=True).extra_repr()
    assert described == (
        "in_features=70, out_features=30, bias=True, weight=torch.bfloat16, rank=4, alpha=8.0"
    )


# ---- LoRALinear: what it holds ------------------------------------------------------------------


@pytest.mark.parametrize("quantize_base", [True, False, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters(dtype: torch.dtype, bias: bool, quantize_base: bool | None) -> None:
    """Frozen ones in `dtype`, of which the weight alone is quantized; None: without an adapter."""
    layer: nn.Module
    expected: dict[str, Any] = {"weight": ((OUT, IN), dtype, False)}
    if bias:
        expected["bias"] = ((OUT,), dtype, False)
    if quantize_base is None:
        layer = FrozenNF4Linear(IN, OUT, bias, dtype=dtype)
    else:
        layer = LoRALinear(
            IN, OUT, RANK, ALPHA, bias=bias, quantize_base=quantize_base, dtype=dtype, dropout=0.1
        )
        expected["lora_A.weight"] = ((RANK, IN), torch.float32, True)
        expected["lora_B.weight"] = ((OUT, RANK), torch.float32, True)
    assert parameters(layer) == expected
    assert bias or layer.bias is None
    quantized = {n for n, p in layer.named_parameters() if isinstance(p, NF4Tensor)}
    assert quantized == ({"weight"} if quantize_base is not False else set())
    assert LoRALinear(IN, OUT, RANK, ALPHA).weight.dtype == torch.float32  # torch's default


def test_b_starts_at_zero_and_a_does_not() -> None:
    layer = lora()
    before = layer.lora_A.weight.detach().clone()
    layer.reset_lora_parameters()
    assert not torch.equal(layer.lora_A.weight, before)
    bound = 1 / math.sqrt(IN)  # kaiming_uniform with a = sqrt(5)
    for each in (layer, LoRALinear(IN, OUT, RANK, ALPHA)):
        assert not each.lora_B.weight.any()
        assert 0.8 * bound < each.lora_A.weight.abs().max() <= bound


def test_lora_bias_starts_at_zero_and_is_part_of_the_update() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(IN, OUT, RANK, ALPHA, lora_bias=True, quantize_base=True, bias=True)
    assert parameters(layer)["lora_B.bias"] == ((OUT,), torch.float32, True)
    assert not layer.lora_B.bias.any()
    x = randn(3, IN)
    before = layer(x)
    with torch.no_grad():
        layer.lora_B.bias.copy_(randn(OUT, seed=4))
    delta = layer.lora_bias_delta()
    torch.testing.assert_close(delta, ALPHA / RANK * layer.lora_B.bias)
    torch.testing.assert_close(layer(x), before + delta)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.lora_B.bias.grad, torch.full((OUT,), 3 * ALPHA / RANK))
    layer.reset_lora_parameters()
    assert not layer.lora_B.bias.any()
    assert lora().lora_B.bias is None
    assert lora().lora_bias_delta() is None


# ---- LoRALinear: what it computes ---------------------------------------------------------------


@pytest.mark.parametrize("quantize_base", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_base_plus_scaled_update(bias: bool, rslora: bool, quantize_base: bool) -> None:
    layer = lora(bias=bias, use_rslora=rslora, quantize_base=quantize_base)
    assert layer.scaling == (ALPHA / 2 if rslora else ALPHA / RANK)
    update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(layer.lora_delta(), update)
    assert layer.lora_delta().dtype == torch.float32
    x = randn(2, 3, IN)
    merged = layer.weight.to(torch.float32) + update
    torch.testing.assert_close(layer(x), F.linear(x, merged, layer.bias))


@pytest.mark.parametrize("quantize_base", [True, False])
@pytest.mark.parametrize(
    ("input_dtype", "base_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_the_inputs_dtype_decides_and_adapter_gradients_are_float32(
    input_dtype: torch.dtype, base_dtype: torch.dtype, quantize_base: bool
) -> None:
    layer = lora(dtype=base_dtype, quantize_base=quantize_base, bias=True)
    x = randn(3, IN, dtype=input_dtype)
    output = layer(x)
    assert output.dtype == input_dtype
    output.sum().backward()
    for adapter in (layer.lora_A, layer.lora_B):
        assert adapter.weight.grad is not None
        assert adapter.weight.grad.dtype == torch.float32
    exact = F.linear(
        x.float(), layer.weight.to(torch.float32) + layer.lora_delta(), layer.bias.float()
    )
    tolerance = 1e-5 if input_dtype == torch.float32 else 0.05 * exact.abs().max().item()
    torch.testing.assert_close(output.float(), exact, rtol=1e-5, atol=tolerance)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    layer, reference = lora(dropout=0.5), lora()
    reference.load_state_dict(layer.state_dict())
    x = randn(4, IN)
    layer.eval()
    assert torch.equal(layer(x), reference(x))
    layer.train()
    assert not torch.equal(layer(x), reference(x))
    torch.manual_seed(7)
    output = layer(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5, training=True)
    update = F.linear(F.linear(dropped, layer.lora_A.weight), layer.lora_B.weight)
    assert torch.equal(output, F.linear(x, layer.weight) + layer.scaling * update)


def test_no_dropout_draws_no_random_numbers() -> None:
    layer = lora().train()
    state = torch.get_rng_state()
    layer(randn(2, IN))
    assert torch.equal(torch.get_rng_state(), state)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be an integer >= 1"),
        ({"rank": 2.0}, r"rank is 2\.0; it must be an integer"),
        ({"alpha": 0}, "alpha is 0; it must be > 0 and finite"),
        ({"alpha": -1.0}, r"alpha is -1\.0; it must be > 0"),
        ({"alpha": math.inf}, "alpha is inf; it must be > 0 and finite"),
        ({"alpha": math.nan}, "alpha is nan; it must be > 0 and finite"),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout is -0\.1; it must be in \[0, 1\)"),
        ({"block_size": 32}, "block_size need quantize_base=True; the base weight is not quant"),
        ({"quantize_base": True, "block_size": 33}, "block_size is 33; allowed: 32, 64"),
        (
            {"quantize_base": NF4Format(), "block_size": 32},
            "block_size contradict quantize_base=NF4",
        ),
    ],
)
def test_bad_lora_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(**{"in_features": IN, "out_features": OUT, "rank": 4, "alpha": 8.0, **options})


def test_bad_nf4_options_and_dtype() -> None:
    with pytest.raises(ValueError, match="'nonee'; did you mean 'none'"):
        FrozenNF4Linear(IN, OUT, scale_format="nonee")
    with pytest.raises(ValueError, match=r"cannot stand for dtype torch\.float64"):
        FrozenNF4Linear(IN, OUT, dtype=torch.float64)
