"""qlora evaluate compare=true: base, base in NF4 and fine-tuned in one table."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import F32

from qlora_builders import cli
from qlora_builders.evaluation import measure as module

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
