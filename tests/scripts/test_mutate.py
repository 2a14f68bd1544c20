"""Mutations are of one line, parse, mean something else, and are told apart by tests."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "mutate.py"
SOURCE = '''"""Module."""
def mean(values: list[float], scale: float = 1.0) -> float:
    total = 0
    for value in values:
        total += value * scale
    if not values or total < 0:
        raise ValueError(f"{len(values) + 1} values")
    print(total)
    return total / len(values)
'''
WANTED = {  # kind and line -> what is written there
    ("constant", 2): {"scale: float = (2.0))", "scale: float = (0.0))"},
    ("constant", 3): {"total = (1)", "total = (-1)"},
    ("dropped statement", 5): {"pass"},
    ("operator", 5): {"total += (value + scale)"},
    ("negated condition", 6): {"if (not (not values or total < 0)):"},
    ("operator", 6): {"if (not values and total < 0):", "if not values or (total <= 0):"},
    ("constant", 6): {"total < (1):", "total < (-1):"},
    ("dropped statement", 8): {"pass"},
    ("operator", 9): {"return (total * len(values))"},
}


def test_mutations_are_of_one_line_and_of_no_message() -> None:
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    mutate = sys.modules["mutate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutate)
    found = list(mutate.mutations("loss", "mean.py", SOURCE))
    assert {(one.kind, one.line) for one in found} == WANTED.keys()
    assert len(found) == sum(map(len, WANTED.values()))
    for one in found:
        lines = list(zip(SOURCE.splitlines(), one.text.splitlines(), strict=True))
        assert [i for i, (old, new) in enumerate(lines, 1) if old != new] == [one.line]
        assert ast.dump(ast.parse(one.text)) != ast.dump(ast.parse(SOURCE))
        assert any(text in lines[one.line - 1][1] for text in WANTED[one.kind, one.line])


def write_tree(tmp_path: Path, test_of_limit: str) -> Path:
    """A project of one module, which says 3, and one test; the path of the module."""
    module = tmp_path / "qlora_builders" / "models" / "components.py"
    module.parent.mkdir(parents=True)
    module.write_text("LIMIT = 3\n")
    for package in (module.parent, module.parents[1]):
        (package / "__init__.py").touch()
    for folder in ("models", "config"):
        (tmp_path / "tests" / folder).mkdir(parents=True)
    test = "from qlora_builders.models.components import LIMIT\n\n\ndef test_it():\n    assert "
    (tmp_path / "tests/models/test_it.py").write_text(test + test_of_limit)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  fuzz\n  slow\n  gpu\n")
    return module


def run(tree: Path) -> subprocess.CompletedProcess[str]:
    options = ["--tree", str(tree), "--target", "plan", "--count", "1"]
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)


@pytest.mark.parametrize(("test", "result"), [("LIMIT == 3", "caught"), ("1", "survived")])
def test_a_mutation_is_caught_if_a_test_fails(tmp_path: Path, test: str, result: str) -> None:
    module = write_tree(tmp_path, f"{test}\n")
    first, second = (json.loads(run(tmp_path).stdout) for _ in range(2))
    assert first == second
    assert [one["result"] for one in first["mutations"]] == [result]
    assert (first["caught"], first["of"]) == (int(result == "caught"), 1)
    assert module.read_text() == "LIMIT = 3\n"


def test_tests_that_fail_anyway_catch_nothing(tmp_path: Path) -> None:
    write_tree(tmp_path, "LIMIT == 4\n")
    ended = run(tmp_path)
    assert ended.returncode == 1
    assert "the tests of plan fail without any change" in ended.stderr
    assert ended.stdout == ""
