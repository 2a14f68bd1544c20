"""What a config asks the builder for."""

from __future__ import annotations

from qlora_builders.config.compose import compose
from qlora_builders.config.plan import plan_rules, train_patterns


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
