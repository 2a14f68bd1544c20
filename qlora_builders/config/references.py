"""What `${...}` in configs may be, and how much all of it together may stand for.

A value that names two others, each of which names two others, doubles with every line, and
OmegaConf writes all of it out. So the size is counted before anything is resolved.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
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


Keys = tuple[str, ...]


def path_of(key: str) -> Keys:
    """`loggers[0].name` -> ("loggers", "0", "name")"""
    return tuple(part for part in re.split(r"[.\[\]]", key) if part)


def leaves_of(tree: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(path, value) of all that is neither a mapping nor a list."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves_of(value, (*path, str(key)))
    else:
        yield path, tree


def node_at(tree: Any, path: Keys) -> tuple[Any, int]:
    """The last node on the way, and how many parts lead there: all of them if it is the one."""
    for end, part in enumerate(path):
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return tree, end
    return tree, len(path)


def check_references(tree: Any, where: Callable[[Keys], str]) -> None:
    """Count what all of a config stands for.

    Args:
        where: `"experiment/mine.yaml: "` for the path of a value.

    Raises:
        ConfigError: for an interpolation of another kind than `${key}` and those of `RESOLVERS`,
            and if they stand for too much, or for each other too often in a row.
    """
    known: dict[Keys, tuple[int, int]] = {}  # characters, and how many stand for each other

    def said(path: Keys) -> str:
        return f"{where(path)}{'.'.join(path)}"

    def size(path: Keys, value: Any, way: tuple[Keys, ...]) -> tuple[int, int]:
        text = str(value)
        if path in known or "${" not in text:
            return known.get(path, (len(text) + 1, 0))
        if path in way:
            raise ConfigError(
                f"{said(way[-1])}: Recursive interpolation detected: its ${{...}} leads back to "
                "itself"
            )
        total, depth = len(text), 0
        for key in _keys_in(text, said(path)):
            total += _COST
            for below in _target(tree, path_of(key)) if key else ():
                more, deep = size(*below, (*way, path)) if len(way) <= _DEEPEST else (0, _DEEPEST)
                total, depth = total + more, max(depth, deep + 1)
                if total > _MOST:
                    break
        if depth > _DEEPEST:
            raise ConfigError(
                f"{said(path)} is at the head of more than {_DEEPEST} ${{...}} that stand for each "
                "other; write out what is needed"
            )
        known[path] = total, depth
        return total, depth

    total = 0
    for path, value in leaves_of(tree):
        total += size(path, value, ())[0] if "${" in str(value) else 0
        if total > _MOST:
            raise ConfigError(
                f"{where(path)}what the ${{...}} of {'.'.join(path)} and others stand for is more "
                f"than {_MOST:,} characters; write out what is needed"
            )


def _keys_in(text: str, said: str) -> list[str]:
    """The keys that a text refers to; an empty one for a resolver."""
    opened = list(_OPEN.finditer(text))
    if all(len(match[1]) == 1 for match in opened):  # \${ is taken literally
        return []
    known = [_KNOWN.match(text, match.end() - 2) for match in opened]
    if None in known:
        raise ConfigError(
            f"{said} has a ${{...}} that is neither ${{key}} nor one of "
            f"{', '.join(f'${{{name}:...}}' for name in RESOLVERS)}; write \\${{ for the "
            "characters themselves"
        )
    return [match["key"] or "" for match in known if match]


def _target(tree: Any, path: Keys) -> Iterable[tuple[Keys, Any]]:
    """All that a key stands for; the whole of the text that its path leads through."""
    node, end = node_at(tree, path)
    if end == len(path):
        return leaves_of(node, path)
    return [] if isinstance(node, dict | list) else [(path[:end], node)]
