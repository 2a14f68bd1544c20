"""What a run says about the machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qlora_builders.training.device import add_environment, describe_environment, device_name


def test_each_process_adds_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["qlora", "finetune", "prompt=a b"])
    about = describe_environment(torch.device("cpu"), torch.bfloat16) | {"total_steps": 9}
    add_environment(tmp_path, about, first_step=0)
    add_environment(tmp_path, about, first_step=4)
    lines = (tmp_path / "environment.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["first_step"], second["first_step"]) == (0, 4)
    assert first["command"] == "qlora finetune 'prompt=a b'"
    assert first["compute_dtype"] == "bfloat16"
    assert first["torch"] == torch.__version__


def test_nothing_of_the_environment_variables_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    about = json.dumps(describe_environment(torch.device("cpu"), torch.float32))
    assert "secret-token" not in about
    assert os.uname().nodename not in json.loads(about).values()


@pytest.mark.gpu
def test_a_gpu_is_named() -> None:
    name = torch.cuda.get_device_name(0)
    assert name in device_name(torch.device("cuda", 0))
