"""The shape of the package: imports point one way, need the base install only, and stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qlora_builders

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qlora_builders"
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py")) + RECIPES

# A part may import the parts of earlier layers; the parts of one layer do not import each other.
LAYERS = (
    {"errors", "names"},
    {"visible"},
    {"console", "files"},
    {"confined"},
    {"kernels"},
    {"tensor"},
    {"modules"},
    {"models"},
    {"checkpoint", "data", "distributed", "training", "config"},
    {"analysis", "evaluation", "report"},
    {"runs", "sweep"},
    {"recipes", "cli"},
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
# Everybody else asks `format_of` or `is_quantized`, and never which type it is.
TYPE_CHECKS = "qlora_builders/tensor/"
QUANTIZED_TYPES = ("QuantizedTensor", "NF4Tensor", "MXFP4Tensor", "QuantizedShard")
OWN_TEMPLATES = ("qlora_builders/report/page.py",)
# imported where they are needed: for CUDA tensors, and for tasks of lm_eval
NEED_EXTRAS = ("nf4_triton.py", "nf4_triton_kernels.py", "harness_model.py")
OPTIONAL = (
    "datasets",
    "tensorboard",
    "wandb",
    "transformers",
    "peft",
    "numba",
    "triton",
    "bitsandbytes",
    "lm_eval",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: str) -> str:
    """`qlora_builders/models/llama.py` -> models; the package's own __init__ -> __init__."""
    first, _, rest = path.partition("/")
    if first == "recipes":
        return first
    return rest.partition("/")[0].removesuffix(".py")


