"""What the tests notice: python scripts/mutate.py [--count 40] [--seed 0] [--target loss].

One line is changed at a time, in a copy of the tree, of what decides what a run computes; the tests
of that part run until one fails. Prints JSON: each mutation, and whether it was caught. One that
survives is a test to write, unless both programs mean the same.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT, PACKAGE = Path(__file__).resolve().parents[1], "qlora_builders"
# target -> modules of the package, and the folders of tests that run, the nearest ones first
TARGETS = {
    "kernels": (("kernels/*.py",), ("tests/kernels", "tests/tensor")),
    "hooks": (("modules/linear.py",), ("tests/modules", "tests/checkpoint")),
    "loss": (("training/step.py", "modules/loss.py"), ("tests/modules", "tests/training")),
    "plan": (("models/components.py",), ("tests/models", "tests/config")),
    "adapters": (("checkpoint/peft*.py", "checkpoint/peft/*.py"), ("tests/checkpoint",)),
}
SKIPPED = ("__init__.py", "*triton*.py", "build.py")  # what not every machine runs
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    target: str
    file: str
    line: int
    kind: str
    lines: tuple[str, str]  # before and after
    text: str  # of the whole module, changed


def mutations(target: str, file: str, source: str) -> Iterator[Mutation]:
    """All there are of a module."""
    tree = ast.parse(source)
    lines = source.encode().splitlines(keepends=True)
    words = {
        id(part) for node in ast.walk(tree) for said in _words(node) for part in ast.walk(said)
    }
    for node in (each for each in ast.walk(tree) if id(each) not in words):
        for kind, old, new in _changes(node):
            if old.lineno == old.end_lineno:
                at, line = old.lineno - 1, lines[old.lineno - 1]
                changed = line[: old.col_offset] + new.encode() + line[old.end_col_offset :]
                shown = line.decode().strip(), changed.decode().strip()
                text = b"".join([*lines[:at], changed, *lines[at + 1 :]]).decode()
                yield Mutation(target, file, old.lineno, kind, shown, text)


def _words(node: ast.AST) -> list[ast.AST]:
    """Parts that no result depends on: messages, annotations, decorators, our own invariants."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return [node]
    said = getattr(node, "annotation", None), getattr(node, "returns", None)
    return [*getattr(node, "decorator_list", ()), *filter(None, said)]


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """(kind, what is replaced, by which text)."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        other = {**vars(node), "op": SWAPS[type(node.op)]()}
        yield "operator", node, f"({ast.unparse(type(node)(**other))})"
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        other = {**vars(node), "ops": [SWAPS[type(node.ops[0])](), *node.ops[1:]]}
        yield "operator", node, f"({ast.unparse(ast.Compare(**other))})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = node.value
        for new in (not value,) if isinstance(value, bool) else (value + 1, value - 1):
            yield "constant", node, f"({new!r})"
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "negated condition", node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.AugAssign | ast.Expr) and not isinstance(node.value, ast.Constant):
        yield "dropped statement", node, "pass"


def draw(root: Path, targets: Sequence[str], count: int, seed: int) -> list[Mutation]:
    """As many of each target as of the others."""
    rng, drawn = random.Random(seed), []
    for target in targets:
        found: list[Mutation] = []
        for file in sorted(f for glob in TARGETS[target][0] for f in (root / PACKAGE).glob(glob)):
            if not any(map(file.match, SKIPPED)):
                found += mutations(target, str(file.relative_to(root)), file.read_text("utf-8"))
        drawn.append(rng.sample(found, min(len(found), -(-count // len(targets)))))
    return [one for in_turn in zip(*drawn, strict=False) for one in in_turn][:count]


def run_tests(tree: Path, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """("caught" or "survived", by what)."""
    marks = "not fuzz and not slow and not gpu"
    command = [sys.executable, "-Bm", "pytest", "-xqp", "no:cacheprovider", "-m", marks, *tests]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    options: Any = {"capture_output": True, "text": True, "timeout": seconds}
    try:
        ended = subprocess.run(command, cwd=tree, env=env, check=False, **options)
    except subprocess.TimeoutExpired:
        return "caught", f"takes more than {seconds:g} s"
    if ended.returncode == 0:
        return "survived", ""
    failed = re.findall("^(?:FAILED|ERROR).*", ended.stdout, re.MULTILINE)
    return "caught", failed[0][:300] if failed else ended.stdout[-500:] + ended.stderr[-500:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Seeded mutations, and whether tests notice.")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--tree", type=Path, default=ROOT, help="of the project; default: this one")
    parser.add_argument("--seconds", type=float, default=900, help="that tests may take")
    options = parser.parse_args()
    drawn = draw(options.tree, options.target or list(TARGETS), options.count, options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(options.tree, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for target in dict.fromkeys(one.target for one in drawn):
            result, by = run_tests(tree, TARGETS[target][1], options.seconds)
            if result == "caught":
                parser.exit(1, f"the tests of {target} fail without any change: {by}\n")
        for one in drawn:
            sound = (tree / one.file).read_text("utf-8")
            (tree / one.file).write_text(one.text, "utf-8")
            result, by = run_tests(tree, TARGETS[one.target][1], options.seconds)
            (tree / one.file).write_text(sound, "utf-8")
            about = {key: value for key, value in vars(one).items() if key != "text"}
            rows.append({**about, "result": result, "by": by})
            print(f"{len(rows)}/{len(drawn)} {one.file}:{one.line} {result}", file=sys.stderr)
    counts = {"caught": sum(row["result"] == "caught" for row in rows), "of": len(rows)}
    print(json.dumps({**counts, "mutations": rows}, indent=1))


if __name__ == "__main__":
    main()
