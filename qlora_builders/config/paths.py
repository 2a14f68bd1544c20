"""What is wrong with the folders and files that a config names, as far as a look at them tells.

Whoever opens them finds more, but does not know the key that named them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_builders.config.checks import value_of
from qlora_builders.config.knobs import knobs
from qlora_builders.files.outputs import fault_of_path, step_folders

_FOLDERS = ("checkpoint.dir", "tokenizer.path", "adapter.path")
_ROWS = ("data.train", "data.eval", "prompts_file")
_OTHERS = ("output_dir", "output", "report", "base", "lm_eval.tasks_dir", "training.resume", "runs")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def name_problems(cfg: Any) -> list[str]:
    """A message for each path that the system does not take, for one reason or another."""
    problems = []
    for key in knobs(type(cfg)):
        value = value_of(cfg, key) if key in (*_FOLDERS, *_ROWS, *_OTHERS) else None
        for path in value if isinstance(value, list) else [value]:
            listed = key in _ROWS and path is not None and path.startswith("[")
            fault = None if path is None or listed else fault_of_path(path)
            if fault is None and key in ("adapter.path", "prompts_file") and _is_below_file(path):
                fault = "cannot be used: Not a directory; choose another place"
            problems += [f"{key}={path} {fault}"] if fault else []
    return problems


def _is_below_file(path: str | None) -> bool:
    return path is not None and any(parent.is_file() for parent in Path(path).parents)


def path_problems(cfg: Any) -> list[str]:
    """A message for each path that cannot be what its key takes."""
    given = {key: value_of(cfg, key) for key in knobs(type(cfg)) if key in (*_FOLDERS, *_ROWS)}
    problems = []
    for key, value in given.items():
        if value is None:
            continue
        if key in _ROWS and value.startswith("[") and not Path(value).exists():
            problems.append(f"{key}={value}: takes one file; write the rows of all into one")
        if key in _FOLDERS and Path(value).is_file():
            folder = Path(value).parent
            problems.append(f"{key}={value} is a file; give its folder: {key}={folder}")
    if "checkpoint.dir" in given:
        problems += _about_base(given["checkpoint.dir"], "adapter.path" in given)
    return problems + list(_about_resume(getattr(getattr(cfg, "training", None), "resume", None)))


def _about_base(name: str, takes_adapter: bool) -> list[str]:
    path, value = Path(name), f"checkpoint.dir={name}"
    if _HUB_NAME.fullmatch(name) and not path.parent.exists():
        download = f"hf download {name} --local-dir {path.name}"
        return [f"{value}: no such directory; models of the hub are downloaded first: {download}"]
    if not path.is_dir():
        return []
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        advice = "name the base it was trained on"
        if takes_adapter:
            advice = f"write adapter.path={name}, and as checkpoint.dir the base it was trained on"
        return [f"{value} holds an adapter and no model; {advice}"]
    if not any(path.glob("*.json")):
        expected = "expected a Hugging Face checkpoint directory, with config.json and weights"
        return [f"{value} holds no model; {expected}"]
    return []


def _about_resume(resume: str | None) -> Iterator[str]:
    if resume is None:
        return
    if resume.lower() in ("true", "yes", "on", "latest"):
        yield f"training.resume={resume}: write auto, for the newest good checkpoint in output_dir"
    folder = Path(resume)
    steps = step_folders(folder.parent if folder.name == "checkpoints" else folder)
    if steps:
        yield (
            f"training.resume={resume} holds checkpoints and is none; the newest is "
            f"training.resume={steps[-1]}, or write auto and their run as output_dir"
        )
