"""Shipped experiments and methods build on meta; those for some hardware fit it."""

from __future__ import annotations

import re

import pytest

from qlora_builders import LLAMA_ARCHS, cli
from qlora_builders.checkpoint import read_arch
from qlora_builders.config.compose import compose
from qlora_builders.config.schema import plan_rules, train_patterns
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.models import get_arch, llama
from qlora_builders.training.optimizers import trainable_parameters

HARDWARE = re.compile(r"_(?:cpu|(?P<cards>\d+)x(?P<gib>\d+)gb)$")
EXPERIMENTS, METHODS = (
    sorted(path.stem for path in shipped_dir("configs").glob(f"{group}/*.yaml"))
    for group in ("experiment", "method")
)
SIZED = [name for name in EXPERIMENTS if HARDWARE.search(name)]
FILLED = ("checkpoint.dir=somewhere", "data.train=some.jsonl")
CPU_GIB = 8
SHARE = 0.92  # of the memory; the driver, NCCL and fragmentation have the rest


def test_every_size_has_one() -> None:
    assert METHODS == ["full", "lora", "qlora"]
    archs = {compose("finetune", [f"experiment={name}", *FILLED]).model.arch for name in SIZED}
    assert archs == LLAMA_ARCHS.keys()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds(experiment: str) -> None:
    overrides = [f"experiment={experiment}", *(() if experiment.startswith("demo") else FILLED)]
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


@pytest.mark.parametrize("name", SIZED)
def test_it_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    hardware = HARDWARE.search(name)
    assert hardware is not None
    device = "cuda" if hardware["cards"] else "cpu"
    cards, gib = int(hardware["cards"] or 1), int(hardware["gib"] or CPU_GIB)
    words = [f"experiment={name}", f"ranks={cards}", f"device={device}", *FILLED]
    assert cli.main(["estimate", *words]) == 0
    peak = re.search(r"^peak ([\d.]+) GiB", capsys.readouterr().out, re.MULTILINE)
    assert peak is not None
    assert float(peak[1]) <= SHARE * gib