def imported_modules(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything imported, function bodies included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def wrong_imports(path: str, source: str) -> list[str]:
    """Imports that point the wrong way."""
    part = part_of(path)
    if part == "__init__":
        return []
    found = []
    for line, name in imported_modules(path, ast.parse(source)):
        top, _, rest = name.partition(".")
        target = "recipes" if top == "recipes" else rest.partition(".")[0]
        if top not in ("qlora_builders", "recipes") or target == "__version__":
            continue
        if target not in RANK:
            found.append(f"{path}:{line} imports {name}; import it from the part it lives in")
        elif target != part and RANK[target] >= RANK[part]:
            found.append(f"{path}:{line} imports {name}, which is not below {part}")
    return found


def wrong_type_checks(path: str, source: str) -> list[str]:
    """`isinstance(x, NF4Tensor)` and its like, outside the part that may know the types."""
    if path.startswith(TYPE_CHECKS):
        return []
    return [
        f"{path}:{node.lineno} asks which quantized type something is; call is_quantized"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
        and any(name in ast.unparse(node.args[1]) for name in QUANTIZED_TYPES)
    ]


def evaluates_unconfined(path: str, source: str) -> list[str]:
    """Imports of what evaluates a stranger's code, outside the process with limits."""
    if path.startswith("qlora_builders/confined/") or path in OWN_TEMPLATES:
        return []
    return [
        f"{path}:{line} imports {name}; ask qlora_builders.confined"
        for line, name in imported_modules(path, ast.parse(source))
        if name.partition(".")[0] in ("jinja2", "tokenizers")
    ]


def too_long(path: str, source: str) -> list[str]:
    """Files over 450 lines, functions over 60 (a recipe's main: 100)."""
    found = []
    lines = len(source.splitlines())
    if lines > 450:
        found.append(f"{path} has {lines} lines; at most 450")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = 100 if path.startswith("recipes/") and node.name == "main" else 60
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > limit:
                found.append(f"{path}:{node.lineno} {node.name} has {size} lines; at most {limit}")
    return found


# ---- the package --------------------------------------------------------------------------------


def test_the_files_are_found() -> None:
    names = {relative(path) for path in FILES}
    assert len(names) > 40
    assert {"qlora_builders/kernels/nf4_reference.py", "recipes/finetune.py"} <= names
    parts = {part_of(name) for name in names} - {"__init__"}
    assert parts <= RANK.keys(), "a new part: give it a layer in LAYERS and in the design"


@pytest.mark.parametrize("path", FILES, ids=relative)
@pytest.mark.parametrize(
    "check", [wrong_imports, wrong_type_checks, evaluates_unconfined, too_long]
)
def test_house_rules(check: Callable[[str, str], list[str]], path: Path) -> None:
    assert check(relative(path), path.read_text(encoding="utf-8")) == []


# ---- the checks themselves ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("qlora_builders/kernels/bad.py", "from qlora_builders.tensor import NF4Tensor"),
        ("qlora_builders/kernels/bad.py", "import qlora_builders.tensor.nf4"),
        ("qlora_builders/kernels/bad.py", "from ..tensor import NF4Tensor"),
        ("qlora_builders/kernels/bad.py", "from .. import tensor"),
        ("qlora_builders/modules/bad.py", "def f():\n    from qlora_builders.models import llama"),
        ("qlora_builders/models/bad.py", "from qlora_builders import checkpoint"),
        ("qlora_builders/models/bad.py", "from qlora_builders import llama"),
        ("qlora_builders/data/bad.py", "import torch\nfrom qlora_builders.config import schema"),
        ("qlora_builders/checkpoint/bad.py", "from qlora_builders.training.step import x"),
        ("qlora_builders/config/bad.py", "import recipes.finetune"),
        ("qlora_builders/training/bad.py", "from qlora_builders.cli import main"),
        ("qlora_builders/errors.py", "from qlora_builders.kernels import NF4"),
    ],
)
def test_a_wrong_import_is_caught(path: str, source: str) -> None:
    (found,) = wrong_imports(path, source)
    assert found.startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("qlora_builders/models/good.py", "from qlora_builders.modules import Linear"),
        ("qlora_builders/models/good.py", "from qlora_builders.models.llama import llama"),
        ("qlora_builders/models/good.py", "from . import llama"),
        ("qlora_builders/data/good.py", "from qlora_builders.errors import DataError"),
        ("qlora_builders/cli.py", "from qlora_builders import __version__"),
        ("recipes/good.py", "from qlora_builders.data import Tokenizer\nimport torch.nn"),
        ("qlora_builders/__init__.py", "from qlora_builders.checkpoint import load_adapter"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert wrong_imports(path, source) == []


def test_a_type_check_is_caught_outside_its_places() -> None:
    for source in ("isinstance(w, QuantizedTensor)", "isinstance(w, (A, tensor.NF4Tensor))"):
        assert len(wrong_type_checks("qlora_builders/training/bad.py", source)) == 1
        assert len(wrong_type_checks("qlora_builders/modules/linear.py", source)) == 1
        assert wrong_type_checks("qlora_builders/tensor/nf4.py", source) == []
    for source in ("isinstance(w, Tensor)", "is_quantized(w)"):
        assert wrong_type_checks("qlora_builders/training/good.py", source) == []


def test_evaluating_is_caught_outside_its_process() -> None:
    for source in ("import jinja2.sandbox", "from tokenizers import Tokenizer"):
        assert len(evaluates_unconfined("qlora_builders/data/bad.py", source)) == 1
        assert evaluates_unconfined("qlora_builders/confined/good.py", source) == []


def test_length_is_caught() -> None:
    def function(name: str, lines: int) -> str:
        return f"def {name}():\n" + "    x = 1\n" * (lines - 1)

    assert too_long("recipes/a.py", function("main", 100) + function("f", 60)) == []
    assert len(too_long("recipes/a.py", function("main", 101) + function("f", 61))) == 2
    assert len(too_long("qlora_builders/a.py", function("main", 61))) == 1
    assert len(too_long("qlora_builders/a.py", "x = 1\n" * 451)) == 1


# ---- importing ----------------------------------------------------------------------------------


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


IMPORT_ALL = """
    import importlib, runpy, sys

    for name in sys.argv[1].split(","):
        sys.modules[name] = None  # importing it fails, and find_spec says that it is not there
    for name in sys.argv[2].split(","):
        importlib.import_module(name)
    for path in sys.argv[3].split(","):
        runpy.run_path(path, run_name="imported")
    print("imported")
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_module_and_recipe_imports_with_the_base_install_only() -> None:
    files = [p for p in FILES if p not in RECIPES and p.name not in NEED_EXTRAS]
    modules = ",".join(module_name(path) for path in files)
    recipes = ",".join(str(path) for path in RECIPES)
    done = run_python(IMPORT_ALL, ",".join(OPTIONAL), modules, recipes)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


def test_the_blocker_blocks() -> None:
    done = run_python(IMPORT_ALL, "colorsys", "colorsys", "")
    assert done.returncode != 0
    assert "import of colorsys halted; None in sys.modules" in done.stderr


def test_importing_the_package_does_not_import_torch() -> None:
    done = run_python(
        """
        import sys, qlora_builders, qlora_builders.cli
        print(qlora_builders.__version__, sorted({"torch", "hydra", "numpy"} & set(sys.modules)))
        """
    )
    assert done.stdout == f"{qlora_builders.__version__} []\n", done.stderr


def test_the_public_names_resolve() -> None:
    for name in qlora_builders.__all__:
        value = getattr(qlora_builders, name)
        assert name == "LLAMA_ARCHS" or value.__name__ == name
    assert set(qlora_builders.__all__) <= set(dir(qlora_builders))
    assert len(qlora_builders.__all__) == len(set(qlora_builders.__all__)) >= 15


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'qlora_builders' has no attribute 'to_nf5'"):
        _ = qlora_builders.to_nf5


def test_no_two_test_modules_have_one_name() -> None:
    """pytest imports them by it, and does so in a whole run alone."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names))
