"""What a config asks the builder for."""

from __future__ import annotations

import pytest
from archs import tiny_arch

from qlora_builders.config.compose import compose
from qlora_builders.config.schema import plan_rules, train_patterns
from qlora_builders.config.sections import PRESETS
from qlora_builders.models import llama
from qlora_builders.models.components import KINDS, takes

PRESET = {
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": "default",
}


def test_rules_of_the_user_come_after_those_of_the_method() -> None:
    mine = "components=[{match: lm_head, kind: lora, rank: 4, alpha: 8}]"
    cfg = compose("finetune", ["method.rank=3", mine, "train=[norm]", "train_tokens=[5,7]"])
    match = "layers.*.*.*_proj"
    assert plan_rules(cfg) == [
        {"match": "layers.**", "kind": "frozen_nf4", "block_size": 64},
        {"match": match, "kind": "qlora", **PRESET, "rank": 3, "block_size": 64},
        {"match": "lm_head", "kind": "lora", "rank": 4, "alpha": 8},
    ]
    assert train_patterns(cfg) == ["norm", "embed_tokens[5,7]"]


def test_lora_leaves_the_base_alone() -> None:
    cfg = compose("finetune", ["method=lora", "method.targets=[q_proj]", "method.dropout=0.1"])
    rule = {"match": "layers.*.*.q_proj", "kind": "lora", **PRESET, "dropout": 0.1}
    assert plan_rules(cfg) == [rule]
    assert train_patterns(cfg) == []


def test_full_training_names_everything() -> None:
    cfg = compose("finetune", ["method=full", "train=[norm]"])
    assert plan_rules(cfg) == [{"match": "**", "kind": "linear", "trainable": True}]
    assert train_patterns(cfg) == ["**", "norm"]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_method_takes_every_option_of_its_rules(method: str) -> None:
    """Those of the components, but for `trainable`, which only plain layers have."""
    adapter, base = PRESETS[method]
    assert {*adapter, *base} == set(takes(*KINDS[method]))
    values = {
        "rank": "3", "alpha": "5.0", "dropout": "0.1", "use_rslora": "true", "use_dora": "false",
        "lora_bias": "true", "init_lora_weights": "pissa", "block_size": "32",
        "scale_block_size": "8", "scale_format": "none", "scale_search": "true",
    }  # fmt: skip
    words = [f"method.{name}={values[name]}" for name in (*adapter, *base)]
    *others, rule = plan_rules(compose("finetune", [f"method={method}", *words]))
    assert {name: str(rule[name]).lower() for name in (*adapter, *base)} == {
        name: values[name] for name in (*adapter, *base)
    }
    for other in others:
        assert {name: other[name] for name in base} == {name: rule[name] for name in base}
    assert llama(tiny_arch(), [*others, rule], device="meta")
