"""Every shipped experiment and method is composed, checked and built on meta."""

from __future__ import annotations

import pytest

from qlora_builders.checkpoint import read_arch
from qlora_builders.config.compose import compose
from qlora_builders.config.plan import plan_rules, train_patterns
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.models import get_arch, llama
from qlora_builders.training.optimizers import trainable_parameters

EXPERIMENTS = sorted(path.stem for path in shipped_dir("configs").glob("experiment/*.yaml"))
METHODS = sorted(path.stem for path in shipped_dir("configs").glob("method/*.yaml"))
PLACEHOLDERS = ["checkpoint.dir=somewhere", "data.train=some.jsonl"]


def test_there_are_some() -> None:
    assert len(EXPERIMENTS) >= 4
    assert METHODS == ["full", "lora", "qlora"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds(experiment: str) -> None:
    demo = experiment.startswith("demo")
    overrides = [f"experiment={experiment}", *([] if demo else PLACEHOLDERS)]
    cfg = compose("dpo" if experiment == "demo_dpo" else "finetune", overrides)
    arch = get_arch(cfg.model.arch) if cfg.model.arch else read_arch(cfg.checkpoint.dir)
    model = llama(arch, plan_rules(cfg), train=train_patterns(cfg), device="meta")
    assert trainable_parameters(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama2_7b", "llama3_2_1b"])
def test_method_builds(method: str, arch: str) -> None:
    cfg = compose("finetune", [f"method={method}"])
    model = llama(arch, plan_rules(cfg), train=train_patterns(cfg), device="meta")
    trained = sum(parameter.numel() for parameter in trainable_parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (trained == total) == (method == "full")
