"""Merging: the merged weights compute what base + adapter computes, in our hands and others'; what
it loses of an adapter is measured, and refused where it is too much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shared import (
    FROZEN,
    QLORA,
    Checkpoints,
    adapted,
    as_stored,
    assert_close,
    checkpoints,
    dequantized,
    edit_tensors,
    logits,
    quiet_peft,
    reference,
    refused,
    stored,
)
from torch import Tensor

from qlora_builders.checkpoint import (
    MergeError,
    delta_survival,
    load_checkpoint,
    merge_adapter,
    read_arch,
    save_adapter,
    save_checkpoint,
    save_merged,
)
from qlora_builders.checkpoint.merge_report import streamed_model
from qlora_builders.config.shipped import demo_path
from qlora_builders.models import llama
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor import NF4Tensor, to_nf4

LORA_HEAD = [{"match": "lm_head", "kind": "lora", "rank": 4, "alpha": 8}]
UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
DORA = [rule | {"use_dora": True} if rule["kind"] != "frozen_nf4" else rule for rule in QLORA]


@pytest.mark.parametrize("plan", [QLORA, DORA])
@pytest.mark.parametrize("variant", ["gqa", "biased", "tied"])
def test_merged_model_computes_base_plus_adapter(variant: str, plan: list) -> None:
    model = adapted(variant, plan)
    before = logits(model)
    merged = merge_adapter(model)
    assert torch.equal(logits(model), before)  # it is left as it is
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    assert not any(isinstance(p, NF4Tensor) for p in merged.parameters())
    assert_close(merged, model)
    unadapted = logits(load_checkpoint(checkpoints(variant), dtype=torch.float32))
    assert (logits(merged) - unadapted).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["gqa", "biased", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_transformers_loads_the_merged_directory(
    tmp_path: Path, variant: str, max_shard_bytes: int
) -> None:
    model = adapted(variant, train=["norm"])
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # trained beside the adapters
    out, source = tmp_path / "merged", checkpoints(variant)
    save_merged(model, out, max_shard_bytes=max_shard_bytes, companions=source)
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert_close(reference(out), model)
    assert_close(load_checkpoint(out, dtype=torch.float32), model)


@pytest.mark.parametrize("with_companions", [False, True])
def test_tied_head_with_an_adapter_is_untied(tmp_path: Path, with_companions: bool) -> None:
    """With companions too, though their config.json ties the weights."""
    model = adapted("tied", LORA_HEAD)
    merged = merge_adapter(model)
    assert not merged.spec.arch.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    assert_close(merged, model)
    # nothing is quantized here, so the originals are the base exactly
    assert_close(merge_adapter(model, base=checkpoints("tied")), model)
    companions = checkpoints("tied") if with_companions else None
    save_merged(model, tmp_path / "out", companions=companions)
    assert not read_arch(tmp_path / "out").tie_word_embeddings
    assert_close(reference(tmp_path / "out"), model)


# ---- onto the original weights ------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_original_weights_as_base(sharded: bool) -> None:
    source = checkpoints("gqa", sharded=sharded)
    model = adapted()
    originals = stored(source)
    merged = dict(merge_adapter(model, base=source).named_parameters())
    assert torch.equal(merged[UP], originals[UP])  # NF4 without an adapter
    delta = model.model.layers[0].mlp.down_proj.lora_delta()
    torch.testing.assert_close(merged[DOWN], originals[DOWN] + delta)
    assert not torch.equal(merge_adapter(model).get_parameter(UP), originals[UP])


@quiet_peft
def test_dora_onto_the_originals_is_peft_on_them(tmp_path: Path) -> None:
    """Lengths are those that were trained, directions those of the originals and the update."""
    plan = [rule for rule in DORA if rule["kind"] != "frozen_nf4"]
    model = adapted("gqa", plan)
    save_adapter(model, tmp_path / "adapter")
    report = save_merged(model, tmp_path / "out", base=checkpoints())
    theirs = PeftModel.from_pretrained(reference(checkpoints()), tmp_path / "adapter")
    assert_close(reference(tmp_path / "out"), theirs)
    assert report.total.relative_delta > 0.1
    assert report.logits.error > 0.01  # the originals are another base


def test_merged_model_does_not_depend_on_the_file(own_copy: Checkpoints) -> None:
    path = own_copy()
    merged = merge_adapter(adapted(), base=path)
    before = {name: p.clone() for name, p in merged.named_parameters()}
    with (path / "model.safetensors").open("r+b") as handle:
        handle.seek(10_000)
        handle.write(bytes(50_000))
    assert all(torch.equal(p, before[name]) for name, p in merged.named_parameters())


def test_trained_parameters_are_not_replaced_by_the_originals() -> None:
    rule = {"match": "layers.0.mlp.up_proj", "kind": "linear", "trainable": True}
    model = adapted("gqa", [*QLORA, rule], train=["norm"])
    with torch.no_grad():
        model.model.norm.weight.add_(1)
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    merged = merge_adapter(model, base=checkpoints())
    assert torch.equal(merged.model.norm.weight, model.model.norm.weight)
    assert torch.equal(merged.get_parameter(UP), model.get_parameter(UP))


def test_sum_is_rounded_once() -> None:
    """Of a float32 original, into bfloat16: as exact as bfloat16 can be."""
    model = adapted(dtype=torch.bfloat16)
    exact = stored(checkpoints())[DOWN] + model.model.layers[0].mlp.down_proj.lora_delta()
    merged = merge_adapter(model, base=checkpoints())
    assert torch.equal(merged.get_parameter(DOWN), exact.bfloat16())


def test_dtype(tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16)
    assert {p.dtype for p in merge_adapter(model).parameters()} == {torch.bfloat16}
    wide = merge_adapter(model, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    save_merged(model, tmp_path / "out", dtype=torch.float16)
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.float16}


# ---- against PEFT -------------------------------------------------------------------------------


@quiet_peft
@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize(
    ("variant", "plan"),
    [("gqa", QLORA), ("biased", [QLORA[0] | {"lora_bias": True}]), ("tied", QLORA)],
)
def test_peft_merges_to_the_same_weights(
    tmp_path: Path, variant: str, plan: list, base: str
) -> None:
    model = adapted(variant, plan)
    save_adapter(model, tmp_path / "adapter")
    theirs = reference(checkpoints(variant))
    if base == "dequantized":
        frozen = [
            {"match": rule["match"], "kind": "linear" if rule["kind"] == "lora" else "frozen_nf4"}
            for rule in plan
        ]
        quantized = load_checkpoint(checkpoints(variant), frozen, dtype=torch.float32)
        theirs.load_state_dict(quantized.state_dict(), strict=False)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    source = checkpoints(variant) if base == "original" else base
    merged = merge_adapter(model, base=source)
    expected = theirs.state_dict()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], rtol=0, atol=1e-6)
    save_merged(model, tmp_path / "merged", base=source)
    assert_close(reference(tmp_path / "merged"), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("match", ["layers.*.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_lora_bias_gives_a_llama_biases(tmp_path: Path, match: str) -> None:
    """PEFT cannot merge it into a layer without a bias; Hugging Face's Llama can have one."""
    rule = {"match": match, "kind": "qlora", "rank": 4, "alpha": 8, "lora_bias": True}
    model = adapted("gqa", [rule])
    save_merged(model, tmp_path / "merged")
    arch = read_arch(tmp_path / "merged")
    assert (arch.attention_bias, arch.mlp_bias) == ("attn" in match, "mlp" in match)
    assert_close(reference(tmp_path / "merged"), model)
    assert_close(merge_adapter(model), model)
    tensors = stored(tmp_path / "merged")
    assert {bool(t.any()) for n, t in tensors.items() if n.endswith(".bias")} == {True, False}


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([FROZEN], "no LoRA adapter to merge; load one first"),
        ([LORA_HEAD[0] | {"lora_bias": True}], "lm_head has a lora_bias, but llama models have"),
    ],
)
def test_nothing_that_merges(tmp_path: Path, plan: list, message: str) -> None:
    refused(message, merge_adapter, adapted("gqa", plan))
    refused(message, save_merged, adapted("gqa", plan), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variant", "base", "waived", "message"),
    [
        ("gqa", "half", False, "not the checkpoint that the model was loaded from"),
        ("tied", "gqa", True, r"embed_tokens\.weight has shape \[61, 64\]"),
        ("gqa", "tied", True, r"has shape \[53, 64\]; the model needs \[61, 64\]"),
        ("deep", "tied", False, r"no tensor 'model\.layers\.2.*; is it the base"),
        ("gqa", "strange", True, r"by 1\d\d% of its norm; this is not its original"),
        ("gqa", "nf4", False, r"nf4: holds 4-bit weights \(.*; give 16- or 32-bit"),
        ("gqa", "empty", False, r"config\.json: missing; expected a Hugging"),
    ],
)
def test_wrong_base(
    tmp_path: Path, own_copy: Checkpoints, variant: str, base: str, waived: bool, message: str
) -> None:
    """By its hash; where that is waived, by the first tensor that is missing or does not fit."""
    path = tmp_path / base
    if base in ("gqa", "tied"):
        path = checkpoints(base)
    elif base == "half":
        path = checkpoints(dtype=torch.bfloat16)
    elif base == "strange":
        file = own_copy() / "model.safetensors"
        path = edit_tensors(file, {k: t.flip(0).clone() for k, t in load_file(file).items()})
    elif base == "nf4":
        save_checkpoint(load_checkpoint(checkpoints(), QLORA[2:3]), path, format="nf4")
    else:
        path.mkdir()
    if variant == "deep":
        arch = replace(read_arch(path), num_layers=3, tie_word_embeddings=False)
        model = llama(arch, LORA_HEAD)
    else:
        model = adapted(variant)
    refused(message, merge_adapter, model, base=path, allow_base_mismatch=waived)
    refused(message, save_merged, model, tmp_path / "out", base=path, allow_base_mismatch=waived)
    assert {folder.name for folder in tmp_path.iterdir()} <= {base, "checkpoint"}


