"""A folder of configs of one's own, as --config-dir takes it."""

from __future__ import annotations

from pathlib import Path


def write_own(folder: Path, files: dict[str, str]) -> Path:
    """Write `{"experiment/mine": "training: {seed: 1}"}` below a folder, and return that."""
    for name, text in files.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        head = "# @package _global_\n" if name.startswith("experiment/") else ""
        file.write_bytes((head + text).encode("utf-8", "surrogateescape"))
    return folder
