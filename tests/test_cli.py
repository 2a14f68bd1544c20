"""The `qlora` command with stand-in recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_builders import __version__, cli
from qlora_builders.config import shipped

RECIPE = """
from dataclasses import dataclass

@dataclass
class Seen:
    seed: int

def main(cfg):
    print("recipe", Seen(cfg.training.seed))
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package's layout: configs and recipes inside it."""
    (tmp_path / "configs").symlink_to(shipped.shipped_dir("configs"))
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in ("finetune", "inspect_plan"):
        (folder / f"{name}.py").write_text(RECIPE.replace("recipe", name))
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path)
    return folder


def test_runs_the_recipe_of_the_verb(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.recipe_path("finetune") == recipes / "finetune.py"
    assert cli.main(["finetune", "training.seed=4"]) == 0
    assert cli.main(["inspect", "training.seed=5"]) == 0
    assert capsys.readouterr().out == "finetune Seen(seed=4)\ninspect_plan Seen(seed=5)\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb:<10} {line}" in text for verb, line in cli.COMMANDS.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"qlora {__version__}\n"


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fintune"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'fintune'; did you mean 'finetune'?\n"


def test_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", "ls"]) == 0
    assert "experiment/demo_qlora" in capsys.readouterr().out
    assert cli.main(["configs", "shwo"]) == 2
    assert "error: qlora configs: unknown command 'shwo'" in capsys.readouterr().err


def test_help_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dpo", "--multirun", "training.seed=0,1", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: qlora dpo ")


def test_config_mistakes_come_before_the_recipe_loads(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipes / "finetune.py").write_text("raise RuntimeError('loaded')\n")
    assert cli.main(["finetune", "training.bach_size=1"]) == 2
    assert "did you mean 'training.batch_size'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "forbidden"),
    [
        (["--help"], ["torch", "hydra", "omegaconf", "rich", "matplotlib", "jinja2"]),
        (["finetune", "--help"], ["torch", "transformers"]),
        (["configs", "ls"], ["torch"]),
        (["finetune", "bad=1"], ["torch"]),
    ],
)
def test_starts_without_slow_imports(argv: list[str], forbidden: list[str]) -> None:
    script = (
        "import sys\nfrom qlora_builders import cli\n"
        f"cli.main({argv!r})\nprint([m for m in {forbidden!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(cli.__file__).parent.parent,
    )
    assert done.stdout.splitlines()[-1] == "[]"
