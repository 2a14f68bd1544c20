"""What merging loses of an adapter: measured, and refused where it is too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import QLORA, adapted, checkpoints, logits, reference
from torch import Tensor

from qlora_builders.checkpoint import (
    MergeError,
    delta_survival,
    load_checkpoint,
    merge_adapter,
    save_merged,
    stored_plan,
)
from qlora_builders.checkpoint.merge_report import streamed_model
from qlora_builders.config.shipped import demo_path
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor import NF4Tensor, to_nf4

DOWN = "model.layers.0.mlp.down_proj.weight"


def shrink(model: CausalLM, relative_delta: float) -> CausalLM:
    """Scale every update to this share of its weight's norm."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                size = module.weight.to(torch.float32).norm() * relative_delta
                module.lora_B.weight.mul_(size / module.lora_delta().norm())
    return model


def test_report(tmp_path: Path) -> None:
    """Every figure by hand, for a layer rounded to bfloat16 on the originals."""
    model = shrink(adapted(), 0.02)
    report = save_merged(model, tmp_path / "out", base=checkpoints(), dtype=torch.bfloat16)
    assert len(report.layers) == 12
    (layer,) = (layer for layer in report.layers if layer.name == "layers.0.mlp.down_proj")
    original = load_file(checkpoints() / "model.safetensors")[DOWN]
    written = load_file(tmp_path / "out/model.safetensors")[DOWN].float()
    slot = model.model.layers[0].mlp.down_proj
    delta, trained = slot.lora_delta(), slot.weight.dequantize()
    size = delta.norm()
    assert layer.relative_delta == pytest.approx((size / original.norm()).item(), rel=1e-5)
    assert layer.error == pytest.approx(
        ((written - (original + delta)).norm() / size).item(), rel=1e-5
    )
    assert layer.deviation == pytest.approx(
        ((written - (trained + delta)).norm() / size).item(), rel=1e-5
    )
    assert layer.kept is None
    assert 0.05 < layer.error < 0.15 < 2 < layer.deviation
    content = json.loads(report.to_json())
    assert content["layers"][layer.name]["error"] == layer.error
    assert content["total"]["deviation"] == report.total.deviation
    assert content["logits"]["top1"] == report.logits.top1


def test_logits_of_the_report(tmp_path: Path) -> None:
    model = shrink(adapted(), 0.02)
    report = save_merged(model, tmp_path / "out", dtype=torch.bfloat16)
    ids = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(0))
    untrained = load_checkpoint(checkpoints(), QLORA, dtype=torch.float32)
    with torch.no_grad():
        expected, got = model(ids), reference(tmp_path / "out")(ids).logits
        bare = untrained(ids)
    error = (got - expected).norm()
    assert report.logits.error == pytest.approx((error / (expected - bare).norm()).item(), rel=1e-3)
    spread = (expected - expected.mean()).norm()
    assert report.logits.relative == pytest.approx((error / spread).item(), rel=1e-3)
    agreement = (got.argmax(-1) == expected.argmax(-1)).float().mean()
    assert report.logits.top1 == agreement.item()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variant", ["gqa", "tied", "biased"])
def test_streamed_model_is_the_loaded_one(variant: str, sharded: bool) -> None:
    path = checkpoints(variant, sharded=sharded)
    streamed = streamed_model(path)
    expected = logits(load_checkpoint(path, dtype=torch.float32))
    for _ in range(2):
        assert torch.equal(logits(streamed), expected)
        assert all(parameter.is_meta for parameter in streamed.parameters())


