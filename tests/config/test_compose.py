"""Every shipped YAML composes; every mistake in an override or file has one readable message."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from own_configs import write_own

from qlora_builders.config.browse import find_configs, validate
from qlora_builders.config.compose import compose, save_config
from qlora_builders.config.own_files import config_folders
from qlora_builders.config.schema import (
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    MergeConfig,
)
from qlora_builders.config.shipped import demo_path
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError

SHIPPED = find_configs(config_folders())
EXPERIMENTS = [name for name in SHIPPED if name.startswith("experiment/")]


def test_there_are_configs() -> None:
    assert len(SHIPPED) >= 14
    assert len(EXPERIMENTS) >= 4


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_is_valid(name: str) -> None:
    assert validate(name) == []


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_small_deltas(name: str) -> None:
    lines = SHIPPED[name].read_text("utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    assert len(lines) <= 15


def test_types() -> None:
    merge = ["adapter.path=a", "output_dir=b"]
    assert type(compose("finetune")) is FinetuneConfig
    assert type(compose("inspect")) is FinetuneConfig
    assert type(compose("evaluate")) is EvaluateConfig
    assert type(compose("generate", ["prompt=hi"])) is GenerateConfig
    assert type(compose("merge", merge)) is MergeConfig


@pytest.mark.parametrize(
    ("given", "checkpointing", "compile"),
    [("true", "full", "on"), ("false", "none", "off"), ("True", "full", "on")],
)
def test_switches_may_be_booleans(
    tmp_path: Path, given: str, checkpointing: str, compile: str
) -> None:
    keys = ("activation_checkpointing", "compile")
    lines = ["training:", *(f"  {key}: {given}" for key in keys)]
    write_own(tmp_path, {"experiment/mine": "\n".join(lines)})
    write_own(tmp_path, {"experiment/off": "training: {compile: off}\n"})
    cfg = compose("finetune", ["experiment=off"], config_dir=tmp_path)
    assert cfg.training.compile == "off"  # which YAML takes for a boolean
    overrides = [f"training.{key}={given}" for key in keys]
    for cfg in (
        compose("finetune", overrides),
        compose("finetune", ["experiment=mine"], config_dir=tmp_path),
    ):
        assert cfg.training.activation_checkpointing == checkpointing
        assert cfg.training.compile == compile


def test_defaults() -> None:
    cfg = compose("finetune")
    assert cfg.checkpoint.dir == str(demo_path("base"))
    assert cfg.data.train == str(demo_path("train.jsonl"))
    assert cfg.data.eval == str(demo_path("eval.jsonl"))
    assert cfg.optimizer["component"] == "torch.optim.AdamW"
    assert cfg.output_dir.startswith("runs/2")
    assert ":" not in cfg.output_dir


def test_own_training_data_is_not_judged_on_the_demo() -> None:
    assert compose("finetune", ["data.train=x.jsonl"]).data.eval is None
    assert compose("finetune", ["data.train=x.jsonl", "data.eval=y"]).data.eval == "y"
    assert compose("evaluate").data.eval == str(demo_path("eval.jsonl"))


def test_groups_replace_each_other() -> None:
    sgd = compose("finetune", ["optimizer=sgd"]).optimizer
    assert sgd == {"component": "torch.optim.SGD", "lr": 0.01, "momentum": 0.9}
    cfg = compose("finetune", ["data=text", "data.train=x"])
    assert (cfg.data.format, cfg.data.train_on) == ("text", "all")


def test_component_arguments_need_no_plus() -> None:
    cfg = compose("finetune", ["optimizer.eps=1e-6", "optimizer.betas=[0.9,0.95]"])
    assert cfg.optimizer["eps"] == 1e-6
    assert cfg.optimizer["betas"] == [0.9, 0.95]
    rules = compose("finetune", ["components=[{match:lm_head}]", "components.0.kind=linear"])
    assert rules.components == [{"match": "lm_head", "kind": "linear"}]


def test_plus_on_a_known_key_is_the_key() -> None:
    assert compose("finetune", ["+training.seed=3"]).training.seed == 3
    assert compose("finetune", ["++training.seed=3"]).training.seed == 3


@pytest.mark.parametrize(
    "text",
    [
        "Who are you, and what's {this}?",
        "C:\\folder\\",
        'She said "a\\\'b"',
        "two\nlines = 2",
        "(a) [b] $5 #1 100%",
        "123",
        "true",
        "",
        " spaces ",
        '"Yes" or "no"?',
        "ends in \\\n",
        "'",
        "ünïcode ✓",
    ],
)
def test_text_is_taken_literally(text: str) -> None:
    assert compose("generate", [f"prompt={text}", "chat=false"]).prompt == text


def test_quoted_text_loses_its_quotes() -> None:
    assert compose("generate", ["prompt='a, b'"]).prompt == "a, b"


def test_null() -> None:
    cfg = compose("finetune", ["data.eval=null", "training.clip_grad_norm=null"])
    assert cfg.data.eval is None
    assert cfg.training.clip_grad_norm is None


def test_the_last_of_two_values_counts() -> None:
    overrides = ["training.seed=1", "training.seed=2", "training.seed=1", "method=lora"]
    assert compose("finetune", overrides).training.seed == 1


def test_unknown_verb() -> None:
    with pytest.raises(ConfigError, match="no config for 'fintune'; did you mean 'finetune'"):
        compose("fintune")


def test_inspect_needs_no_files() -> None:
    cfg = compose("inspect", ["experiment=llama3_1_8b_qlora_1x24gb"])
    assert cfg.model.arch == "llama3_1_8b"


def test_hydra_leaves_no_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    compose("finetune")
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == []
    assert Path(os.getcwd()) == tmp_path
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("verb", ["finetune", "generate", "evaluate"])
def test_save_config_round_trip(tmp_path: Path, verb: str) -> None:
    cfg = compose(verb, ["prompt=1e-4"] if verb == "generate" else [])
    file = tmp_path / "new" / "config.yaml"
    save_config(cfg, file)
    loaded = OmegaConf.to_object(OmegaConf.merge(VERBS[verb].root, OmegaConf.load(file)))
    assert loaded == cfg
    assert [path.name for path in file.parent.iterdir()] == ["config.yaml"]
