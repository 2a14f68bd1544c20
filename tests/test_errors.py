"""The error classes, the spelling help, and optional dependencies."""

from __future__ import annotations

import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_builders import errors
from qlora_builders.config.compose import compose
from qlora_builders.data import Tokenizer, load_rows
from qlora_builders.data.prompts import read_prompts
from qlora_builders.errors import QLoRAError, did_you_mean, nearest, optional_import

CLASSES = (
    "ConfigError",
    "PlanError",
    "CheckpointError",
    "DataError",
    "UnsafeError",
    "UnsafeTemplateError",
    "TrainingError",
)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_a_value_error(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, QLoRAError)
    assert issubclass(error, ValueError)
    assert str(error("layer 3")) == "layer 3"


def test_no_error_class_is_left_out() -> None:
    defined = {n for n, v in vars(errors).items() if isinstance(v, type) and v is not QLoRAError}
    assert {n for n in defined if n.endswith("Error")} == set(CLASSES)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rnak", ["rank", "alpha"], "rank"),
        ("q_porj", ["q_proj", "k_proj"], "q_proj"),
        ("zzz", ["rank", "alpha"], None),
        ("rank", [], None),
        ("rank", iter(["rank"]), "rank"),
    ],
)
def test_nearest(name: str, options: list[str], expected: str | None) -> None:
    assert nearest(name, options) == expected


def test_did_you_mean() -> None:
    assert did_you_mean("rnak", ["alpha", "rank"]) == "; did you mean 'rank'?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == "; allowed: alpha, rank"
    assert did_you_mean("zzz", []) == ""
    assert did_you_mean("rnak", iter(["rank"])) == "; did you mean 'rank'?"


def test_optional_import_returns_the_module() -> None:
    assert optional_import("json.decoder", "data").JSONDecoder


def test_optional_import_names_the_package_and_the_extra() -> None:
    with pytest.raises(
        ImportError, match=r"needs the package 'no_such': pip install 'qlora-builders\[data\]'"
    ) as raised:
        optional_import("no_such.module", "data")
    assert isinstance(raised.value.__cause__, ImportError)


def test_home_folders_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert errors.expand_home("~/a", errors.DataError) == Path("/somewhere/a")
    assert errors.expand_home("a/~/b", errors.DataError) == Path("a/~/b")


@pytest.mark.parametrize("name", ["~no.such.user/x.jsonl", "~/x.jsonl"])
@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (load_rows, errors.DataError),
        (Tokenizer.from_dir, errors.DataError),
        (lambda path: read_prompts(path, None), errors.DataError),
        (lambda path: compose("finetune", config_dir=path), errors.ConfigError),
    ],
    ids=["rows", "tokenizer", "prompts", "config_dir"],
)
def test_a_home_folder_that_is_not_there_is_named(
    read: Callable[[str], object],
    kind: type[QLoRAError],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_entry(of: object) -> None:
        raise KeyError(of)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    start = name.partition("/")[0]
    with pytest.raises(kind, match=f"^{name}: there is no home folder for '{start}' here; write"):
        read(name)