def test_an_update_that_rounding_erases_is_refused(tmp_path: Path) -> None:
    model = shrink(adapted(), 0.002)
    message = r"of the weights is 0\.\d+; the logits are off by .*; allowed: 0\.5\. Nothing was"
    with pytest.raises(MergeError, match=message) as caught:
        save_merged(model, tmp_path / "out", dtype=torch.bfloat16)
    assert caught.value.report.total.error > 0.5
    assert not list(tmp_path.iterdir())
    with pytest.raises(MergeError, match="dtype=float32, or accept it with a larger max_error"):
        merge_adapter(model, dtype=torch.bfloat16)
    report = save_merged(model, tmp_path / "out", dtype=torch.bfloat16, max_error=2)
    assert report.total.error == caught.value.report.total.error
    assert save_merged(model, tmp_path / "exact", dtype=torch.float32).total.error == 0


def test_an_untrained_adapter_loses_nothing() -> None:
    """Though the logits of this base differ by the noise of two kernels."""
    model = load_checkpoint(demo_path("base"), QLORA)
    merged = merge_adapter(model)
    for name, parameter in merged.named_parameters():
        own = model.get_parameter(name)
        assert torch.equal(parameter, own.dequantize() if isinstance(own, NF4Tensor) else own)


# ---- quantizing the merged weights --------------------------------------------------------------


@pytest.mark.parametrize("format", ["nf4", "bnb-4bit"])
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_an_update_that_nf4_erases_is_refused(tmp_path: Path, base: str, format: str) -> None:
    model = shrink(adapted(), 0.01)
    source = checkpoints() if base == "original" else base
    with pytest.raises(
        MergeError, match=r"is \d.* and -?\d+% of the update survives NF4; .* Use format=hf"
    ) as caught:
        save_merged(model, tmp_path / "out", base=source, format=format)
    total = caught.value.report.total
    assert total.kept is not None
    if base == "dequantized" and format == "nf4":
        assert abs(total.kept) < 0.1  # the codes do not move
    assert total.error > 0.9
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "scale_format"), [("nf4", "geometric"), ("bnb-4bit", "bnb")])
def test_what_was_accepted_by_name_is_quantized_where_the_model_was(
    tmp_path: Path, format: str, scale_format: str
) -> None:
    model, out = shrink(adapted(), 0.3), tmp_path / "out"
    report = save_merged(model, out, format=format, max_error=3)
    merged = load_checkpoint(out, stored_plan(out), dtype=torch.float32)
    assert merged.spec.base.format == format
    weights = dict(merged.named_parameters())
    quantized = {name for name, p in weights.items() if isinstance(p, NF4Tensor)}
    assert quantized == {n for n, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    assert {weights[name].format.scale_format for name in quantized} == {scale_format}
    plain = merge_adapter(model)
    for name in quantized:
        expected = to_nf4(plain.get_parameter(name).data, scale_format=scale_format)
        assert torch.equal(weights[name].dequantize(), expected.dequantize())
    assert report.logits.error < 1
    assert (logits(merged) - logits(plain)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("relative_delta", "error", "kept"),
    [(0.01, 1.077, 0.015), (0.05, 1.033, 0.277), (0.1, 0.784, 0.844), (0.3, 0.319, 0.994)],
)
def test_survival_in_nf4(relative_delta: float, error: float, kept: float) -> None:
    """Onto NF4 weights, as bitsandbytes quantizes, in its own hands and in ours."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(512, 512)

    def theirs(tensor: Tensor) -> Tensor:
        codes, state = functional.quantize_4bit(tensor, quant_type="nf4", blocksize=64)
        return functional.dequantize_4bit(codes, state)

    weight = theirs(weight)
    delta = torch.randn(512, 16) @ torch.randn(16, 512)
    delta *= relative_delta * weight.norm() / delta.norm()
    difference = theirs(weight + delta) - theirs(weight)
    survival = delta_survival(weight, delta, scale_format="none")
    assert survival.error == pytest.approx(
        ((difference - delta).norm() / delta.norm()).item(), rel=1e-3
    )
    along = (difference * delta).sum() / delta.square().sum()
    assert survival.kept == pytest.approx(along.item(), abs=1e-3)
    assert survival.error == pytest.approx(error, abs=0.005)
    assert survival.kept == pytest.approx(kept, abs=0.02)
