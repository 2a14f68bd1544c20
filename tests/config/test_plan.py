"""Which base generate, evaluate and merge load: as the adapter's run held it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_builders.config.compose import compose, save_config
from qlora_builders.config.plan import base_rules
from qlora_builders.errors import ConfigError


def write_run(folder: Path, *overrides: str) -> Path:
    save_config(compose("finetune", overrides), folder / "config.yaml")
    (folder / "adapter").mkdir()
    return folder / "adapter"


def rules_for(adapter: Path, *overrides: str) -> list[dict[str, object]]:
    return base_rules(compose("evaluate", [f"adapter.path={adapter}", *overrides]))


def test_qlora_run(tmp_path: Path) -> None:
    adapter = write_run(tmp_path, "method.block_size=32", "method.targets=[q_proj]")
    assert rules_for(adapter) == [
        {"match": "layers.**", "kind": "frozen_nf4", "block_size": 32},
        {"match": "layers.*.*.q_proj", "kind": "frozen_nf4", "block_size": 32},
    ]


def test_rules_of_the_user(tmp_path: Path) -> None:
    adapter = write_run(
        tmp_path,
        'components=[{match: "layers.0.**", kind: linear, trainable: true},'
        " {match: lm_head, kind: lora, rank: 4, alpha: 8}]",
    )
    assert rules_for(adapter)[2:] == [
        {"match": "layers.0.**", "kind": "linear"},
        {"match": "lm_head", "kind": "linear"},
    ]


def test_lora_run(tmp_path: Path) -> None:
    adapter = write_run(tmp_path, "method=lora", "method.targets=[q_proj]")
    assert rules_for(adapter) == [{"match": "layers.*.*.q_proj", "kind": "linear"}]


def test_adapter_of_a_step(tmp_path: Path) -> None:
    write_run(tmp_path, "method=lora")
    step = tmp_path / "checkpoints" / "step_10" / "adapter"
    step.mkdir(parents=True)
    assert len(rules_for(step)) == 1


def test_quantize_decides(tmp_path: Path) -> None:
    adapter = write_run(tmp_path, "method=lora")
    assert rules_for(adapter, "quantize=nf4") == [{"match": "layers.**", "kind": "frozen_nf4"}]
    assert rules_for(adapter, "quantize=none") == []


def test_without_adapter_the_checkpoint_stays_as_it_is() -> None:
    assert base_rules(compose("generate", ["prompt=a"])) == []
    nf4 = compose("generate", ["prompt=a", "quantize=nf4"])
    assert base_rules(nf4) == [{"match": "layers.**", "kind": "frozen_nf4"}]


def test_adapter_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("something: else\n")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    with pytest.raises(ConfigError, match=r"quantize=auto cannot tell .* write quantize=nf4"):
        rules_for(adapter)
    assert rules_for(adapter, "quantize=none") == []
