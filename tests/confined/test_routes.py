"""Tokenizers, regexes and YAML that would take all time or memory: one message each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_builders.checkpoint.peft import config as peft_config
from qlora_builders.checkpoint.peft.config import read_peft_config
from qlora_builders.config import own_files
from qlora_builders.config.own_files import load_yaml
from qlora_builders.config.shipped import demo_path
from qlora_builders.confined.process import Limits
from qlora_builders.data import Tokenizer, build_dataset
from qlora_builders.data import tokenizer as tokenizers_of
from qlora_builders.errors import CheckpointError, ConfigError, DataError, UnsafeError

SMALL = Limits(0.3, 128_000_000, 4_000_000)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (peft_config, own_files, tokenizers_of):
        monkeypatch.setattr(module, "LIMITS", SMALL)


def soon(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        call()
    assert time.monotonic() - started < 60


# ---- tokenizer.json -----------------------------------------------------------------------------


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def split(regex: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }


DOUBLING = sequence(*[replaced({"String": "a"}, "aa")] * 40)
TEXT = "a" * 60 + "!"
TOKENIZERS: dict[str, dict[str, Any]] = {
    "doubling": {"normalizer": DOUBLING},
    "doubling by regex": {"normalizer": sequence(*[replaced({"Regex": "a"}, "aa")] * 40)},
    "squaring": {"normalizer": sequence(*[replaced({"String": "a"}, "a" * 999)] * 9)},
    "slow regex of a normalizer": {"normalizer": replaced({"Regex": "(a|a)+b"}, "")},
    "slow regex": {"pre_tokenizer": split("(a|a)+b")},
    "nested quantifiers": {"pre_tokenizer": split("(a+)+b")},
    "look behind": {"pre_tokenizer": split("(?=(a+)+b)x")},
    "counted": {"pre_tokenizer": split("(a{1,99}){1,99}b")},
}
DECODERS: dict[str, Any] = {
    "doubling": [replaced({"String": "e"}, "ee")] * 40,
    "squaring": [replaced({"String": "e"}, "e" * 999)] * 9,
}


def tokenizer_with(folder: Path, **changes: Any) -> Path:
    file = folder / "tokenizer.json"
    content = json.loads((Path(demo_path("base")) / "tokenizer.json").read_text())
    file.write_text(json.dumps(content | changes))
    (folder / "tokenizer_config.json").write_text('{"eos_token": null}')
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_does_not_end(name: str, tmp_path: Path) -> None:
    folder = tokenizer_with(tmp_path, **TOKENIZERS[name])

    def encode() -> None:
        Tokenizer.from_dir(folder).encode(TEXT)

    soon(encode, DataError, r"tokenizer\.json: (reading it|the tokenizer|not a tokenizer)")


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_that_does_not_end(name: str, tmp_path: Path) -> None:
    decoders = {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, *DECODERS[name]]}
    decoders["decoders"][0] |= {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    tokenizer = Tokenizer.from_dir(tokenizer_with(tmp_path, decoder=decoders))
    ids = tokenizer.encode("eeee eeee")
    soon(lambda: tokenizer.decode(ids), UnsafeError, "the tokenizer takes more than .* for ids; do")
    assert tokenizer.encode("eeee eeee") == ids


def test_a_file_of_any_size_is_not_read(tmp_path: Path) -> None:
    folder = tokenizer_with(tmp_path)
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(10**12)
    soon(
        lambda: Tokenizer.from_dir(folder), DataError, r"has 1(,000){4} bytes; at most 200,000,000"
    )


def test_a_row_on_which_the_tokenizer_fails_is_named_and_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Onig gives up after ten million retries, which is a panic in Rust."""
    monkeypatch.setattr(tokenizers_of, "LIMITS", Limits(30.0))
    tokenizer = Tokenizer.from_dir(tokenizer_with(tmp_path, pre_tokenizer=split("(a|a)+b")))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ok", TEXT, "fine")))
    options: dict[str, Any] = {"format": "instruct"}
    options |= {"columns": {"prompt": "text", "completion": "text"}, "max_seq_len": 99}
    monkeypatch.setattr(tokenizer, "eos_token_id", 0)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*tokenizer fails on texts: .*"):
        build_dataset(file, tokenizer, **options)
    dataset = build_dataset(file, tokenizer, on_error="skip", **options)
    assert (len(dataset), dataset.report.skipped_rows) == (2, 1)


