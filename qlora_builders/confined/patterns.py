"""Regexes of `adapter_config.json`: one of them can take longer than anybody waits."""

from __future__ import annotations

import re


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
