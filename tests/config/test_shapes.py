"""A mapping, list or scalar where a key wants another shape is one ConfigError, at every key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from own_configs import write_own

from qlora_builders.config.compose import compose, draft
from qlora_builders.config.own_files import groups
from qlora_builders.config.sections import knobs
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError

MAPPING = {"a": {"b": 1}}
LIST = [["x"], {"c": 2}]
SECTION = "section"


def keys() -> Iterator[tuple[str, str, Any]]:
    """(verb, key, type) of every key; one that verbs share with its first verb."""
    seen = set()
    for verb, row in VERBS.items():
        root = row.root
        leaves = knobs(root)
        types: dict[str, Any] = {key: knob.type for key, knob in leaves.items()}
        types |= {key.rpartition(".")[0]: SECTION for key in leaves if "." in key}
        for key, of in types.items():
            if (key, str(of)) not in seen:
                seen.add((key, str(of)))
                yield verb, key, of


def wrong_shapes(of: Any) -> list[Any]:
    if of == SECTION:
        return ["text", LIST]
    if get_origin(of) is list:
        elements = [[["x"]], {"a": 1} if get_args(of)[0] in (str, int) else "x"]
        return [MAPPING, 3, *([element] for element in elements)]
    if get_origin(of) is dict:
        return [LIST, 3]
    return [MAPPING, LIST]


KEYS = list(keys())
IN_FILES = [one for one in KEYS if "experiment" in groups(one[0])]


def test_there_are_keys_of_every_kind() -> None:
    kinds = {get_origin(of) or of for _, _, of in KEYS}
    assert {list, dict, str, int, float, bool, SECTION} <= kinds
    assert len(KEYS) > 100
    assert {verb for verb, *_ in KEYS} >= VERBS.keys() - {"inspect"}


@pytest.mark.parametrize(("verb", "key", "of"), KEYS, ids=[f"{v}-{k}" for v, k, _ in KEYS])
def test_on_the_command_line(verb: str, key: str, of: Any) -> None:
    if of is str or str in get_args(of):
        return  # a path or a prompt may hold braces and brackets
    for value in wrong_shapes(of):
        with pytest.raises(ConfigError):
            compose(verb, [f"{key}={json.dumps(value)}"])


@pytest.mark.parametrize(("verb", "key", "of"), IN_FILES, ids=[f"{v}-{k}" for v, k, _ in IN_FILES])
def test_in_an_experiment(verb: str, key: str, of: Any, tmp_path: Path) -> None:
    for value in wrong_shapes(of):
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        write_own(tmp_path, {"experiment/mine": json.dumps(tree)})
        try:
            _, problems = draft(verb, ["experiment=mine"], config_dir=tmp_path, for_run=False)
        except ConfigError as error:
            problems = list(error.problems)
        assert any(key.partition(".")[0] in problem for problem in problems), value


@pytest.mark.parametrize("group", ["method", "optimizer", "data"])
@pytest.mark.parametrize(
    "content", ["text", "3", "[1, {a: 2}]", "{columns: [1]}", "{targets: {a: 1}}", "{1: {2: 3}}"]
)
def test_in_a_file_of_a_group(group: str, content: str, tmp_path: Path) -> None:
    write_own(tmp_path, {f"{group}/mine": content})
    with pytest.raises(ConfigError):
        compose("finetune", [f"{group}=mine"], config_dir=tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("components.a.b=1", r"components takes a list, such as \[a,b\]"),
        ("loggers.first={}", r"loggers takes a list, such as \[a,b\]"),
        ("method.targets.x=1", r"method\.targets takes a list"),
        ("components={a:{b:1}}", r"components: (takes a list|a list takes)"),
        ("train_tokens=[[1]]", r"train_tokens\[0\]: Value '\[1\]' is not a whole number"),
        ("method.targets=[[a]]", r"method\.targets"),
        ("loggers=[3]", r"loggers"),
        ("optimizer={1:2}", r"optimizer"),
    ],
)
def test_the_message(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("finetune", [override])


def test_a_mapping_for_a_list_in_a_file_is_one_message(tmp_path: Path) -> None:
    write_own(tmp_path, {"experiment/mine": "components: {a: {b: 1}}"})
    _, (problem,) = draft("finetune", ["experiment=mine"], config_dir=tmp_path)
    assert problem.startswith("experiment/mine.yaml: components: ")
    assert "list" in problem
