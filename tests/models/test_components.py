"""Component rules: what each kind takes, what is refused, and how a plan is decided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_builders.errors import PlanError
from qlora_builders.models import ComponentRule, resolve
from qlora_builders.models.components import KINDS, build_linear, takes
from qlora_builders.modules import FrozenNF4Linear, Linear, LoRALinear
from qlora_builders.tensor import NF4Tensor

SLOTS = [f"layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkv"] + ["lm_head"]


def rule(**options: Any) -> ComponentRule:
    return ComponentRule(**{"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8} | options)


def build(component: ComponentRule, bias: bool = True) -> Any:
    return build_linear(component, 48, 32, bias=bias, device=None, dtype=torch.bfloat16)


# ---- one rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "qlroa"}, "unknown kind 'qlroa'; did you mean 'qlora'"),
        ({"kind": "adapter"}, "unknown kind 'adapter'; allowed: frozen_nf4, linear, lora, qlora"),
        ({"kind": None}, "match and kind must be strings"),
        ({"match": 3}, "match and kind must be strings"),
        ({"rank": None}, "kind 'qlora' needs rank and alpha"),
        ({"alpha": None}, "kind 'qlora' needs rank and alpha"),
        ({"kind": "lora", "rank": None}, "kind 'lora' needs rank and alpha"),
        (
            {"kind": "frozen_nf4", "base": "mxfp4"},
            "kind 'frozen_nf4' has base 'nf4', which base 'mx",
        ),
        ({"kind": "", "rank": None, "alpha": None}, "kind missing, or base and adapter"),
        ({"kind": "", "base": "mxfp5"}, "unknown base 'mxfp5'; did you mean 'mxfp4'"),
        ({"kind": "", "adapter": "lore"}, "unknown adapter 'lore'; did you mean 'lora'"),
        ({"kind": "", "base": "mxfp4"}, "'mxfp4' does not take 'rank'; it takes no options"),
        (
            {"kind": "", "base": "mxfp4", "adapter": "lora", "block_size": 32},
            r"'mxfp4 \+ lora' does not take 'block_size'; it takes rank, ",
        ),
        ({"kind": "lora", "block_size": 64}, "kind 'lora' does not take 'block_size'"),
        ({"kind": "frozen_nf4"}, "kind 'frozen_nf4' does not take 'rank'; it takes block_size"),
        ({"kind": "linear"}, "kind 'linear' does not take 'rank'; it takes trainable"),
        ({"trainable": True}, "kind 'qlora' does not take 'trainable'"),
        ({"rank": 0}, "rank is 0; it must be an integer >= 1"),
        ({"rank": 4.0}, "rank is 4.0; it must be an integer"),
        ({"rank": "16"}, "rank is '16'; it must be an integer"),
        ({"rank": True}, "rank is True; it must be an integer"),
        ({"alpha": 0}, "alpha is 0; it must be > 0"),
        ({"alpha": "1e1"}, "alpha is '1e1'; it must be a number"),
        ({"alpha": float("nan")}, "alpha is nan; it must be > 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout is -0.1; it must be in \[0, 1\)"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; it must be true or false"),
        ({"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
        (
            {"init_lora_weights": "pisa"},
            "init_lora_weights is 'pisa'; allowed: default, pissa, loftq",
        ),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights is 'pissa_niter_0'; allowed: "),
        ({"init_lora_weights": True}, "init_lora_weights is True; allowed: "),
        ({"kind": "lora", "init_lora_weights": "loftq"}, "corrects a quantized base, and this one"),
        ({"use_dora": "on"}, "use_dora is 'on'; it must be true or false"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora exclude each other"),
        ({"kind": "frozen_nf4", "use_dora": True}, "kind 'frozen_nf4' does not take"),
        ({"lora_bias": "all"}, "lora_bias is 'all'; it must be true or false"),
        ({"block_size": 48}, "block_size is 48; allowed: 32, 64"),
        ({"block_size": 0}, "block_size is 0; allowed: 32, 64"),
        ({"block_size": 64.0}, "block_size is 64.0; it must be an integer"),
        ({"scale_block_size": 0}, "scale_block_size is 0; it must be an integer >= 1"),
        ({"scale_format": "geometrc"}, "scale_format is 'geometrc'; did you mean 'geometric'"),
        ({"scale_format": ""}, "scale_format is ''"),
    ],
)
def test_a_bad_rule_names_itself(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        rule(**options)
    assert str(caught.value).startswith(f"rule {options.get('match', 'layers.**')!r}")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"match": "x", "kind": "qlora", "rnak": 8}, "unknown option 'rnak'; did you mean 'rank'"),
        ({"match": "x", "kind": "lora", "use_doora": True}, "unknown option 'use_doora'; did you"),
        ({"match": "x"}, "rule 'x': kind missing"),
        ({"kind": "linear"}, "match missing"),
        ({}, "match and kind missing"),
        ("layers.**", "rule 'layers.\\*\\*' is not a mapping; write {match: ..., kind: linear | "),
    ],
)
def test_parse_refuses(mapping: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ComponentRule.parse(mapping)


def test_parse_takes_mappings_and_rules() -> None:
    parsed = ComponentRule.parse({"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8})
    assert parsed == rule()
    assert ComponentRule.parse(parsed) is parsed


def test_options_are_those_given() -> None:
    given = {"rank": 4, "alpha": 8, "dropout": 0.0, "use_rslora": False}
    assert rule(**given).options == given
    assert ComponentRule(match="x", kind="linear").options == {}


@pytest.mark.parametrize("kind", KINDS)
def test_trains(kind: str) -> None:
    adapter = {"rank": 1, "alpha": 1} if "rank" in takes(*KINDS[kind]) else {}
    assert ComponentRule(match="x", kind=kind, **adapter).trains == (kind in ("lora", "qlora"))
    for trainable in (True, False):
        rule = ComponentRule(match="x", kind="linear", trainable=trainable)
        assert rule.trains == trainable


@pytest.mark.parametrize(
    ("parts", "kind", "name"),
    [
        ({"base": "nf4"}, "frozen_nf4", "frozen_nf4"),
        ({"base": "none"}, "linear", "linear"),
        ({"base": "nf4", "adapter": "lora"}, "qlora", "qlora"),
        ({"kind": "qlora", "base": "nf4", "adapter": "lora"}, "qlora", "qlora"),
        ({"adapter": "lora"}, "lora", "lora"),
        ({"base": "mxfp4"}, "", "mxfp4"),
        ({"base": "mxfp4", "adapter": "lora"}, "", "mxfp4 + lora"),
    ],
)
def test_base_and_adapter_are_the_long_form_of_a_kind(
    parts: dict[str, str], kind: str, name: str
) -> None:
    adapter = {"rank": 2, "alpha": 4} if "adapter" in parts else {}
    rule = ComponentRule(match="x", **parts, **adapter)
    assert (rule.kind, rule.name) == (kind, name)
    assert ComponentRule.parse(rule.spelled) == rule
    assert ("kind" in rule.spelled) == bool(kind)
    if kind:
        assert rule == ComponentRule(match="x", kind=kind, **adapter)


# ---- a plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            rule(block_size=32, scale_format="bnb", use_dora=True, init_lora_weights="loftq"),
            {"kind": "frozen_nf4", "block_size": 32, "scale_format": "bnb"},
        ),
        (rule(kind="lora", dropout=0.1, use_rslora=True), {"kind": "linear"}),
        (ComponentRule(match="layers.**", kind="linear", trainable=True), {"kind": "linear"}),
        (
            ComponentRule(match="layers.**", kind="frozen_nf4", scale_search=True),
            {"kind": "frozen_nf4", "scale_search": True},
        ),
    ],
)
def test_frozen_keeps_the_base(given: ComponentRule, expected: dict[str, Any]) -> None:
    assert given.frozen() == ComponentRule(match="layers.**", **expected)
    assert not given.frozen().trains


def test_the_last_matching_rule_decides_alone() -> None:
    general, exception = rule(dropout=0.1), rule(match="layers.1.**", rank=8)
    plan = resolve([general, exception], SLOTS)
    assert list(plan) == SLOTS
    assert plan["layers.0.self_attn.q_proj"] is general
    assert plan["layers.1.self_attn.q_proj"] is exception  # nothing is inherited
    assert plan["lm_head"] == ComponentRule(match="lm_head", kind="linear")
    assert resolve([exception, general], SLOTS)["layers.1.self_attn.q_proj"] is general


def test_a_miss_names_the_rule_and_rules_are_counted() -> None:
    with pytest.raises(PlanError, match=r"rule of kind 'qlora': .*q_porj.*'q_proj'"):
        resolve([rule(), rule(match="layers.*.self_attn.q_porj")], SLOTS)
    with pytest.raises(PlanError, match="10,001 rules; at most 10,000, so write patterns"):
        resolve([rule()] * 10_001, SLOTS)


# ---- one layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", [False, True])
def test_build_linear(trains: bool) -> None:
    layer = build(ComponentRule(match="x", kind="linear", trainable=trains))
    assert type(layer) is Linear
    for parameter in (layer.weight, layer.bias):
        assert parameter.dtype == (torch.float32 if trains else torch.bfloat16)
        assert parameter.requires_grad == trains


def test_build_frozen_nf4() -> None:
    layer = build(ComponentRule(match="x", kind="frozen_nf4", block_size=32, scale_format="none"))
    assert type(layer) is FrozenNF4Linear
    assert isinstance(layer.weight, NF4Tensor)
    assert (layer.weight.format.block_size, layer.weight.format.scale_format) == (32, "none")
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_build_adapter(kind: str) -> None:
    layer = build(rule(kind=kind, rank=3, alpha=7, dropout=0.25, use_rslora=True), bias=False)
    assert type(layer) is LoRALinear
    assert isinstance(layer.weight, NF4Tensor) == (kind == "qlora")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias is None
    assert layer.dropout.p == 0.25
    assert layer.scaling == 7 / 3**0.5
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert {n: tuple(p.shape) for n, p in trained.items()} == {
        "lora_A.weight": (3, 48),
        "lora_B.weight": (32, 3),
    }
    biased = build(rule(kind=kind, rank=3, alpha=7, lora_bias=True), bias=False)
    assert biased.lora_B.bias.shape == (32,)
    # adapters are never quantized
    assert all(type(p.data) is torch.Tensor and p.dtype == torch.float32 for p in trained.values())
