"""What `${...}` in configs may be, and how much all of it together may stand for.

A value that names two others, each of which names two others, doubles with every line, and
OmegaConf writes all of it out, partly while files are still being merged. So the size is counted
before anything is composed, over every file and override at once: more than what one config takes
of them, never less.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_builders.errors import ConfigError

RESOLVERS = ("now", "demo", "demo_eval")
_OPEN = re.compile(r"(\\*)\$\{")
_KNOWN = re.compile(
    rf"\$\{{\s*(?:(?P<key>\w[\w-]*(?:\.[\w-]+|\[\d+\])*)\s*\}}|(?:{'|'.join(RESOLVERS)})\s*:)"
)
_COST = 100  # of an interpolation, in characters
_MOST = 1_000_000  # characters
_DEEPEST = 20

Path = tuple[str, ...]


class RefusedError(ConfigError):
    """What is wrong with a file as a whole, so that its values are not looked at one by one."""


@dataclass(frozen=True)
class Text:
    """A text with `${`, or without; `where` is the file or override it stands in."""

    where: str
    path: Path
    text: str


def texts(tree: Any, where: str, path: Path = ()) -> Iterator[Text]:
    """Every value of a tree, as text."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from texts(value, where, (*path, *path_of(str(key))))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from texts(value, where, (*path, str(index)))
    else:
        yield Text(where, path, str(tree))


def path_of(key: str) -> Path:
    """`loggers[0].name` -> ("loggers", "0", "name")"""
    return tuple(part for part in re.split(r"[.\[\]]", key) if part)


def check_references(found: Iterable[Text]) -> None:
    """
    Raises:
        RefusedError: for an interpolation of another kind than `${key}` and those of `RESOLVERS`,
            and if those of one file stand for too much, or for each other too often in a row.
    """
    counting = _Counting(list(found))
    totals: dict[str, int] = {}
    for one in counting.with_references:
        totals[one.where] = totals.get(one.where, 0) + counting.size_of(one, ())
        if totals[one.where] > _MOST:
            raise RefusedError(
                f"{one.where}: what its ${{...}} stand for is more than {_MOST:,} characters; "
                "write out what is needed"
            )


def _keys_in(one: Text) -> list[str]:
    """The keys that a text refers to; an empty one for a resolver."""
    opened = list(_OPEN.finditer(one.text))
    if all(len(match[1]) == 1 for match in opened):  # \${ is taken literally
        return []
    keys = []
    for match in opened:
        known = _KNOWN.match(one.text, match.end() - 2)
        if known is None:
            raise RefusedError(
                f"{one.where}: {'.'.join(one.path)} has a ${{...}} that is neither ${{key}} nor "
                f"one of {', '.join(f'${{{name}:...}}' for name in RESOLVERS)}; write \\${{ for "
                "the characters themselves"
            )
        keys.append(known["key"] or "")
    return keys


class _Counting:
    def __init__(self, found: list[Text]) -> None:
        self._below: dict[Path, list[Text]] = {}  # key -> texts at it, above it and below it
        self._keys: dict[Text, list[str]] = {}
        self._sizes: dict[Text, int] = {}
        for one in found:
            for end in range(len(one.path) + 1):
                self._below.setdefault(one.path[:end], []).append(one)
            if "${" in one.text:
                self._keys[one] = _keys_in(one)
        self._at: dict[Path, list[Text]] = {}
        for one in found:
            self._at.setdefault(one.path, []).append(one)
        self.with_references = [one for one, keys in self._keys.items() if keys]

    def size_of(self, one: Text, on_the_way: tuple[Text, ...]) -> int:
        if one not in self._keys:
            return len(one.text) + 1
        if one in self._sizes:
            return self._sizes[one]
        if one in on_the_way:
            last = on_the_way[-1]
            raise RefusedError(
                f"{last.where}: {'.'.join(last.path)}: Recursive interpolation detected: its "
                "${...} leads back to itself"
            )
        if len(on_the_way) > _DEEPEST:
            raise RefusedError(
                f"{one.where}: {'.'.join(one.path)} is at the end of more than {_DEEPEST} "
                "${...} that stand for each other; write out what is needed"
            )
        size = len(one.text)
        for key in self._keys[one]:
            size += _COST
            for other in self._targets(path_of(key)) if key else ():
                size += self.size_of(other, (*on_the_way, one))
                if size > _MOST:
                    break
        self._sizes[one] = size
        return size

    def _targets(self, path: Path) -> list[Text]:
        above = [one for end in range(1, len(path)) for one in self._at.get(path[:end], ())]
        return self._below.get(path, []) + above