# ---- adapter_config.json ------------------------------------------------------------------------

NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(16)]
SLOW = "(([a-z._0-9])+)+!"
REGEXES: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": SLOW},
    "exclude_modules": {"exclude_modules": SLOW},
    "modules_to_save": {"modules_to_save": [SLOW]},
    "rank_pattern": {"rank_pattern": {SLOW: 4}},
    "alpha_pattern": {"alpha_pattern": {SLOW: 4}},
    "layers_pattern": {"layers_pattern": SLOW, "layers_to_transform": [0]},
    "alternatives": {"target_modules": "(.|[a-z._0-9])+!"},
    "back references": {"target_modules": r"(.*)*(.*)*\1\2!"},
    "counted": {"target_modules": "((.{1,9}){1,9}){1,9}!"},
    "many": {"rank_pattern": {f"{SLOW}{i}": 4 for i in range(99)}},
}


def adapter(folder: Path, **changes: Any) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("name", REGEXES)
def test_a_regex_that_does_not_end(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path, **REGEXES[name])
    key = next(iter(REGEXES[name]))
    match = rf"adapter_config\.json: matching {key} .* takes more than .*; write the names of the"
    soon(lambda: read_peft_config(folder).check_entries(NAMES, []), CheckpointError, match)


@pytest.mark.parametrize("pattern", ["(", "a**", "(?P<index", "a{99999999999}", "(?<=a+)b"])
def test_what_is_no_regex(pattern: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path, exclude_modules=pattern)
    match = r"adapter_config\.json: exclude_modules entry .* is no regex: "
    soon(lambda: read_peft_config(folder), CheckpointError, match)


def test_a_regex_that_does_not_fit_into_ours(tmp_path: Path) -> None:
    config = read_peft_config(adapter(tmp_path, rank_pattern={"(?i)q_proj": 4}))
    soon(lambda: config.ranks(NAMES), CheckpointError, "rank_pattern cannot be matched: global fl")


def test_regexes_of_every_kind(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "target_modules": r"(?i).*\.[QK]_proj",
        "exclude_modules": r".*layers\.(3|4)\..*",
        "rank_pattern": {r"layers\.1\d\..*": 8, "q_proj": 4},
        "alpha_pattern": {"^model.*0.self_attn.q_proj": 7},
    }
    config = read_peft_config(adapter(tmp_path, **changes))
    assert sorted(set(NAMES) - config.targeted(NAMES)) == [NAMES[3], NAMES[4]]
    assert list(config.ranks(NAMES).values()) == [4] * 10 + [8] * 6
    assert [name for name, alpha in config.alphas(NAMES).items() if alpha == 7] == [
        NAMES[0],
        NAMES[10],
    ]


# ---- YAML ---------------------------------------------------------------------------------------


def doubled(first: str, template: str, times: int = 30) -> str:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + template.replace("@", f"*a{i - 1}") for i in range(1, times)]
    return "\n".join(lines) + "\n"


YAML = {
    "lists": doubled("[x]", "[@, @]"),
    "mappings": doubled("{k: x}", "{a: @, b: @}"),
    "merges": doubled("{k: x}", "{<<: [@, @], a: @, b: @}"),
    "itself": "&a [*a]\n",
    "itself in a mapping": "a: &a {b: *a}\n",
    "deep": "[" * 5000 + "]" * 5000,
    "deep mappings": "{a: " * 5000 + "}" * 5000,
    "deep by indent": "".join(f"{' ' * i}a:\n" for i in range(2000)),
    "long": "[" + "1, " * 101_000 + "1]",
    "large": "a: " + "x" * 6_000_000,
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_that_stands_for_too_much(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(YAML[name])
    match = (
        r"mine\.yaml: (with its aliases|nested too|reading it takes more|has [\d,]+ bytes; at most)"
    )
    soon(lambda: load_yaml(file), ConfigError, match)


def test_yaml_with_aliases_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_files, "LIMITS", Limits())
    file = tmp_path / "mine.yaml"
    file.write_text("a: &a {rank: 4}\nb: {<<: *a, alpha: 8}\nc: [*a, *a]\n")
    assert load_yaml(file) == {
        "a": {"rank": 4},
        "b": {"rank": 4, "alpha": 8},
        "c": [{"rank": 4}] * 2,
    }
