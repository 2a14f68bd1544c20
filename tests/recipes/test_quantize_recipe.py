"""qlora quantize: to both layouts, between them, and what the other verbs do with the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import F32, train
from transformers import AutoModelForCausalLM

from qlora_builders import cli
from qlora_builders.checkpoint import load_checkpoint, load_with_adapter, stored_plan
from qlora_builders.checkpoint.formats import detect_format
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
