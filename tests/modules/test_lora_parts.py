"""DoRA, PiSSA and LoftQ: the formulas written out, and PEFT's layers."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from qlora_builders.modules import LoRALinear
from qlora_builders.modules.lora_parts import row_squares, updated_norms
from qlora_builders.tensor import NF4Tensor

IN, OUT, RANK, ALPHA = 70, 30, 4, 6.0
EITHER_BASE = pytest.mark.parametrize("quantize_base", [True, False])
NITER = "pissa_niter_3"


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def build(**options: Any) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(
        **{"in_features": IN, "out_features": OUT, "rank": RANK, "alpha": ALPHA}
        | {"dtype": torch.float32}
        | options
    )


def dora(**options: Any) -> LoRALinear:
    """A layer as training would leave it."""
    layer = build(use_dora=True, **options)
    with torch.no_grad():
        layer.lora_B.weight.copy_(randn(OUT, RANK, seed=1) / 10)
        layer.lora_magnitude_vector.mul_(1 + randn(OUT, seed=2) / 10)
        if layer.bias is not None:
            layer.bias.copy_(randn(OUT, seed=3))
    return layer


def in_peft(ours: LoRALinear, **options: Any) -> tuple[nn.Module, Any]:
    """A model of PEFT's on our (dequantized) base, and its layer after PEFT's own start."""
    base = nn.Sequential(nn.Linear(IN, OUT, bias=ours.bias is not None))
    base[0].load_state_dict({n: w for n, w in ours.state_dict().items() if "lora" not in n})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **options)
    model = get_peft_model(base, config).train()
    return model, model.base_model.model[0]


def gradients(layer: nn.Module, output: Tensor, x: Tensor) -> dict[str, Tensor]:
    output.backward(randn(*output.shape, seed=5))
    trained = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    return {"output": output, "input": x.grad} | trained


# ---- DoRA ---------------------------------------------------------------------------------------


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


@EITHER_BASE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_doras_outputs_and_gradients_are_those_of_the_formula(
    quantize_base: bool, bias: bool, dropout: float, use_rslora: bool
) -> None:
    layer = dora(quantize_base=quantize_base, bias=bias, dropout=dropout, use_rslora=use_rslora)
    reference = copy.deepcopy(layer)
    x, y = randn(2, 5, IN, seed=4).requires_grad_(), randn(2, 5, IN, seed=4).requires_grad_()
    torch.manual_seed(7)
    got = gradients(layer, layer(x), x)
    torch.manual_seed(7)
    expected = gradients(reference, written_out(reference, y, F.dropout(y, dropout)), y)
    assert set(got) == {
        "output", "input", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name, rtol=2e-5, atol=2e-5)


@EITHER_BASE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_twenty_steps_of_dora_are_those_of_peft(
    quantize_base: bool, bias: bool, dropout: float
) -> None:
    """Losses, gradients and everything that trained, in float32, dropout included."""
    ours = build(use_dora=True, quantize_base=quantize_base, bias=bias, dropout=dropout)
    theirs, layer = in_peft(ours, use_dora=True, lora_dropout=dropout)
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
def test_doras_update_is_what_the_layer_adds(quantize_base: bool) -> None:
    layer, x = dora(quantize_base=quantize_base, bias=True), randn(3, IN)
    merged = layer.weight.to(torch.float32) + layer.lora_delta()
    torch.testing.assert_close(layer(x), F.linear(x, merged, layer.bias))
    torch.testing.assert_close(merged.norm(dim=1), layer.lora_magnitude_vector)
    other = randn(OUT, IN, seed=9)  # onto another base, its rows get the trained lengths too
    lengths = (other + layer.lora_delta(other)).norm(dim=1)
    torch.testing.assert_close(lengths, layer.lora_magnitude_vector)


def test_a_row_of_zeros_stays_one() -> None:
    """PEFT divides zero by zero there."""
    layer = build(use_dora=True)
    state = layer.state_dict()
    state["weight"][3] = 0
    layer.load_state_dict(state)
    layer.init_from_base()
    output = layer(randn(2, IN).requires_grad_())
    output.sum().backward()
    assert not output[:, 3].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    assert layer.lora_delta().isfinite().all()


@EITHER_BASE
def test_doras_output_has_the_inputs_dtype(quantize_base: bool) -> None:
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


# ---- PiSSA --------------------------------------------------------------------------------------


@EITHER_BASE
@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("init", ["pissa", NITER])
def test_pissa_starts_where_peft_starts(init: str, use_rslora: bool, quantize_base: bool) -> None:
    ours = build(init_lora_weights=init, use_rslora=use_rslora, quantize_base=quantize_base)
    _, theirs = in_peft(ours, init_lora_weights=init, use_rslora=use_rslora)
    if init == NITER:  # it draws random numbers
        theirs.base_layer.weight.data.copy_(ours.weight.to(torch.float32))
        torch.manual_seed(3)
        theirs.pissa_init("default", init)
        torch.manual_seed(3)
        ours.init_from_base()
    assert torch.equal(ours.lora_A.weight, theirs.lora_A["default"].weight)
    assert torch.equal(ours.lora_B.weight, theirs.lora_B["default"].weight)
    residual = ours.weight.to(torch.float32) - ours.scaling * ours.lora_B_init @ ours.lora_A_init
    torch.testing.assert_close(residual, theirs.base_layer.weight, rtol=0, atol=1e-6)


@EITHER_BASE
@pytest.mark.parametrize("use_dora", [True, False])
def test_pissa_starts_as_the_base_and_takes_its_principal_part(
    use_dora: bool, quantize_base: bool
) -> None:
    layer = build(init_lora_weights="pissa", use_dora=use_dora, quantize_base=quantize_base)
    weight, x = layer.weight.to(torch.float32), randn(5, IN)
    torch.testing.assert_close(layer(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    principal = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(principal)[:RANK], values[:RANK])
    rest = torch.linalg.svdvals(weight - principal)
    torch.testing.assert_close(rest[0], values[RANK])


@EITHER_BASE
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"dropout": 0.4}])
def test_pissa_outputs_and_gradients_are_those_of_peft(
    options: dict[str, Any], quantize_base: bool
) -> None:
    """PEFT takes the part out of the base, we subtract it; dropout shows the difference if any."""
    ours = build(init_lora_weights="pissa", quantize_base=quantize_base, **options)
    renamed = {"lora_dropout" if k == "dropout" else k: v for k, v in options.items()}
    _, theirs = in_peft(ours, init_lora_weights="pissa", **renamed)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        for own, other, seed in ((ours.lora_A.weight, a, 1), (ours.lora_B.weight, b, 2)):
            other.copy_(own.add_(0.1 * randn(*own.shape, seed=seed)))
    results = []
    for layer, factors in ((ours, (ours.lora_A.weight, ours.lora_B.weight)), (theirs, (a, b))):
        x = randn(5, IN, seed=4).requires_grad_()
        torch.manual_seed(7)
        output = layer(x)
        output.backward(randn(5, OUT, seed=5))
        results.append([output, x.grad, *(factor.grad for factor in factors)])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-5, atol=2e-5)
    delta = ours.lora_delta()
    if not options:
        update = ours.scaling * (
            ours.lora_B.weight @ ours.lora_A.weight - ours.lora_B_init @ ours.lora_A_init
        )
        torch.testing.assert_close(delta, update, rtol=1e-5, atol=1e-6)
    x = randn(5, IN)
    ours.eval()
    merged = ours.weight.to(torch.float32) + delta
    torch.testing.assert_close(ours(x), F.linear(x, merged), rtol=1e-5, atol=2e-5)


# ---- LoftQ --------------------------------------------------------------------------------------


def loftq(original: Tensor, **options: Any) -> LoRALinear:
    layer = build(init_lora_weights="loftq", quantize_base=True, scale_format="none", **options)
    layer.load_state_dict({"weight": original}, strict=False)
    layer.init_from_base(original)
    return layer


def test_loftq_starts_where_peft_starts() -> None:
    """PEFT's decomposition of what bitsandbytes changes; PEFT wants alpha = rank."""
    original = randn(OUT, IN) / 10
    ours = loftq(original, alpha=float(RANK))
    codes, state = bnb.quantize_4bit(original, blocksize=64, quant_type="nf4")
    assert torch.equal(ours.weight.codes, codes.flatten())
    assert torch.equal(ours.weight.scales, state.absmax)
    change = original - ours.weight.dequantize()
    expected = _low_rank_decomposition(change, reduced_rank=RANK)
    torch.testing.assert_close(ours.lora_A.weight.detach(), expected["R"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.lora_B.weight.detach(), expected["L"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_dora", [True, False])
def test_loftq_corrects_the_quantization_whatever_the_scaling(use_dora: bool) -> None:
    original = randn(OUT, IN) / 10
    layer = loftq(original, use_dora=use_dora, use_rslora=True)
    change = original - layer.weight.dequantize()
    best = torch.linalg.svdvals(change)[RANK:].norm()
    left = (original - layer.weight.dequantize() - layer.lora_delta()).norm()
    torch.testing.assert_close(left, best)
    assert left < 0.95 * change.norm()


def test_loftq_cannot_start_over_without_the_original() -> None:
    layer = build(init_lora_weights="loftq", quantize_base=True)
    with pytest.raises(ValueError, match="needs the weight before quantization"):
        layer.reset_lora_parameters()


# ---- any part -----------------------------------------------------------------------------------

# options, and what they add to the layer: trained, and frozen
PARTS: list[tuple[dict[str, Any], set[str], set[str]]] = [
    ({"use_dora": True}, {"lora_magnitude_vector"}, set()),
    ({"init_lora_weights": "pissa"}, set(), {"lora_A_init", "lora_B_init"}),
    ({"init_lora_weights": "loftq", "quantize_base": True}, set(), set()),
]


@EITHER_BASE
@pytest.mark.parametrize(("options", "trained", "frozen"), PARTS)
def test_what_a_part_adds_is_named_and_saved(
    options: dict[str, Any], trained: set[str], frozen: set[str], quantize_base: bool
) -> None:
    """The squares of DoRA are not saved, and follow whatever is loaded."""
    options = {"quantize_base": quantize_base} | options
    layer = build(**options)
    factors = {"lora_A.weight", "lora_B.weight"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == factors | trained
    assert set(layer.state_dict()) == factors | trained | frozen | {"weight"}
    nn.init.normal_(layer.lora_B.weight)
    x, state = randn(2, IN), layer.state_dict()
    for assign in (False, True):
        torch.manual_seed(1)
        other = LoRALinear(IN, OUT, RANK, ALPHA, **options)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert isinstance(layer.weight, NF4Tensor) == options["quantize_base"]
    name, value = next(iter(options.items() - {("quantize_base", True), ("quantize_base", False)}))
    assert layer.extra_repr().endswith(f"rank=4, alpha=6.0, {name}={value!r}")
    doubled = 2 if "lora_A_init" in frozen else 1
    assert (layer.stored_rank, layer.stored_alpha) == (doubled * RANK, doubled * ALPHA)


@pytest.mark.parametrize("options", [options for options, _, _ in PARTS])
def test_meta(options: dict[str, Any]) -> None:
    layer = build(**{"quantize_base": True} | options, device="meta")
    assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "loftq"}, "'loftq' corrects a quantized base, and this one is not"),
        ({"init_lora_weights": "pissa", "rank": 31}, r"rank is 31; .* \[30, 70\] allows 30 at mos"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'; allowed: default, pissa,"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora exclude each other"),
    ],
)
def test_what_cannot_be_started(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
