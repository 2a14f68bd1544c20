"""evaluate, merge and inspect on a tiny checkpoint and an adapter trained on it."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import F32, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_builders import cli
from qlora_builders.checkpoint import load_checkpoint, load_with_adapter
from qlora_builders.evaluation import measure as module


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_evaluation_loss_is_transformers_loss(
    checkpoint: Path, rows: Path, tmp_path: Path, packing: str
) -> None:
    output = tmp_path / "result.json"
    argv = ["evaluate", f"checkpoint.dir={checkpoint}", f"data.eval={rows}", F32]
    assert cli.main([*argv, f"output={output}", "batch_size=3", f"data.packing={packing}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        user = [{"role": "user", "content": row["prompt"]}]
        full = [*user, {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(full, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        skipped = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        labels = ids.clone()
        labels[:, :skipped] = -100
        trained = ids.shape[1] - skipped
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * trained
        count += trained
    result = json.loads(output.read_text())
    assert result["target_tokens"] == count
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_directory_is_base_plus_adapter(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    merged = tmp_path / "merged"
    argv = ["merge", f"checkpoint.dir={checkpoint}", f"adapter.path={adapter}"]
    report = tmp_path / "new" / "report.json"
    given = [f"output_dir={merged}", f"dtype={dtype}", f"report={report}"]
    assert cli.main([*argv, *given]) == 0
    output = capsys.readouterr().out
    percent = re.search(r"logits differ by (\d+\.\d\d)% of their spread", output)
    assert percent is not None
    assert float(percent[1]) < (0.01 if dtype == "float32" else 1.2)  # bfloat16 has 8 bits
    assert "8 of 15 merged layers, largest error first" in output
    assert "\nerror: what rounding lost, written - (W + delta)" in output
    figures = json.loads(report.read_text())
    assert len(figures["layers"]) == 15
    assert f"{figures['total']['error']:.3g}" in output
    ids = torch.tensor([[1, 5, 9, 20, 3]])
    expected = load_with_adapter(checkpoint, adapter, compute_dtype=torch.float32)(ids)
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    ours = load_checkpoint(merged, dtype=torch.float32)(ids)
    error = (theirs - expected).square().mean().sqrt() / expected.std()
    assert error < (1e-6 if dtype == "float32" else 1.2e-2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(merged).chat_template is not None
    assert cli.main([*argv, f"output_dir={merged}"]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err


def test_a_merge_that_is_not_the_adapted_model_is_refused(
    checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    delta = "qlora_builders.modules.lora.LoRALinear.lora_delta"
    monkeypatch.setattr(delta, lambda self, _: torch.zeros(self.out_features, self.in_features))
    argv = ["merge", f"checkpoint.dir={checkpoint}", f"adapter.path={adapter}"]
    assert cli.main([*argv, f"output_dir={tmp_path / 'merged'}"]) == 2
    captured = capsys.readouterr()
    assert "would not be base + adapter: the logits are off by 1 of what" in captured.err
    assert "error / delta" in captured.out
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (
            ["components=[{match: 'layers.*.mlp.*', kind: linear}]"],
            ["layers.0-1.self_attn.q_proj qlora", "layers.0-1.mlp.up_proj linear"],
        ),
        (
            ["components=[{match: 'layers.1.**', kind: linear}]", "train=[norm]"],
            ["layers.0.mlp.up_proj qlora", "layers.1.mlp.up_proj linear", "norm RMSNorm"],
        ),
        (
            ["components=[{match: 'layers.1.*.q_proj', kind: qlora, rank: 3, alpha: 6}]"],
            ["layers.0.self_attn.q_proj qlora 16", "layers.1.self_attn.q_proj qlora 3"],
        ),
        (["method=full"], ["lm_head linear - trainable=True"]),
    ],
)
def test_inspect_shows_the_plan(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], shown: list[str]
) -> None:
    assert cli.main(["inspect", f"checkpoint.dir={checkpoint}", *overrides]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for start in shown:
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_inspect_counts_an_8b(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "model.arch=llama3_1_8b"]) == 0
    output = capsys.readouterr().out
    assert "8,030,261,248 base parameters" in output
    assert "41,943,040 parameters train" in output  # rank 16 on seven projections of 32 layers


def test_the_base_gets_the_dtype_that_the_adapter_was_trained_on(
    checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    """float32 and bfloat16 weights quantize to different codes, so this is not a detail."""
    run = tmp_path / "run"
    options = ("training.dtype=float32", "training.max_steps=2")
    assert train("finetune", checkpoint, rows, run, *options) == 0
    model = load_with_adapter(checkpoint, run / "adapter")
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.float32
    model = load_with_adapter(checkpoint, run / "adapter", dtype=torch.bfloat16)
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16
    losses = []
    for dtype in ("auto", "float32"):
        output = tmp_path / f"{dtype}.json"
        argv = ["evaluate", f"checkpoint.dir={checkpoint}", f"data.eval={rows}", F32]
        argv += [f"adapter.path={run / 'adapter'}", f"dtype={dtype}", f"output={output}"]
        assert cli.main(argv) == 0
        losses.append(json.loads(output.read_text())["loss"])
    assert losses[0] == losses[1]


# ---- evaluate compare=true: base, base in NF4 and fine-tuned in one table

ONE = "what comes after one"


def evaluate(checkpoint: Path, rows: Path, *options: str) -> int:
    argv = ["evaluate", f"checkpoint.dir={checkpoint}", f"data.eval={rows}", F32]
    return cli.main([*argv, *options])


def results(checkpoint: Path, rows: Path, output: Path, *options: str) -> dict[str, Any]:
    assert evaluate(checkpoint, rows, f"output={output}", *options) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_each_model_is_measured_as_it_is_alone(
    checkpoint: Path, rows: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"adapter.path={adapter}", "exact_match=5", "max_new_tokens=8")
    found = results(checkpoint, rows, tmp_path / "all.json", *given, "compare=true")
    table = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"fine-tuned: {found['right']} of 5 answers right; the first of them" in table
    alone = [
        results(checkpoint, rows, tmp_path / "base.json", *given[1:]),
        results(checkpoint, rows, tmp_path / "nf4.json", *given[1:], "quantize=nf4"),
        results(checkpoint, rows, tmp_path / "tuned.json", *given),
    ]
    assert list(found["models"]) == ["base", "base in NF4", "fine-tuned"]
    for model, one in zip(found["models"].values(), alone, strict=True):
        assert model == {key: one[key] for key in model}
    assert set(alone[0]["standard_errors"]) == {"loss", "perplexity", "exact_match"}
    assert alone[2] == {key: found[key] for key in alone[2]}

    assert [one["right"] for one in alone] == [0, 0, 5]
    first = alone[2]["answers"][0]
    assert (first["prompt"], first["answer"], first["reference"]) == (ONE, "two", "two")
    losses = [one["loss"] for one in alone]
    assert losses[2] < 0.5 * losses[0]
    assert alone[2]["perplexity"] == math.exp(losses[2])
    pairs = {(one["of"], one["from"]): one["figures"] for one in found["differences"]}
    assert list(pairs) == [
        ("base in NF4", "base"),
        ("fine-tuned", "base"),
        ("fine-tuned", "base in NF4"),
    ]
    # without pairing NF4's small cost would drown in the spread of the rows
    assert 0 < pairs["base in NF4", "base"]["loss"]["standard_error"] < 0.3 / math.sqrt(20)
    change = pairs["fine-tuned", "base in NF4"]["loss"]
    assert change["difference"] == losses[2] - losses[1]
    assert 0 < change["standard_error"] < abs(change["difference"]) / 5
    (row,) = (index for index, line in enumerate(table) if line.startswith("loss "))
    shown = [float(word) for word in table[row].split()[1:]]
    expected = [*losses, losses[1] - losses[0], losses[2] - losses[1]]
    assert shown == pytest.approx(expected, abs=0.01)
    assert float(table[row + 1].split()[-1]) == pytest.approx(change["standard_error"], rel=0.1)
    assert alone[0]["standard_errors"]["exact_match"] == 0.5 / 6  # none of 5
    assert any(line.startswith("exact_match 0.000 0.000 ") for line in table)


def test_packed_rows_are_parts_too(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    given = ("compare=true", "data.packing=best_fit", "data.max_seq_len=96", "batch_size=3")
    found = results(checkpoint, rows, tmp_path / "all.json", *given)
    assert list(found["models"]) == ["base", "base in NF4"]
    reference = results(checkpoint, rows, tmp_path / "one.json", "quantize=nf4")
    assert found["models"]["base in NF4"]["loss"] == pytest.approx(reference["loss"], rel=1e-6)


def test_one_model_is_in_memory_at_a_time(
    checkpoint: Path, rows: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def watched(load: Any) -> Any:
        def load_one(*args: Any, **options: Any) -> Any:
            assert all(model() is None for model in loaded)
            model = load(*args, **options)
            loaded.append(weakref.ref(model))
            return model

        return load_one

    for name in ("load_checkpoint", "load_with_adapter"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    gc.disable()
    try:
        assert evaluate(checkpoint, rows, f"adapter.path={adapter}", "compare=true") == 0
    finally:
        gc.enable()
    assert len(loaded) == 3
