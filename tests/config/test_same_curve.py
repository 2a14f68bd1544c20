"""A resumed run has the config of the one that was stopped, where the losses depend on it."""

from __future__ import annotations

import json

import pytest

from qlora_builders.config.checks import check_same_curve, curve_config
from qlora_builders.config.compose import compose
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.config.sections import knobs
from qlora_builders.errors import ConfigError

FREE = {
    "tokenizer.path",  # the tokens are compared
    "data.eval",
    "data.on_error",  # the tokens of the rows that are left
    "training.max_steps",  # the learning rates are
    "training.epochs",
    "training.log_every",
    "training.eval_every",
    "training.async_save",
    "training.save_every",
    "training.keep_last",
    "training.resume",
    "distributed.shard",
    "distributed.cpu_offload",
    "training.samples",
    "loggers",
    "output_dir",
    "overwrite",
    "dry_run",
}


def curve(*overrides: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(json.dumps(curve_config(compose("finetune", overrides))))
    return found


def test_only_what_no_loss_depends_on_may_change() -> None:
    keys = {key for key, knob in knobs(FinetuneConfig).items() if not knob.shapes_curve}
    assert keys == FREE
    assert not FREE & curve().keys()


def test_changes_that_shape_nothing_pass() -> None:
    overrides = ("training.save_every=7", "output_dir=other", "training.epochs=3")
    check_same_curve(curve(), curve(*overrides), "step_4")


def test_all_differing_keys_are_listed_with_both_values() -> None:
    overrides = (
        "training.seed=1",
        "optimizer.lr=0.5",
        "+optimizer.eps=0.1",
        "data.eval=null",
        "method.targets=[q_proj]",
        "components=[{match: lm_head, kind: linear}]",
    )
    with pytest.raises(ConfigError) as caught:
        check_same_curve(curve("data.eval=x.jsonl"), curve(*overrides), "run/step_4")
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "cannot resume from run/step_4 with another config; set these back, or start anew in "
        "another output_dir:"
    )
    assert [line.partition("=")[0] for line in lines] == [
        "components",
        "method.targets",
        "optimizer.eps",
        "optimizer.lr",
        "training.seed",
    ]
    assert "optimizer.eps=0.1, but the checkpoint was trained with not set" in lines
    assert "training.seed=1, but the checkpoint was trained with 0" in lines


def test_checkpoints_from_before_a_key_was_there_or_gone() -> None:
    before = curve() | {"method.components": [{"match": "**", "kind": "linear"}]}
    del before["method.lora_bias"]
    check_same_curve(before, curve(), "run/step_4")
    with pytest.raises(ConfigError, match=r"method\.lora_bias=True, but the .* with not set"):
        check_same_curve(before, curve("method.lora_bias=true"), "run/step_4")


def test_resuming_and_overwriting_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"resume=auto goes on with a run and overwrite=true del"):
        compose("finetune", ["training.resume=auto", "overwrite=true"])
