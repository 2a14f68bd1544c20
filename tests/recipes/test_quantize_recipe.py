"""qlora quantize and plan: what they write is what other verbs load."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
import yaml
from recipe_runs import F32, train
from transformers import AutoModelForCausalLM

from qlora_builders import cli, save_checkpoint
from qlora_builders.analysis.precision import SETTINGS
from qlora_builders.checkpoint import load_checkpoint, load_with_adapter, read_arch, stored_plan
from qlora_builders.checkpoint.formats import detect_format
from qlora_builders.config.shipped import demo_path
from qlora_builders.models import llama, summarize
from qlora_builders.tensor import NF4Format, NF4Tensor

UP = "model.layers.1.mlp.up_proj.weight"


def quantize(checkpoint: Path, out: Path, *options: str) -> NF4Tensor:
    argv = ["quantize", f"checkpoint.dir={checkpoint}", f"output_dir={out}", *options]
    assert cli.main(argv) == 0
    weight = load_checkpoint(out, stored_plan(out)).get_parameter(UP)
    assert isinstance(weight, NF4Tensor)
    return weight


@pytest.mark.parametrize(("format", "scales"), [("nf4", "geometric"), ("bnb-4bit", "bnb")])
def test_formats(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, scales: str
) -> None:
    out = tmp_path / "out"
    weight = quantize(checkpoint, out, f"format={format}")
    assert detect_format(out) == format
    assert (weight.format.scale_format, weight.format.block_size) == (scales, 64)
    plan = [{"match": "layers.**", "kind": "frozen_nf4", "scale_format": scales}]
    expected = load_checkpoint(checkpoint, plan).get_parameter(UP)
    assert torch.equal(weight.codes, expected.codes)
    assert torch.equal(weight.dequantize(), expected.dequantize())
    output = capsys.readouterr().out
    assert f"wrote {out}: " in output
    assert " bits each" in output
    assert (out / "tokenizer.json").exists()


def test_options(checkpoint: Path, tmp_path: Path) -> None:
    rule = "components=[{match: 'layers.1.mlp.*', kind: frozen_nf4, block_size: 32}]"
    weight = quantize(checkpoint, tmp_path / "a", rule, "max_shard_size=20KB")
    assert weight.format.block_size == 32
    assert len(list((tmp_path / "a").glob("nf4-*.safetensors"))) > 1
    options = ["block_size=128", "scale_format=none", "scale_search=true", "dtype=float32"]
    weight = quantize(checkpoint, tmp_path / "b", *options)
    expected = NF4Format(block_size=128, scale_format="none", scale_search=True)
    assert weight.format == expected
    assert weight.dtype == torch.float32


def test_conversion_between_the_layouts_is_lossless(checkpoint: Path, tmp_path: Path) -> None:
    first = quantize(checkpoint, tmp_path / "nf4")
    second = quantize(tmp_path / "nf4", tmp_path / "bnb", "format=bnb-4bit")
    third = quantize(tmp_path / "bnb", tmp_path / "back")
    for weight in (second, third):
        assert torch.equal(weight.codes, first.codes)
        assert torch.equal(weight.dequantize(), first.dequantize())
    ids = torch.tensor([[1, 5, 9, 20, 3]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", dtype=torch.bfloat16)(ids)
    ours = load_with_adapter(tmp_path / "back", None)(ids)
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=8e-3 * ours.abs().max().item())


def test_other_verbs_keep_what_is_stored(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: Any, refused: Callable[..., str]
) -> None:
    quantize(checkpoint, tmp_path / "nf4")
    model = load_with_adapter(tmp_path / "nf4", None)
    assert isinstance(model.get_parameter(UP), NF4Tensor)
    plain = load_with_adapter(tmp_path / "nf4", None, quantize="none")
    assert not isinstance(plain.get_parameter(UP), NF4Tensor)
    lines = []
    for base, options in ((checkpoint, ["quantize=nf4"]), (tmp_path / "nf4", [])):
        argv = ["evaluate", f"checkpoint.dir={base}", f"data.eval={rows}", F32, *options]
        assert cli.main(argv) == 0
        lines.append([x for x in capsys.readouterr().out.splitlines() if x.startswith("loss ")])
    assert lines[0] == lines[1]
    run = tmp_path / "run"
    assert train("finetune", tmp_path / "nf4", rows, run, "training.max_steps=2") == 0
    tuned = load_with_adapter(tmp_path / "nf4", run / "adapter")
    assert torch.equal(tuned.get_parameter(UP).codes, model.get_parameter(UP).codes)
    argv = ["quantize", f"checkpoint.dir={tmp_path / 'nf4'}"]
    for output, message in (
        ("output_dir={0}/nf4", "exists; choose a new folder"),
        ("output_dir={0}/out block_size=128", "is stored in NF4 with block_size=64, but rule"),
    ):
        assert message in refused(*argv, *output.format(tmp_path).split())


# ---- plan


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
