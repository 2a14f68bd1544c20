"""The rules of `explain.py` for tokenizers, templates, rows, YAML and what a report reads."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from typing import Any

import pyarrow.parquet
import yaml
from explain import Case, same
from jinja2.sandbox import ImmutableSandboxedEnvironment
from read_kinds import CHATS, TEXTS
from safetensors.torch import load as load_safetensors
from tokenizers import Tokenizer

from qlora_builders.config.checks import flatten

# ---- tokenizers ---------------------------------------------------------------------------------

# key of a JSON file -> keys of the summary that follow from it
_FOLLOWS = {
    "bos_token": ("bos", "chat:", "pad", "stop"),
    "eos_token": ("eos", "chat:", "pad", "stop"),
    "unk_token": ("chat:",),
    "pad_token": ("pad", "chat:"),
    "chat_template": ("chat:", "stop", "eos", "pad"),
    "bos_token_id": ("bos", "chat:", "pad", "stop"),
    "eos_token_id": ("eos", "chat:", "pad", "stop"),
    "vocab_size": ("pad",),
    "added_tokens": ("pad", "stop", "eos", "bos"),
}


def changed_keys(before: Any, after: Any) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def named_tokens(case: Case) -> str | None:
    """Which tokens are special, and the template, are the choice of these files."""
    keys = changed_keys(json.loads(case.before), json.loads(case.after.decode("utf-8-sig")))
    allowed = tuple(follower for key in keys for follower in _FOLLOWS.get(key, ()))
    explained = allowed and all(key.startswith(allowed) for key in case.differing)
    return "another special token or template" if explained else None


def another_vocabulary(case: Case) -> str | None:
    """Ids and texts are those of the tokenizers library for the file."""
    backend = Tokenizer.from_file(str(case.file))
    backend.no_padding()
    backend.no_truncation()
    changed = changed_keys(json.loads(case.before), json.loads(case.after))
    followers = _FOLLOWS["added_tokens"] if changed & {"added_tokens", "model"} else ()
    for key in case.differing:
        kind, _, index = key.partition(":")
        if kind == "ids":
            said: Any = backend.encode(TEXTS[int(index)]).ids
        elif kind == "text" and _has_an_id_twice(backend):
            continue
        elif kind == "text":
            said = backend.decode(case.got[f"ids:{index}"], skip_special_tokens=True)
        elif kind == "vocab_size":
            said = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        elif kind in followers:
            continue
        else:
            return None
        if not same(case.got[key], said):
            return None
    return "another vocabulary"


def _has_an_id_twice(backend: Tokenizer) -> bool:
    """Then the library itself chooses one of the tokens, another in every process."""
    ids = backend.get_vocab(with_added_tokens=True).values()
    return len(set(ids)) < len(ids)


def another_template(case: Case) -> str | None:
    """Texts are those that jinja2 itself gives; which tokens end a turn follows from them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = re.sub(r"(\{%[-+]?)\s*generation\s*([-+]?%\})", r"\1 if true \2", case.after.decode())
    source = re.sub(r"(\{%[-+]?)\s*endgeneration\s*([-+]?%\})", r"\1 endif \2", source)
    template = environment.from_string(source.replace("\r\n", "\n"))
    for key in case.differing:
        kind, _, index = key.partition(":")
        if kind in ("stop", "eos", "pad"):
            continue
        said = template.render(
            messages=CHATS[int(index)], add_generation_prompt=True, tools=None, documents=None,
            bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>",
        )  # fmt: skip
        if kind != "chat" or said != case.got[key]:
            return None
    return "another template"


# ---- rows ---------------------------------------------------------------------------------------


def _rows(data: bytes, suffix: str) -> list[Any]:
    if suffix == ".parquet":
        return list(pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist())
    if suffix == ".json":
        value = json.loads(data.decode("utf-8-sig"))
        return list(value["data"] if isinstance(value, dict) else value)
    lines = data.decode("utf-8-sig").encode().split(b"\n")
    return [json.loads(line) for line in lines if line.strip()]


def other_rows(case: Case) -> str | None:
    """Rows that another parser reads as they were have the tokens that they had."""
    before, after = (_rows(data, case.file.suffix) for data in (case.before, case.after))
    for key in case.differing:
        index = int(key.removeprefix("row:"))
        if index < min(len(before), len(after)) and same(before[index], after[index]):
            return None
    return "another row"


# ---- YAML ---------------------------------------------------------------------------------------


