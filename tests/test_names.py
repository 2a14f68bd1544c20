"""A name that a config may say is one that the code takes, and the reverse."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qlora_builders import load_checkpoint, names, save_checkpoint
from qlora_builders.checkpoint.formats import FORMATS, detect_format
from qlora_builders.config.sections import Knob, knobs
from qlora_builders.config.shipped import demo_path
from qlora_builders.config.verbs import VERBS
from qlora_builders.data import Batches, Tokenizer, build_dataset
from qlora_builders.errors import CheckpointError, QLoRAError
from qlora_builders.kernels.nf4_reference import FORMAT_NUMBERS
from qlora_builders.modules import layers
from qlora_builders.tensor import to_nf4
from qlora_builders.training.device import compile_layers, resolve_dtype
from qlora_builders.training.objectives import LOSSES
from qlora_builders.training.optimizers import SHAPES

# what configs in use may say: a name that is taken away breaks them
IN_USE = {
    "DTYPES": "float32 bfloat16 float16",
    "CHECKPOINT_FORMATS": "hf meta bnb-4bit nf4 native",
    "WRITTEN_FORMATS": "hf nf4 native bnb-4bit",
    "QUANTIZED_FORMATS": "nf4 native bnb-4bit",
    "SCALE_FORMATS": "geometric none bnb",
    "ATTENTION_PROJECTIONS": "q_proj k_proj v_proj o_proj",
    "MLP_PROJECTIONS": "gate_proj up_proj down_proj",
    "PROJECTIONS": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "DATA_FORMATS": "chat instruct text preference",
    "TRAIN_ON": "assistant completion all",
    "ON_ERROR": "raise skip",
    "PACKINGS": "none best_fit",
    "LR_SHAPES": "cosine linear constant",
    "CHECKPOINTING_MODES": "none selective full offload",
    "COMPILE_MODES": "auto on off",
    "DPO_LOSSES": "sigmoid hinge",
}


def test_no_name_is_lost() -> None:
    sets = {key: value for key, value in vars(names).items() if isinstance(value, tuple)}
    assert sets.keys() == IN_USE.keys()
    for key, words in IN_USE.items():
        assert {*words.split()} <= {*sets[key]}, key


def listed_in(docstring: str | None) -> tuple[str, ...]:
    """The first words of the lines of a table."""
    return tuple(re.findall(r"^ *(\w+)  +\S", docstring or "", flags=re.MULTILINE))


def test_tables_have_the_names() -> None:
    assert sorted(FORMATS) == sorted(names.CHECKPOINT_FORMATS)
    written = {name for name, row in FORMATS.items() if row.is_written}
    assert written == set(names.WRITTEN_FORMATS)
    assert {name for name in written if FORMATS[name].pack} == set(names.QUANTIZED_FORMATS)
    assert tuple(SHAPES) == names.LR_SHAPES
    assert tuple(LOSSES) == names.DPO_LOSSES
    assert set(FORMAT_NUMBERS) == set(names.SCALE_FORMATS)
    assert listed_in(layers.__doc__) == names.CHECKPOINTING_MODES
    assert listed_in(compile_layers.__doc__) == names.COMPILE_MODES


def test_every_choice_of_the_schema_is_a_set_of_names() -> None:
    known = {value for value in vars(names).values() if isinstance(value, tuple)}
    known |= {("auto", *names.DTYPES), ("auto", *names.CHECKPOINT_FORMATS)}
    known |= {("auto", "nf4", "none"), ("full", "lora", "qlora")}  # quantize, method.name
    found: dict[str, Knob] = {}
    for root in [row.root for row in VERBS.values()]:
        found |= {key: knob for key, knob in knobs(root).items() if knob.choices is not None}
    assert len(found) > 15
    for key, knob in found.items():
        assert knob.choices in known, key


def test_every_dtype_is_torchs() -> None:
    for name in names.DTYPES:
        assert resolve_dtype(name) == getattr(torch, name)


@pytest.mark.parametrize("scale_format", names.SCALE_FORMATS)
def test_every_scale_format_quantizes(scale_format: str) -> None:
    assert to_nf4(torch.randn(4, 64), scale_format=scale_format).shape == (4, 64)


def test_every_written_format_is_found_again(tmp_path: Path) -> None:
    model = load_checkpoint(demo_path("base"), [{"match": "layers.**", "kind": "frozen_nf4"}])
    for format in names.WRITTEN_FORMATS:
        save_checkpoint(model, tmp_path / format, format=format)
        assert detect_format(tmp_path / format) == format
    with pytest.raises(CheckpointError, match="format is 'meta'"):
        save_checkpoint(model, tmp_path / "meta", format="meta")
    assert set(names.QUANTIZED_FORMATS) < set(names.WRITTEN_FORMATS) < set(names.CHECKPOINT_FORMATS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(demo_path("base"))


@pytest.mark.parametrize("format", names.DATA_FORMATS)
@pytest.mark.parametrize("train_on", names.TRAIN_ON)
@pytest.mark.parametrize("on_error", names.ON_ERROR)
def test_every_way_to_read_rows(
    format: str, train_on: str, on_error: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    row = (
        '{"prompt": "a", "completion": "b", "text": "c", "chosen": "d", "rejected": "e",'
        ' "messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}]}'
    )
    (tmp_path / "rows.jsonl").write_text(f"{row}\n{row}\n")
    data = build_dataset(
        tmp_path / "rows.jsonl",
        tokenizer,
        format=format,
        train_on=train_on,
        on_error=on_error,
        max_seq_len=64,
    )
    for packing in names.PACKINGS if format != "preference" else ("none",):
        batches = Batches(data, batch_size=1, packing=packing, max_seq_len=64)
        assert sum(len(batch.rows) for batch in batches.of_epoch(0, torch.device("cpu"))) >= 2


@pytest.mark.parametrize("key", ["format", "train_on", "on_error"])
def test_other_ways_are_errors(key: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = {"format": "text", "max_seq_len": 64, key: "other"}
    with pytest.raises(QLoRAError, match=f"data.{key} is 'other'; allowed"):
        build_dataset(tmp_path / "rows.jsonl", tokenizer, **options)  # type: ignore[arg-type]
