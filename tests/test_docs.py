"""What the documentation says is so: its commands run, its names exist, its links lead somewhere.

Every page is a story in a folder of its own: files that it shows are written there, and its
commands run in their order, with fewer steps and rows than a reader would take. `path/to/X` is a
small base.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from archs import tiny_arch
from docs_pages import (
    DOCS,
    PAGES,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    links,
    prose,
    spans,
    table_rows,
)

import qlora_builders
from qlora_builders import cli, llama, save_checkpoint
from qlora_builders.config.compose import compose_tree
from qlora_builders.config.overrides import known_keys
from qlora_builders.config.shipped import demo_path
from qlora_builders.config.verbs import VERBS

# Commands that are not run, and why. What can be checked of their words is checked.
NOT_RUN = {
    "bash scripts/quickstart.sh": "installs packages; test_quickstart runs it without that",
    "bash scripts/test.sh": "runs this test",
    "pip install": "installs packages",
    "tensorboard --logdir": "serves until it is stopped",
}
FEWER = {
    "finetune": ["training.max_steps=2", "data.max_rows=16", "training.batch_size=4"],
    "dpo": ["training.max_steps=2", "data.max_rows=4", "training.batch_size=2"],
    "evaluate": ["data.max_rows=8", "exact_match=2", "max_new_tokens=8"],
    "generate": ["max_new_tokens=8", "compile=false"],
    "plan": ["data.max_rows=32", "calibration_tokens=256", "batch_size=4"],
}
# Words that cannot hold for so few steps, or for a base of a million parameters.
INSTEAD = {
    "budget=6GiB": "bits=4.6",
    "lr_schedule.warmup_steps=10": "lr_schedule.warmup_steps=1",
}
TEACH = ["optimizer.lr=2e-2"]  # that two steps move bfloat16 weights, and merging can be checked
ROW = {
    "prompt": "Two red dresses for Lena Evans in Rome, by Friday.",
    "completion": "- quantity: 2",
    "question": "What is the capital of Norway?",
    "answer": "Oslo.",
    "chosen": "- quantity: 2",
    "rejected": "two",
    "messages": [{"role": "user", "content": "Two red."}, {"role": "assistant", "content": "2"}],
    "text": "Two red dresses.",
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a head of its own, which the demo's has not; with the demo's tokenizer."""
    arch = tiny_arch(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        head_dim=16,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "hf"
    save_checkpoint(llama(arch), path, companions=demo_path("base"))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text((json.dumps(ROW) + "\n") * 24)
    (tmp_path / "prompts.txt").write_text("Two red dresses.\nNine plates.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two red dresses.\nNine plates.\n"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks(page: Path, folder: Path, base: Path) -> None:
    for name in set(re.findall(r"path/to/[\w.-]*\w", page.read_text())):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(base)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        match block.language:
            case "bash":
                for words in commands(block.text):
                    run(words, block)
            case "python":
                exec(compile(block.text, str(block), "exec"), names)
            case "py":
                check_signature(block)
            case "yaml":
                check_plan(block)
            case "json":
                assert [json.loads(line) for line in block.text.splitlines()]
            case "text":
                for line in block.text.splitlines():
                    check_message(line, str(block))
            case _:
                pytest.fail(f"{block}: a block of {block.language or 'nothing'} is not checked")


# ---- commands ----------------------------------------------------------------------------------


def run(words: list[str], block: Block) -> None:
    """One command of a page, as far as it can be run here."""
    where = f"{block}: {' '.join(words)}"
    reason = next((r for start, r in NOT_RUN.items() if " ".join(words).startswith(start)), None)
    if words[0] in ("torchrun", "srun"):
        words = ["qlora", *words[words.index("qlora_builders.cli") + 1 :]]
    if words[0] == "qlora":
        assert cli.main(quick(words[1:])) == 0, where
    elif words[0] == "sbatch":
        script = (ROOT / words[1]).read_text()
        for inner in commands(script, *words[2:]):
            if inner[0] == "srun":
                run(inner, block)
    elif words[0] == "python":
        script = (ROOT / words[1]).read_text()
        assert all(word in script for word in words if word.startswith("--")), where
    else:
        assert reason is not None, f"{where}: neither run nor in NOT_RUN"
        check_words(words, where)


def quick(words: list[str]) -> list[str]:
    """The same command with less to do, on one process."""
    verb, *rest = words
    rest = [INSTEAD.get(word, word) for word in without_launcher(rest)]
    rest += FEWER.get(verb, [])
    if verb in ("finetune", "dpo") and not any("optimizer=" in word for word in rest):
        rest += TEACH
    if verb in FEWER and any(word.startswith("experiment=") for word in rest):
        rest += ["model.arch=null"]
    return [verb, *rest]


def without_launcher(words: list[str]) -> Iterator[str]:
    skip = False
    for word in words:
        if skip or word in cli.LAUNCH_OPTIONS or word.startswith("distributed."):
            skip = word in cli.LAUNCH_OPTIONS
            continue
        yield word


def check_words(words: list[str], where: str) -> None:
    """Of a command that is not run: scripts exist and parse, extras are there."""
    for word in words:
        if word.startswith("scripts/"):
            subprocess.run(["bash", "-n", ROOT / word], check=True)
        extras = re.search(r"\[(.+)\]", word)
        if extras is not None:
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert set(extras[1].split(",")) <= known["optional-dependencies"].keys(), where


def test_all_of_not_run_is_needed() -> None:
    scripts = (block.text for page in PAGES for block in blocks(page) if block.language == "bash")
    shown = [" ".join(words) for script in scripts for words in commands(script)]
    assert [start for start in NOT_RUN if not any(one.startswith(start) for one in shown)] == []


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quickstart(tmp_path: Path, whole: bool) -> None:
    """The script itself, with what is installed here; its last word is whether the model is good,
    which it is not after two steps."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "python").symlink_to(sys.executable)
    fewer = {} if whole else FEWER
    (bin_dir / "qlora").write_text(
        f"#!{sys.executable}\nimport sys\nfrom qlora_builders.cli import main\n"
        f"sys.exit(main([*sys.argv[1:], *{fewer}.get(sys.argv[1], [])]))\n"
    )
    (bin_dir / "qlora").chmod(0o755)
    (tmp_path / "scripts" / "setup_env.sh").write_text("setup_env() { :; }\n")
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=tmp_path,
        env={"PATH": f"{bin_dir}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    verdict = "" if whole else "this is not what the quickstart should give\n"
    assert (done.returncode, done.stderr) == (0 if whole else 1, verdict)
    left = {path.name for path in (tmp_path / "runs" / "quickstart").iterdir()}
    assert {"adapter", "merged", "metrics.jsonl", "report.html"} <= left


# ---- other blocks ------------------------------------------------------------------------------


def check_plan(block: Block) -> None:
    """Rules fit a Llama 3.1 8B."""
    content = yaml.safe_load(block.text)
    llama("llama3_1_8b", content["components"], train=content.get("train", ()), device="meta")


def check_signature(block: Block) -> None:
    """Names, order and defaults are those of the code."""
    name, _, arguments = block.text.strip().partition("(")
    scope: dict[str, Any] = {"torch": torch}
    exec(f"def documented({arguments}: ...", scope)
    assert parameters(scope["documented"]) == parameters(getattr(qlora_builders, name)), str(block)


def parameters(function: Any) -> list[tuple[object, ...]]:
    found = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in found]


def check_message(line: str, where: str) -> None:
    """Clause by clause, what stands between the dots is text of the package."""
    for part in re.split(r"\.\.\.|[:;.] ", re.sub("^(error|warning): ", "", line)):
        words = part.strip(" :;,.()[]'=")
        assert words in package_text(), f"{where}: no message has {words!r}"


@cache
def package_text() -> str:
    """All string literals of the package; in an f-string, those between its values."""
    files = [*(ROOT / "qlora_builders").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_messages_in_tables(page: Path) -> None:
    for row in table_rows(page):
        check_message(row.get("message", "").strip("`"), page.name)


# ---- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_inline_commands_and_keys(page: Path) -> None:
    """`qlora VERB KEY=VALUE` composes, and `section.key=...` names a key of some verb."""
    keys = {key for verb in VERBS for key in known_keys(verb)}
    for span in spans(page):
        if span.startswith("qlora "):
            verb, *rest = without_launcher(span.split()[1:])
            assert verb in (*cli.COMMANDS, "VERB"), span
            if verb in VERBS:
                compose_tree(verb, [word for word in rest if "=" in word])
        if span.startswith(("python scripts/", "scripts/")):
            assert (ROOT / span.split()[-1]).is_file(), span
        for key in re.findall(r"(?:^| )([a-z_]+\.[a-z_.]+)=", span):
            assert key in keys or key.startswith("optimizer."), f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    for link in links(page):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_can_be_found() -> None:
    linked = {(ROOT / link).resolve() for link in links(ROOT / "README.md") if ":" not in link}
    assert set(DOCS.glob("*.md")) <= linked


def test_every_public_name_has_its_section() -> None:
    sections = re.findall(r"^### `(\w+)`$", prose(DOCS / "api.md"), re.MULTILINE)
    assert sorted(sections) == sorted(qlora_builders.__all__)


def test_predicted_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of GPUs is what `qlora estimate` says."""
    rows = [row for row in table_rows(DOCS / "memory.md") if "GiB, predicted" in row]
    assert len(rows) > 5
    words: list[str] = ["model.arch=llama3_1_8b", "device=cuda"]
    for row in rows:
        words += re.findall(r"`([^`]+)`", row["turn"])
        assert cli.main(["estimate", *words]) == 0
        peak = re.search(r"^peak ([\d.]+) GiB", capsys.readouterr().out, re.MULTILINE)
        assert peak is not None
        assert float(row["GiB, predicted"]) == pytest.approx(float(peak[1]), abs=0.06), words
