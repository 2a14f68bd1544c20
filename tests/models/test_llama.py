"""The builder: plans of every kind on a small Llama, what trains, tied heads, numerics of QLoRA."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from archs import tiny_arch
from torch import nn

from qlora_builders.errors import PlanError
from qlora_builders.models import ComponentRule, LlamaArch, linear_slots, llama, other_modules
from qlora_builders.modules import CausalLM, FrozenNF4Linear, Linear, LoRALinear
from qlora_builders.tensor import NF4Tensor

ARCH = tiny_arch(num_layers=4)
TIED = replace(ARCH, tie_word_embeddings=True)
QLORA = {"kind": "qlora", "rank": 4, "alpha": 8}


def kinds(model: CausalLM) -> dict[str, str]:
    """Slot -> what fills it, read off the modules themselves and not off the plan."""
    found = {}
    for slot in linear_slots(model.spec.arch):
        layer = model.get_submodule(slot if slot == "lm_head" else f"model.{slot}")
        quantized = isinstance(layer.weight, NF4Tensor)
        if isinstance(layer, LoRALinear):
            found[slot] = "qlora" if quantized else "lora"
        else:
            assert isinstance(layer, FrozenNF4Linear if quantized else Linear)
            found[slot] = "frozen_nf4" if quantized else "linear"
    return found


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def randomize_adapters(model: nn.Module) -> None:
    """B starts at zero, which would hide the adapter from every comparison."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B.weight, std=0.1)


# ---- plans --------------------------------------------------------------------------------------


def test_no_plan_is_plain_and_frozen() -> None:
    model = llama(ARCH)
    assert Counter(kinds(model).values()) == {"linear": 29}
    assert trained(model) == set()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("layers.*.self_attn.{q,k,v}_proj", r"layers\.\d\.self_attn\.[qkv]_proj"),
        ("layers.[0-1].**", r"layers\.[01]\..*"),
    ],
)
def test_a_rule_fills_what_it_matches(pattern: str, matched: str) -> None:
    for slot, kind in kinds(llama(ARCH, [{"match": pattern, **QLORA}])).items():
        assert kind == ("qlora" if re.fullmatch(matched, slot) else "linear"), slot


def test_the_plan_of_the_design() -> None:
    model = llama(
        ARCH,
        [
            {"match": "layers.*.self_attn.*_proj", "kind": "qlora", "rank": 16, "alpha": 32},
            {"match": "layers.*.mlp.*_proj", "kind": "frozen_nf4"},
            {"match": "layers.[2-3].mlp.down_proj", **QLORA, "rank": 32, "block_size": 32},
            {"match": "layers.0.**", "kind": "linear"},
            {"match": "lm_head", "kind": "lora", "rank": 8, "alpha": 16},
        ],
    )
    assert {m.rank for m in model.modules() if isinstance(m, LoRALinear)} == {8, 16, 32}
    found = kinds(model)
    assert {k for slot, k in found.items() if slot.startswith("layers.0.")} == {"linear"}
    assert found["layers.1.self_attn.o_proj"] == "qlora"
    assert found["layers.1.mlp.down_proj"] == "frozen_nf4"
    assert found["layers.3.mlp.down_proj"] == "qlora"
    assert model.model.layers[3].mlp.down_proj.weight.format.block_size == 32
    assert found["lm_head"] == "lora"


def test_spec_remembers_what_was_built() -> None:
    rule = ComponentRule(match="lm_head", kind="lora", rank=2, alpha=2)
    spec = llama(ARCH, [rule], train=["norm"], device="meta").spec
    assert (spec.arch, spec.components, spec.train) == (ARCH, (rule,), ("norm",))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "layers.*.self_attn.q_porj", **QLORA}, "did you mean 'q_proj'"),
        ({"match": "layers.99.**", **QLORA}, "the layers are 0 to 3"),
        ({"match": "lm_head", "kind": "qlora", "rnak": 4}, "did you mean 'rank'"),
        ({"match": "layers.*.input_layernorm", **QLORA}, "no name has a part 'input_layernorm'"),
    ],
)
def test_mistakes_in_rules_reach_the_builder(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        llama(ARCH, [rule], device="meta")


# ---- what trains --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["norm"], {"model.norm.weight"}),
        (["embed_tokens"], {"model.embed_tokens.weight"}),
        (
            ["layers.[0-1].input_layernorm"],
            {f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)},
        ),
        (
            ["layers.2.{input,post_attention}_layernorm", "norm"],
            {
                "model.layers.2.input_layernorm.weight",
                "model.layers.2.post_attention_layernorm.weight",
                "model.norm.weight",
            },
        ),
    ],
)
def test_train_patterns(patterns: list[str], names: set[str]) -> None:
    model = llama(ARCH, train=patterns)
    assert trained(model) == names
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else torch.bfloat16), name


