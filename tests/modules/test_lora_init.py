"""PiSSA and LoftQ: the start is PEFT's, the base stays, and the function is the base's."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from qlora_builders.modules import LoRALinear
from qlora_builders.tensor import NF4Tensor

IN, OUT, RANK, ALPHA = 96, 64, 4, 6.0
EITHER_BASE = pytest.mark.parametrize("quantize_base", [True, False])
NITER = "pissa_niter_3"


def build(init: str = "pissa", **options: Any) -> LoRALinear:
    torch.manual_seed(0)
    chosen = {"dtype": torch.float32} | options
    return LoRALinear(IN, OUT, RANK, chosen.pop("alpha", ALPHA), init_lora_weights=init, **chosen)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_peft(ours: LoRALinear, **options: Any) -> Any:
    """PEFT's layer on our (dequantized) base, after its own PiSSA start."""
    base = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    base[0].weight.data.copy_(ours.weight.to(torch.float32))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **options)
    return get_peft_model(base, config).base_model.model[0]


@EITHER_BASE
@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("init", ["pissa", NITER])
def test_pissa_starts_where_peft_starts(init: str, use_rslora: bool, quantize_base: bool) -> None:
    ours = build(init, use_rslora=use_rslora, quantize_base=quantize_base)
    theirs = in_peft(ours, init_lora_weights=init, use_rslora=use_rslora)
    if init == NITER:  # it draws random numbers
        theirs.base_layer.weight.data.copy_(ours.weight.to(torch.float32))
        torch.manual_seed(3)
        theirs.pissa_init("default", init)
        torch.manual_seed(3)
        ours.init_from_base()
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert torch.equal(ours.lora_A.weight, a)
    assert torch.equal(ours.lora_B.weight, b)
    residual = ours.weight.to(torch.float32) - ours.scaling * ours.lora_B_init @ ours.lora_A_init
    torch.testing.assert_close(residual, theirs.base_layer.weight, rtol=0, atol=1e-6)


@EITHER_BASE
@pytest.mark.parametrize("use_dora", [True, False])
def test_pissa_starts_as_the_base_and_takes_its_principal_part(
    use_dora: bool, quantize_base: bool
) -> None:
    layer = build(use_dora=use_dora, quantize_base=quantize_base)
    weight = layer.weight.to(torch.float32)
    x = randn(5, IN)
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
    ours = build(quantize_base=quantize_base, **options)
    renamed = {"lora_dropout" if k == "dropout" else k: v for k, v in options.items()}
    theirs = in_peft(ours, init_lora_weights="pissa", **renamed)
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


def test_only_the_adapter_trains_and_all_of_it_is_saved() -> None:
    layer = build(quantize_base=True)
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"lora_A.weight", "lora_B.weight"}
    other = build("pissa", quantize_base=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(randn(2, IN)), layer(randn(2, IN)))
    assert layer.extra_repr().endswith("rank=4, alpha=6.0, init_lora_weights='pissa'")
    assert (layer.stored_rank, layer.stored_alpha) == (8, 12.0)
    assert build("default").lora_A_init is None


def loftq(original: Tensor, **options: Any) -> LoRALinear:
    layer = build("loftq", quantize_base=True, scale_format="none", **options)
    layer.load_state_dict({"weight": original}, strict=False)
    layer.init_from_base(original)
    return layer


def test_loftq_starts_where_peft_starts() -> None:
    """PEFT's decomposition of what bitsandbytes changes; PEFT wants alpha = rank."""
    original = randn(OUT, IN) / 10
    ours = loftq(original, alpha=float(RANK))
    assert isinstance(ours.weight, NF4Tensor)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "loftq"}, "'loftq' corrects a quantized base, and this one is not"),
        (
            {"init_lora_weights": "pissa", "rank": 65},
            r"rank is 65; .* \[64, 96\] allows 64 at most",
        ),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights is 'olora'; allowed: default, pissa, l",
        ),
    ],
)
def test_what_cannot_be_started(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(**{"in_features": IN, "out_features": OUT, "rank": 4, "alpha": 8.0} | options)


def test_loftq_cannot_start_over_without_the_original() -> None:
    layer = build("loftq", quantize_base=True)
    with pytest.raises(ValueError, match="needs the weight before quantization"):
        layer.reset_lora_parameters()


def test_meta() -> None:
    for init in ("pissa", "loftq"):
        layer = build(init, quantize_base=True, device="meta")
        assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)
