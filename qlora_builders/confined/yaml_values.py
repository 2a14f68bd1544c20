"""How many values a YAML document stands for.

It names a part once and repeats it by aliases, so ten lines can stand for a billion values, and
OmegaConf writes all of them out.
"""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf


def count(text: str, most: int) -> int:
    """Values of the document with every alias written out; `most + 1` for any more.

    Raises:
        yaml.YAMLError, ValueError: if it is not YAML.
        RecursionError: if it is nested too deeply.
    """
    left: list[Any] = [yaml.load(text, yaml.SafeLoader)]
    values = 0
    while left and values <= most:
        value = left.pop()
        values += 1
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return values
