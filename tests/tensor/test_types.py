"""Every quantized type does everything a base does: one walk through the whole product for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from archs import tiny_arch, tiny_model
from safetensors.torch import load_file

from qlora_builders import (
    cli,
    llama,
    load_adapter,
    load_checkpoint,
    merge_adapter,
    save_adapter,
    save_checkpoint,
)
from qlora_builders.tensor import QUANTIZED_TYPES, format_of, plain

TYPES = sorted(QUANTIZED_TYPES)
EVALUATED = ["output=result.json", "data.max_rows=8"]


def plan(base: str) -> list[dict[str, object]]:
    return [
        {"match": "layers.**", "base": base},
        {"match": "layers.*.*.{q_proj,up_proj}", "base": base, "adapter": "lora"}
        | {"rank": 2, "alpha": 4.0},
    ]


def test_there_are_two() -> None:
    assert TYPES == ["mxfp4", "nf4"]


@pytest.mark.parametrize("base", TYPES)
def test_gradients_are_those_of_the_decoded_weights(base: str) -> None:
    model = tiny_model(plan(base))
    other = llama(tiny_arch(), [{**r, "base": "none"} for r in plan("none")], dtype=torch.float32)
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs[name].copy_(plain(parameter))
    ids = torch.arange(24).view(2, 12)
    for one in (model, other):
        one(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (format_of(parameter) is not None) == ("layers" in name and "proj.weight" in name)
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad)


@pytest.mark.parametrize("base", TYPES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_files_keep_every_bit(base: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model([{"match": "layers.**", "base": base}], dtype=torch.bfloat16)
    save_checkpoint(model, tmp_path / "a", format="native", max_shard_bytes=max_shard_bytes)
    again = load_checkpoint(tmp_path / "a", [{"match": "layers.**", "base": base}])
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert format_of(ours) == format_of(theirs), name
        fields = [ours], [theirs]
        if format_of(ours) is not None:
            fields = ours.fields, theirs.fields
        assert all(torch.equal(a, b) for a, b in zip(*fields, strict=True)), name


@pytest.mark.parametrize("base", TYPES)
def test_an_adapter_is_merged_into_what_was_seen_in_training(base: str, tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "hf")
    model = load_checkpoint(tmp_path / "hf", plan(base), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter")
    again = load_checkpoint(tmp_path / "hf", plan(base), dtype=torch.float32)
    load_adapter(again, tmp_path / "adapter")
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(again(ids), model(ids))
    merged = merge_adapter(model)
    torch.testing.assert_close(merged(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", TYPES)
def test_the_command_line(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rules = [
        f'{{match: "layers.**", base: {base}}}',
        f'{{match: "layers.*.self_attn.*", base: {base}, adapter: lora, rank: 2, alpha: 4}}',
    ]
    components = f"components=[{','.join(rules)}]"
    train = ["training.max_steps=2", "data.max_rows=16", "training.compile=off"]
    for verb, *words in (
        ["inspect", components],
        ["estimate", components],
        ["finetune", components, *train, "output_dir=run", "training.compute_dtype=float32"],
        ["generate", "adapter.path=run/adapter", "prompt=two red dresses", "max_new_tokens=4"],
        ["merge", "adapter.path=run/adapter", "output_dir=merged", "max_error=2"],
        ["quantize", f"components=[{rules[0]}]", "format=native", "output_dir=small"],
        ["evaluate", "checkpoint.dir=small", "tokenizer.path=merged", *EVALUATED],
    ):
        assert cli.main([verb, *words]) == 0, capsys.readouterr().err
        if verb == "inspect":
            assert base in capsys.readouterr().out
    assert json.loads(Path("result.json").read_text())["loss"] > 0
    stored = load_file("small/native.safetensors")
    assert "model.layers.0.mlp.up_proj.weight.codes" in stored
