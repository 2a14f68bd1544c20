"""DoRA: outputs, gradients and norms against the formula written out, and against PEFT's layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qlora_builders.modules import LoRALinear
from qlora_builders.modules.lora_parts import row_squares, updated_norms
from qlora_builders.tensor import NF4Tensor

IN, OUT, RANK, ALPHA = 70, 30, 4, 8.0
EITHER_BASE = pytest.mark.parametrize("quantize_base", [True, False])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dora(**options: Any) -> LoRALinear:
    """A layer as training would leave it."""
    torch.manual_seed(0)
    layer = LoRALinear(IN, OUT, RANK, ALPHA, **{"use_dora": True, "dtype": torch.float32} | options)
    with torch.no_grad():
        layer.lora_B.weight.copy_(randn(OUT, RANK, seed=1) / 10)
        layer.lora_magnitude_vector.mul_(1 + randn(OUT, seed=2) / 10)
        if layer.bias is not None:
            layer.bias.copy_(randn(OUT, seed=3))
    return layer


def written_out(layer: LoRALinear, x: Tensor, dropped: Tensor) -> Tensor:
    """The formula, everything materialized; the adapter sees `dropped`."""
    weight = layer.weight.to(torch.float32)
    update = layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight)
    norm = (weight + update).norm(dim=1).detach()
    stretch = layer.lora_magnitude_vector / norm
    seen = F.linear(dropped, weight)
    extra = (stretch - 1) * seen + stretch * F.linear(dropped, update)
    bias = None if layer.bias is None else layer.bias.float()
    return F.linear(x, weight, bias) + extra


def results(layer: nn.Module, output: Tensor, x: Tensor) -> dict[str, Tensor]:
    output.backward(randn(*output.shape, seed=5))
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {"output": output, "input": x.grad} | gradients


@EITHER_BASE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(
    quantize_base: bool, bias: bool, dropout: float, use_rslora: bool
) -> None:
    layer = dora(quantize_base=quantize_base, bias=bias, dropout=dropout, use_rslora=use_rslora)
    reference = copy.deepcopy(layer)
    x, y = randn(2, 5, IN, seed=4).requires_grad_(), randn(2, 5, IN, seed=4).requires_grad_()
    torch.manual_seed(7)
    got = results(layer, layer(x), x)
    torch.manual_seed(7)
    expected = results(reference, written_out(reference, y, F.dropout(y, dropout)), y)
    assert set(got) == {
        "output", "input", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name, rtol=2e-5, atol=2e-5)


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(IN, OUT, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


@EITHER_BASE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_twenty_steps_are_those_of_peft(quantize_base: bool, bias: bool, dropout: float) -> None:
    """Losses, gradients and everything that trained, in float32, dropout included."""
    torch.manual_seed(0)
    ours = LoRALinear(
        IN, OUT, RANK, ALPHA, use_dora=True, quantize_base=quantize_base, bias=bias,
        dropout=dropout, dtype=torch.float32,
    )  # fmt: skip
    base = Model(bias)
    base.proj.load_state_dict({n: w for n, w in ours.state_dict().items() if "lora" not in n})
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=True, target_modules=["proj"]
    )
    theirs = get_peft_model(base, config).train()
    layer = theirs.base_model.model.proj
    pairs = {
        "lora_A.weight": layer.lora_A["default"].weight,
        "lora_B.weight": layer.lora_B["default"].weight,
        "lora_magnitude_vector": layer.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        pairs["lora_A.weight"].copy_(ours.lora_A.weight)
    torch.testing.assert_close(
        ours.lora_magnitude_vector, pairs["lora_magnitude_vector"], rtol=1e-6, atol=0
    )

    def curve(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        losses = []
        for step in range(20):
            torch.manual_seed(step)
            loss = (model(randn(16, IN, seed=step)) - randn(16, OUT, seed=100)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    expected = curve(theirs)
    assert curve(ours) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0]
    assert not torch.equal(ours.lora_magnitude_vector, ours.base_squares.sqrt())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, pairs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_norms_without_the_sum(size: float, dtype: torch.dtype) -> None:
    """Against float64, from updates much smaller than the weight to much larger ones."""
    weight = randn(600, 90, dtype=dtype)
    a, b = randn(8, 90, seed=1), size * randn(600, 8, seed=2)
    got = updated_norms(row_squares(weight), a @ weight.float().t(), a, b, 0.5)
    expected = (weight.double() + 0.5 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@EITHER_BASE
@pytest.mark.parametrize("bias", [True, False])
def test_an_untrained_adapter_changes_nothing(quantize_base: bool, bias: bool) -> None:
    layer = LoRALinear(IN, OUT, RANK, ALPHA, use_dora=True, quantize_base=quantize_base, bias=bias)
    x = randn(3, IN)
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight.to(torch.float32), layer.bias), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(layer.lora_delta(), torch.zeros(OUT, IN), rtol=0, atol=1e-6)


@EITHER_BASE
def test_the_update_is_what_the_layer_adds(quantize_base: bool) -> None:
    layer = dora(quantize_base=quantize_base, bias=True)
    x = randn(3, IN)
    merged = layer.weight.to(torch.float32) + layer.lora_delta()
    torch.testing.assert_close(layer(x), F.linear(x, merged, layer.bias))
    torch.testing.assert_close(merged.norm(dim=1), layer.lora_magnitude_vector)
    other = randn(OUT, IN, seed=9)  # onto another base, its rows get the trained lengths too
    lengths = (other + layer.lora_delta(other)).norm(dim=1)
    torch.testing.assert_close(lengths, layer.lora_magnitude_vector)


def test_a_row_of_zeros_stays_one() -> None:
    """PEFT divides zero by zero there."""
    layer = LoRALinear(IN, OUT, RANK, ALPHA, use_dora=True)
    state = layer.state_dict()
    state["weight"][3] = 0
    layer.load_state_dict(state)
    layer.init_from_base()
    x = randn(2, IN).requires_grad_()
    output = layer(x)
    output.sum().backward()
    assert not output[:, 3].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    assert layer.lora_delta().isfinite().all()


@EITHER_BASE
def test_the_inputs_dtype_decides(quantize_base: bool) -> None:
    layer = dora(dtype=torch.bfloat16, quantize_base=quantize_base, bias=True)
    x = randn(3, IN, dtype=torch.bfloat16)
    output = layer(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert layer.lora_magnitude_vector.grad.dtype == torch.float32
    expected = written_out(layer, x.float(), x.float())
    tolerance = 0.02 * expected.abs().max().item()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=tolerance)


def test_small_magnitude_changes_survive_bfloat16() -> None:
    """1.005 is 1.0078 in bfloat16."""
    layer = dora()
    with torch.no_grad():
        layer.lora_B.weight.zero_()
        layer.lora_magnitude_vector.copy_(1.005 * layer.base_squares.sqrt())
    x = randn(400, IN, dtype=torch.bfloat16)
    base = F.linear(x, layer.weight.bfloat16()).float()
    slope = (layer(x).float() * base).sum() / base.square().sum()
    assert slope.item() == pytest.approx(1.005, abs=1e-3)


@EITHER_BASE
def test_state_dict(quantize_base: bool) -> None:
    """The magnitudes are saved, the squares are not, and they follow whatever is loaded."""
    layer = dora(quantize_base=quantize_base)
    state = layer.state_dict()
    assert set(state) == {"weight", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    torch.manual_seed(1)
    for assign in (False, True):
        other = LoRALinear(IN, OUT, RANK, ALPHA, use_dora=True, quantize_base=quantize_base)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(randn(2, IN)), layer(randn(2, IN)))
    assert torch.equal(copy.deepcopy(layer)(randn(2, IN)), layer(randn(2, IN)))
    assert isinstance(layer.weight, NF4Tensor) == quantize_base


def test_meta() -> None:
    layer = LoRALinear(IN, OUT, RANK, ALPHA, use_dora=True, device="meta", quantize_base=True)
    assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)
    assert layer.base_squares.is_meta


def test_magnitudes_train_and_are_named() -> None:
    layer = dora()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
    }  # fmt: skip
    assert layer.extra_repr().endswith("rank=4, alpha=8.0, use_dora=True")
    assert LoRALinear(IN, OUT, RANK, ALPHA).lora_magnitude_vector is None


def test_dora_and_lora_bias_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="lora_bias and use_dora exclude each other"):
        LoRALinear(IN, OUT, RANK, ALPHA, use_dora=True, lora_bias=True)
