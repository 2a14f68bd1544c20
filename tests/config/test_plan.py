"""What a config asks the builder for."""

from __future__ import annotations

import pytest

from qlora_builders.config.compose import compose
from qlora_builders.config.plan import plan_rules, train_patterns
from qlora_builders.config.sections import PRESETS
from qlora_builders.models import LlamaArch, llama
from qlora_builders.models.components import KINDS, takes

TINY = LlamaArch(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_position_embeddings=32,
)


def test_rules_of_the_user_come_after_those_of_the_method() -> None:
    mine = "components=[{match: lm_head, kind: lora, rank: 4, alpha: 8}]"
    cfg = compose("finetune", ["method.rank=3", mine, "train=[norm]"])
    rules = plan_rules(cfg)
    assert [(rule["match"], rule["kind"]) for rule in rules] == [
        ("layers.**", "frozen_nf4"),
        ("layers.*.*.{q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj}", "qlora"),
        ("lm_head", "lora"),
    ]
    assert rules[1]["rank"] == 3
    assert train_patterns(cfg) == ["norm"]


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
    assert llama(TINY, [*others, rule], device="meta")
