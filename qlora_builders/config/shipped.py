"""Where the shipped files are, in a wheel and in a checkout: configs, recipes, the demo."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped_dir(name: str) -> Path:
    """`configs` or `recipes`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def demo_path(name: str) -> Path:
    """A file or folder of the embedded demo: `base`, `train.jsonl` or `eval.jsonl`."""
    return PACKAGE / "demo" / name