# ---- what is lost -------------------------------------------------------------------------------


def shrink(model: CausalLM, relative_delta: float) -> CausalLM:
    """Scale every update to this share of its weight's norm."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                size = module.weight.to(torch.float32).norm() * relative_delta
                module.lora_B.weight.mul_(size / module.lora_delta().norm())
    return model


def ratio(of: Tensor, to: Tensor, rel: float) -> Any:
    return pytest.approx((of.norm() / to.norm()).item(), rel=rel)


def test_report(tmp_path: Path) -> None:
    """Every figure by hand, for a layer rounded to bfloat16 on the originals."""
    model = shrink(adapted(), 0.02)
    report = save_merged(model, tmp_path / "out", base=checkpoints(), dtype=torch.bfloat16)
    assert len(report.layers) == 12
    (layer,) = (layer for layer in report.layers if layer.name == "layers.0.mlp.down_proj")
    original, written = stored(checkpoints())[DOWN], stored(tmp_path / "out")[DOWN].float()
    slot = model.model.layers[0].mlp.down_proj
    delta, trained = slot.lora_delta(), slot.weight.dequantize()
    assert layer.relative_delta == ratio(delta, original, 1e-5)
    assert layer.error == ratio(written - (original + delta), delta, 1e-5)
    assert layer.deviation == ratio(written - (trained + delta), delta, 1e-5)
    assert layer.kept is None
    assert 0.05 < layer.error < 0.15 < 2 < layer.deviation
    content = json.loads(report.to_json())
    assert content["layers"][layer.name]["error"] == layer.error
    assert content["total"]["deviation"] == report.total.deviation
    assert content["logits"]["top1"] == report.logits.top1


@torch.no_grad()
def test_logits_of_the_report(tmp_path: Path) -> None:
    model = shrink(adapted(), 0.02)
    report = save_merged(model, tmp_path / "out", dtype=torch.bfloat16)
    ids = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(0))
    bare = load_checkpoint(checkpoints(), QLORA, dtype=torch.float32)(ids)
    expected, got = model(ids), reference(tmp_path / "out")(ids).logits
    assert report.logits.error == ratio(got - expected, expected - bare, 1e-3)
    assert report.logits.relative == ratio(got - expected, expected - expected.mean(), 1e-3)
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
        assert torch.equal(parameter, dequantized(model.get_parameter(name)))


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
    merged = as_stored(out, dtype=torch.float32)
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
    assert survival.error == ratio(difference - delta, delta, 1e-3)
    along = (difference * delta).sum() / delta.square().sum()
    assert survival.kept == pytest.approx(along.item(), abs=1e-3)
    assert survival.error == pytest.approx(error, abs=0.005)
    assert survival.kept == pytest.approx(kept, abs=0.02)
