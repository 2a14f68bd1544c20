"""Regexes of `adapter_config.json`, one of which can take longer than anybody waits; and YAML.

YAML names a part once and repeats it by aliases, so ten lines can stand for a billion values, and
OmegaConf writes all of them out.
"""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf


def problems(patterns: list[str]) -> list[str | None]:
    """What is wrong with each, as a regex."""
    found: list[str | None] = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            found.append(str(error))
        else:
            found.append(None)
    return found


def matches(patterns: list[str], names: list[str], whole: bool) -> list[list[str | None]]:
    """For each pattern, of each name: None, or its group `index`, "" where there is no such group.

    A pattern is compared with the `whole` name, or with its beginning.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    return [[_match(pattern, name, whole) for name in names] for pattern in compiled]


def _match(pattern: re.Pattern[str], name: str, whole: bool) -> str | None:
    found = pattern.fullmatch(name) if whole else pattern.match(name)
    return None if found is None else found.groupdict().get("index") or ""


def yaml_values(text: str, most: int) -> int:
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
