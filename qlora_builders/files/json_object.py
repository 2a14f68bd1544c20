"""JSON files of checkpoints and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_builders.errors import CheckpointError
from qlora_builders.strict_json import read_json


def read_json_object(file: Path, *, expected: str) -> dict[str, Any]:
    """
    Args:
        expected: what the folder should have been, for the message about a missing file.

    Raises:
        CheckpointError: if the file is missing or does not hold one JSON object.
    """
    if not file.exists():
        raise CheckpointError(f"{file}: missing; expected {expected}")
    try:
        content = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected an object")
    return content