def another_setting(case: Case) -> str | None:
    """Only keys whose value another parser reads differently differ, or what is chosen by them."""
    before, after = (flatten(yaml.safe_load(data)) for data in (case.before, case.after))
    missing = object()
    keys = {
        key
        for key in before.keys() | after.keys()
        if not same(before.get(key, missing), after.get(key, missing))
    }
    prefixes = tuple(f"{key}." for key in keys)
    if any(str(key).split(".")[0] == "defaults" for key in keys):
        prefixes += ("data.", "optimizer.", "method.")
    explained = all(
        key in keys or key.startswith(prefixes) or any(k.startswith(f"{key}.") for k in keys)
        for key in case.differing
    )
    return "another setting" if explained else None


def other_rules(case: Case) -> str | None:
    """The rules are those that another parser reads."""
    said = yaml.safe_load(case.after)
    said = said if isinstance(said, list) else said["components"]
    return "other rules" if repr(case.got["components"]) == repr(said) else None


# ---- reports ------------------------------------------------------------------------------------


def _until_broken(data: bytes, *, every: bool = False) -> list[Any]:
    """Objects, or `every` kind of value."""
    rows = []
    for line in data.decode(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return [row for row in rows if every or isinstance(row, dict)]


def metrics_of_a_run(case: Case) -> str | None:
    """Numbers over steps, up to the first line that is not JSON; what is no number is left out."""
    said: dict[str, float] = {}
    for row in _until_broken(case.after):
        step = row.get("step")
        if type(step) is int and 0 <= step < 10**15:
            numbers = {k: v for k, v in row.items() if k != "step" and type(v) in (int, float)}
            for key, value in numbers.items():
                said[f"{key}@{step}"] = float(value) if -1e300 < value < 1e300 else math.nan
    got = {k.removeprefix("metric:"): v for k, v in case.got.items() if k.startswith("metric:")}
    others = [key for key in case.differing if not key.startswith("metric:")]
    return (
        "other metrics" if not others and same(sorted(got.items()), sorted(said.items())) else None
    )


def lines_of_a_run(case: Case) -> str | None:
    """Objects up to the first line that is not JSON."""
    name = "processes" if case.file.name == "environment.jsonl" else "samples"
    fits = case.differing == [name] and same(case.got[name], _until_broken(case.after))
    return f"other {name}" if fits else None


def config_of_a_run(case: Case) -> str | None:
    """As another parser reads it, or a note on the page."""
    if any("config.yaml cannot be read" in note for note in case.got["notes"]):
        return "a note"
    return another_setting(_only(case, "config:")) if _base_is(case) else None


def _base_is(case: Case) -> bool:
    """Layers are shown beside the base that the config names; without it there is a note."""
    return all(key.startswith(("config:", "notes")) for key in case.differing)


def _only(case: Case, prefix: str) -> Case:
    keys = [key.removeprefix(prefix) for key in case.differing if key.startswith(prefix)]
    return replace(case, differing=keys)


def adapter_of_a_run(case: Case) -> str | None:
    """A note on the page, or the norms of what is in the file."""
    if any("the adapter cannot be read" in note for note in case.got["notes"]):
        return "a note"
    stored = load_safetensors((case.folder / "adapter" / "adapter_model.safetensors").read_bytes())
    config = json.loads((case.folder / "adapter" / "adapter_config.json").read_bytes())

    def said(name: str) -> float:
        a, b = (stored[f"base_model.model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        full = f"model.{name}"
        alpha = (config.get("alpha_pattern") or {}).get(full, config["lora_alpha"])
        scale = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
        return float(alpha / scale * (b @ a).norm())

    for key in case.differing:
        prefix, _, name = key.partition(":")
        if key == "notes" and all("base checkpoint" in note for note in case.got["notes"]):
            continue
        got, expected = case.got[key], said(name)
        both_nan = math.isnan(got) and math.isnan(expected)
        if prefix != "update" or not (both_nan or math.isclose(got, expected, rel_tol=1e-6)):
            return None
    return "another adapter"


def kept_metrics(case: Case) -> str | None:
    """Rows up to the step that a run goes on from, as far as they are rows with a step."""
    kept = []
    for row in _until_broken(case.after, every=True):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        kept.append(row)
    rows = [row for row in kept if row["step"] <= 3] + [{"step": 4, "loss": 0.5}]
    shown = case.got["rows"] == "".join(json.dumps(row) + "\n" for row in rows)
    evaluated = any(row["step"] == 2 and "eval_loss" in row for row in kept)
    return "other metrics" if shown and case.got["evaluated"] == evaluated else None
