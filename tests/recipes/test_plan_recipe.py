"""qlora plan: what it writes is what other verbs load, and its mistakes are one line each."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import yaml
from recipe_runs import F32

from qlora_builders import cli, save_checkpoint
from qlora_builders.analysis.precision import SETTINGS
from qlora_builders.checkpoint import load_checkpoint, read_arch, stored_plan
from qlora_builders.config.shipped import demo_path
from qlora_builders.models import llama, summarize


def plan(checkpoint: Path, rows: Path, output: Path, *options: str) -> int:
    argv = ["plan", f"checkpoint.dir={checkpoint}", f"data.train={rows}", f"data.eval={rows}"]
    return cli.main([*argv, f"output={output}", F32, *options])


def read(output: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rules = yaml.safe_load(output.read_text())["components"]
    return rules, json.loads(output.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def planned(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plan") / "new" / "plan.yaml"
    assert plan(checkpoint, rows, output, "bits=5.2") == 0
    return output


def test_the_files_agree_with_what_loads(checkpoint: Path, planned: Path) -> None:
    rules, figures = read(planned)
    assert figures["components"] == rules
    model = load_checkpoint(checkpoint, rules)
    written = next(c for c in figures["comparison"] if c["plan"] == figures["written"])
    assert sum(row.base_bytes for row in summarize(model)) == written["bytes"]
    assert written["bytes"] <= figures["budget_bytes"]
    names = [c["plan"] for c in figures["comparison"]]
    assert (names[0], names[-1]) == ("not quantized", "the plan")
    for one in figures["comparison"]:
        assert one["perplexity"] == math.exp(one["loss"])
        assert one["plan"] == "not quantized" or one["bytes"] <= figures["budget_bytes"]
    # the head is 300 x 64 of 68,608 weights: in 16 bits it leaves no room at 5.2 bits
    assert names[1:-1] == [f"{s.name}, head too" for s in SETTINGS if s.kind != "linear"]
    uniform = [c["predicted_kl"] for c in figures["comparison"][1:-1]]
    assert figures["comparison"][-1]["predicted_kl"] <= min(uniform)
    for slot, one in figures["slots"].items():
        assert list(one["options"]) == [setting.name for setting in SETTINGS]
        parameter = model.get_parameter(
            f"{slot}.weight" if slot == "lm_head" else f"model.{slot}.weight"
        )
        assert one["options"][one["chosen"]]["bytes"] == parameter.nbytes


def test_the_same_seed_gives_the_same_plan(checkpoint: Path, rows: Path, planned: Path) -> None:
    again = planned.with_name("again.yaml")
    assert plan(checkpoint, rows, again, "bits=5.2") == 0
    assert read(again) == read(planned)


def test_quantize_and_inspect_take_the_file(
    checkpoint: Path, planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed.yaml"
    rules = [
        {"match": "layers.**", "kind": "frozen_nf4", "block_size": 32, "scale_search": True},
        {"match": "layers.0.*.{v_proj,down_proj}", "kind": "linear"},
    ]
    mixed.write_text(yaml.safe_dump({"components": rules}))
    for name, file in (("planned", planned), ("mixed", mixed)):
        argv = [f"checkpoint.dir={checkpoint}", f"components={file}"]
        assert cli.main(["quantize", *argv, f"output_dir={tmp_path / name}"]) == 0
        ours = load_checkpoint(tmp_path / name, stored_plan(tmp_path / name))
        expected = load_checkpoint(checkpoint, yaml.safe_load(file.read_text())["components"])
        for key, parameter in expected.named_parameters():
            assert ours.get_parameter(key).nbytes == parameter.nbytes
    capsys.readouterr()
    assert cli.main(["inspect", *argv]) == 0
    shown = capsys.readouterr().out
    assert "scale_search=True" in shown
    assert "layers.0.mlp.down_proj" in shown


def test_finetune_takes_the_file_with_adapters(
    checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapters.yaml"
    assert plan(checkpoint, rows, output, "budget=0.1MiB", "rank=4") == 0
    rules, figures = read(output)
    kinds = {rule["kind"] for rule in rules if rule["match"] != "lm_head"}
    assert kinds <= {"lora", "qlora"}
    assert all(r["alpha"] == 8 for r in rules if r["match"] != "lm_head")
    assert figures["budget_bytes"] == int(0.1 * 2**20)
    run = tmp_path / "run"
    argv = ["finetune", f"checkpoint.dir={checkpoint}", f"data.train={rows}", "data.eval=null"]
    argv += [f"components={output}", f"output_dir={run}", "training.max_steps=1"]
    assert cli.main(argv) == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["components"] == rules


def test_a_tied_head_is_no_slot(rows: Path, checkpoint: Path, tmp_path: Path) -> None:
    arch = replace(read_arch(checkpoint), num_layers=1, tie_word_embeddings=True)
    save_checkpoint(llama(arch), tmp_path / "tied")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(checkpoint / name, tmp_path / "tied" / name)
    assert plan(tmp_path / "tied", rows, tmp_path / "plan.yaml", "bits=4.3") == 0
    rules, figures = read(tmp_path / "plan.yaml")
    assert "lm_head" not in figures["slots"]
    assert all(rule["match"].startswith("layers.") for rule in rules)
    names = [one["plan"] for one in figures["comparison"]]
    assert "nf4 64" in names
    assert not any("head" in name for name in names)


def test_the_demo_base_keeps_its_most_sensitive_layers(tmp_path: Path) -> None:
    """Measured at 5.5 bits: KL 0.011 from the unquantized model, and 0.023 for the best uniform
    setting; the first layers' attention stays in 16 bits."""
    output = tmp_path / "plan.yaml"
    options = ["bits=5.5", "data.max_rows=60", "calibration_tokens=8000"]
    assert cli.main(["plan", F32, f"output={output}", *options]) == 0
    rules, figures = read(output)
    base, *uniform, ours = figures["comparison"]
    assert ours["plan"] == figures["written"] == "the plan"
    assert ours["kl"] < 0.7 * min(one["kl"] for one in uniform)
    assert ours["predicted_kl"] < 0.7 * min(one["predicted_kl"] for one in uniform)
    written = math.log(ours["perplexity"]) - math.log(min(one["perplexity"] for one in uniform))
    assert written < 0.005
    model = load_checkpoint(demo_path("base"), rules)
    plain = [row.name for row in summarize(model) if row.kind == "linear" and row.slots]
    assert any(name.startswith("layers.0") and "q_proj" in name for name in plain)
    assert base["kl"] == 0


def test_files_that_exist_and_bases_that_are_quantized(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("mine")
    nf4 = tmp_path / "nf4"
    assert cli.main(["quantize", f"checkpoint.dir={checkpoint}", f"output_dir={nf4}"]) == 0
    for base, name, message in (
        (checkpoint, "plan.yaml", "plan.json, which exists; choose another name"),
        (nf4, "other.yaml", "is quantized already"),
    ):
        assert plan(base, rows, tmp_path / name, "bits=5") == 2
        assert message in capsys.readouterr().err
