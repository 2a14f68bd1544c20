"""Norms of adapters and errors of NF4, against plain arithmetic."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from archs import tiny_arch
from report_pages import Page

from qlora_builders import (
    llama,
    load_adapter,
    load_checkpoint,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.checkpoint.merge_report import WeightFigures, together, weight_figures
from qlora_builders.errors import CheckpointError
from qlora_builders.kernels.nf4_reference import NF4_CODEBOOK
from qlora_builders.modules import LoRALinear
from qlora_builders.report import read_run, report_page
from qlora_builders.report.run import layer_figures

ARCH = tiny_arch(vocab_size=40, hidden_size=64, intermediate_size=96, num_layers=3, head_dim=16)
PLAN = [
    {"match": "layers.**", "kind": "frozen_nf4", "scale_format": "none"},
    {"match": "layers.*.self_attn.q_proj", "kind": "qlora", "rank": 3, "alpha": 9},
    {"match": "layers.2.mlp.up_proj", "kind": "lora", "rank": 2, "alpha": 8, "use_rslora": True},
    {"match": "lm_head", "kind": "lora", "rank": 2, "alpha": 1},
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(llama(ARCH, dtype=torch.float32), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    model = load_checkpoint(base, PLAN)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight)
    path = tmp_path / "run"
    path.mkdir()
    save_adapter(model, path / "adapter", base_model=str(base))
    (path / "config.yaml").write_text(yaml.safe_dump({"checkpoint": {"dir": str(base)}}))
    return path


def test_updates_are_the_norms_of_the_products(run: Path, base: Path) -> None:
    figures = layer_figures(read_run(run))
    model = load_checkpoint(base, PLAN)
    load_adapter(model, run / "adapter")
    expected = {
        name.removeprefix("model."): module.lora_delta().norm().item()
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    assert len(expected) == 5
    assert figures.updates == pytest.approx(expected, rel=1e-5)
    assert figures.notes == ()


def test_errors_are_those_of_the_nearest_code(run: Path, base: Path) -> None:
    """fp32 absmax scales and the nearest of 16 values, written down once more in numpy."""
    weights = load_checkpoint(base, dtype=torch.float32)
    codebook = NF4_CODEBOOK.numpy()
    for slot, figures in layer_figures(read_run(run)).weights.items():
        name = slot if slot == "lm_head" else f"model.{slot}"
        stored = weights.get_parameter(f"{name}.weight").detach()
        assert figures.norm == pytest.approx(np.linalg.norm(stored.double().numpy()), rel=1e-6)
        if slot in ("layers.2.mlp.up_proj", "lm_head"):
            assert figures.error is None
            continue
        blocks = stored.bfloat16().float().numpy().reshape(-1, 64)
        scales = np.abs(blocks).max(1, keepdims=True)
        nearest = np.abs(blocks / scales - codebook[:, None, None]).argmin(0)
        seen = torch.from_numpy(codebook[nearest] * scales).bfloat16()
        error = np.linalg.norm(stored.numpy().reshape(-1, 64) - seen.float().numpy())
        assert figures.error == pytest.approx(error, rel=1e-6)


def test_together_is_the_error_of_both() -> None:
    both = together([WeightFigures(3.0, 0.3), WeightFigures(4.0, 0.4)])
    assert both.norm == pytest.approx(5)
    assert both.error == pytest.approx(0.5)
    assert both.relative_error == pytest.approx(0.1)
    assert together([WeightFigures(3.0, None)]).relative_error is None
    assert WeightFigures(0.0, 0.0).relative_error is None


TITLES = ("Adapter update", "Quantization error")


def test_the_page_shows_each_layer(run: Path) -> None:
    page = Page(report_page([read_run(run)]))
    tables = page.tables()
    updates, errors = (tables[f"{name}: 3 of 3 points"] for name in TITLES)
    assert updates[0] == ["layer", "q_proj", "up_proj"]
    assert [bool(cell) for row in updates[1:] for cell in row[1:]] == [True, False] * 2 + [True] * 2
    assert errors[0][-1] == "down_proj"
    assert "|scaling·B·A| / |W|" in page.text
    assert "lm_head: " in page.text  # it lies in no layer


def test_without_the_base_updates_stand_alone(run: Path, base: Path) -> None:
    shutil.rmtree(base)
    figures = layer_figures(read_run(run))
    assert len(figures.updates) == 5
    assert figures.weights == {}
    assert "not where the run found it" in figures.notes[0]
    assert "|scaling·B·A|\n" in Page(report_page([read_run(run)])).text


def test_another_base_or_a_broken_adapter_is_a_note(run: Path, base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").write_bytes(b"x" * 100)
    figures = layer_figures(read_run(run))
    assert len(figures.updates) == 5
    assert "the base checkpoint cannot be read" in figures.notes[0]
    (run / "adapter" / "adapter_config.json").write_text("{}")
    figures = layer_figures(read_run(run))
    assert figures.updates == {}
    assert "the adapter cannot be read" in figures.notes[0]
    assert "the adapter cannot be read" in Page(report_page([read_run(run)])).text


def test_a_stopped_run_shows_its_last_checkpoint(run: Path) -> None:
    for step in (9, 10):
        shutil.copytree(run / "adapter", run / "checkpoints" / f"step_{step}")
    shutil.rmtree(run / "adapter")
    assert read_run(run).adapter() == run / "checkpoints" / "step_10"
    assert len(layer_figures(read_run(run)).updates) == 5


def test_a_run_without_adapters_has_no_layers(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert layer_figures(read_run(tmp_path)).updates == {}


def test_a_weight_of_another_shape_is_named(base: Path) -> None:
    other = llama(replace(ARCH, intermediate_size=128), PLAN, device="meta")
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[96, 64\]; the model"):
        list(weight_figures(other, base))


def test_a_weight_stored_in_nf4_has_no_error(base: Path, tmp_path: Path) -> None:
    plan = [{"match": "layers.**", "kind": "frozen_nf4"}]
    save_checkpoint(load_checkpoint(base, plan), tmp_path / "nf4", format="nf4")
    figures = dict(weight_figures(llama(ARCH, PLAN, device="meta"), tmp_path / "nf4"))
    assert set(figures) == {"lm_head"}