def test_everything_trains_in_float32() -> None:
    model = llama(ARCH, [{"match": "**", "kind": "linear", "trainable": True}], train=["**"])
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    # computing in bfloat16 all the same
    assert model(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_other_modules_are_all_that_is_not_a_slot() -> None:
    model = llama(ARCH, device="meta")
    owners = {
        name.rpartition(".")[0].removeprefix("model.") for name, _ in model.named_parameters()
    }
    assert owners == {*linear_slots(ARCH), *other_modules(ARCH)}


ROWS_NEED_ADAPTER = "embed_tokens\\[...\\] is stored with an adapter, and the plan has none"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["nrom"], "train 'nrom': .*did you mean 'norm'"),
        (["layers.9.input_layernorm"], "the layers are 0 to 3"),
        (["lm_head"], "a linear slot trains with a rule {match: ..., kind: linear, trainable: tr"),
        (["embed_tokens[3]"], ROWS_NEED_ADAPTER),
        (["embed_tokens[60-61]"], "there is no token 61; the vocabulary has 61"),
        (["embed_tokens[3,5]", "embed_tokens[5]"], r"named twice: \[5\]"),
    ],
)
def test_mistakes_in_train(train: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        llama(ARCH, train=train, device="meta")


def test_rows_of_the_embedding_train_beside_adapters_alone() -> None:
    rules, rows = [{"match": "layers.**", **QLORA}], ["embed_tokens[3,5-7]"]
    for arch in (ARCH, TIED):
        names = {name for name in trained(llama(arch, rules, train=rows)) if ".lora_" not in name}
        assert all("token_adapter" in name for name in names), names
        assert names
    with pytest.raises(PlanError, match="both embed_tokens and some of its rows; drop one"):
        llama(ARCH, rules, train=["embed_tokens", *rows], device="meta")
    with pytest.raises(PlanError, match="leave the head to them"):
        llama(TIED, [*rules, {"match": "lm_head", **QLORA}], train=rows, device="meta")


# ---- tied heads ---------------------------------------------------------------------------------


def test_tied_head_is_the_embedding() -> None:
    model = llama(TIED)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["frozen_nf4", "qlora"])
def test_tied_head_cannot_be_quantized(kind: str) -> None:
    options = {"rank": 4, "alpha": 8} if kind == "qlora" else {}
    with pytest.raises(PlanError, match=r"'lm_head'.* cannot be quantized; use kind 'lora'"):
        llama(TIED, [{"match": "lm_head", "kind": kind, **options}], device="meta")
    llama(ARCH, [{"match": "lm_head", "kind": kind, **options}], device="meta")  # untied


def test_tied_head_trains_with_the_embedding_or_not_at_all() -> None:
    rule = {"match": "lm_head", "kind": "linear", "trainable": True}
    with pytest.raises(PlanError, match="to train both add 'embed_tokens' to `train`"):
        llama(TIED, [rule], device="meta")
    model = llama(TIED, [rule], train=["embed_tokens"])
    assert trained(model) == {"model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_head_takes_an_adapter_on_a_frozen_embedding_only() -> None:
    rule = {"match": "lm_head", "kind": "lora", "rank": 2, "alpha": 4}
    model = llama(TIED, [rule])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert trained(model) == {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
    with pytest.raises(PlanError, match="which trains itself; drop this rule or 'embed_tokens'"):
        llama(TIED, [rule], train=["embed_tokens"], device="meta")


def test_dora_is_for_all_adapters_or_none() -> None:
    """A PEFT file has one switch."""
    adapter = {"match": "layers.**", "kind": "qlora", "rank": 2, "alpha": 4}
    head = {"match": "lm_head", "kind": "lora", "rank": 2, "alpha": 4, "use_dora": True}
    with pytest.raises(PlanError, match=r"'lm_head' has use_dora and rule 'layers\.\*\*' has not"):
        llama(ARCH, [adapter, head], device="meta")
    llama(ARCH, [adapter | {"use_dora": True}, head], device="meta")


# ---- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [ARCH, replace(TIED, attention_bias=True, mlp_bias=True)])
@pytest.mark.parametrize("scale_format", ["geometric", "none"])
def test_qlora_equals_lora_on_the_dequantized_weights(arch: LlamaArch, scale_format: str) -> None:
    """Logits, adapter gradients and norm gradients, every bit of them, in float32 on CPU."""
    torch.manual_seed(0)
    quantized, plain = (
        llama(
            arch,
            [
                {"match": "layers.**", "kind": adapter, "rank": 4, "alpha": 8, **options},
                {"match": "layers.*.mlp.up_proj", "kind": frozen, **up_options},
            ],
            train=["norm"],
            dtype=torch.float32,
        )
        for adapter, options, frozen, up_options in (
            ("qlora", {"scale_format": scale_format}, "frozen_nf4", {"block_size": 32}),
            ("lora", {}, "linear", {}),
        )
    )
    randomize_adapters(quantized)
    plain.load_state_dict(quantized.state_dict(), strict=True)
    assert not any(isinstance(p, NF4Tensor) for p in plain.parameters())

    ids = torch.randint(arch.vocab_size, (2, 24))
    weight = torch.randn(2, 24, arch.vocab_size)
    outputs = {}
    for name, model in (("quantized", quantized), ("plain", plain)):
        outputs[name] = model(ids)
        (outputs[name] * weight).sum().backward()
    assert torch.equal(outputs["quantized"], outputs["plain"])
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            assert torch.equal(parameter.grad, gradients[name]), name


def test_quantizing_changes_the_logits() -> None:
    """Otherwise the test above could compare two plain models."""
    torch.manual_seed(0)
    plain = llama(ARCH, dtype=torch.float32)
    quantized = llama(ARCH, [{"match": "layers.**", "kind": "frozen_nf4"}], dtype=torch.float32)
    quantized.load_state_dict(plain.state_dict())
    ids = torch.randint(ARCH.vocab_size, (1, 8))
    assert (quantized(ids) - plain(ids)).abs().max() > 1e-3


def test_compute_dtype_is_that_of_the_logits() -> None:
    model = llama(ARCH, [{"match": "layers.**", **QLORA}], compute_dtype=torch.float32)
    assert model(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
