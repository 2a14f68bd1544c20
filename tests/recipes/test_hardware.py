"""Experiments for some hardware build on meta, and are predicted to fit it with room to spare."""

from __future__ import annotations

import re

import pytest

from qlora_builders import LLAMA_ARCHS, cli
from qlora_builders.config.browse import find_configs
from qlora_builders.config.compose import compose, config_folders

HARDWARE = re.compile(r"_(?:cpu|(?P<cards>\d+)x(?P<gib>\d+)gb)$")
SHIPPED = [name.removeprefix("experiment/") for name in find_configs(config_folders())]
EXPERIMENTS = [name for name in SHIPPED if HARDWARE.search(name)]
FILLED = ("checkpoint.dir=base", "data.train=rows.jsonl")
CPU_GIB = 8
SHARE = 0.92  # of the memory; the driver, NCCL and fragmentation have the rest


def test_every_size_has_one() -> None:
    archs = {
        compose("finetune", [f"experiment={name}", *FILLED]).model.arch for name in EXPERIMENTS
    }
    assert archs == LLAMA_ARCHS.keys()


@pytest.mark.parametrize("name", EXPERIMENTS)
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
