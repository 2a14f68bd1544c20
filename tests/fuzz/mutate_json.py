"""Damage to JSON by its structure, and to the lines of a file of JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from mutate_bytes import any_bytes

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 63, 65, 255, 2**31, 2**63, 10**30, 0.5, -1e-9, 1e308,
    "", "x", "F32", "F64", "BF16", "F16", "U8", "I64", "0", "../x", "/etc/passwd", "\ud800", "LORA",
    "a\x00b", "\x1b[2J\r", "\u202etxt", "é\u0301\U0001f600", "(", "q_proj", "*" * 3, "${a}", "~",
    [], {}, [0], [None], [[]], [[0, 1]], ["x"], {"a": 1}, {"": ""}, [-1, 5], [0, 2**62],
    [2**40, 2**40], [1] * 1000, "long " * 20_000,
)  # fmt: skip
# JSON that Python's own writer would not write
_RAW = (
    "NaN", "-Infinity", "1e999", "-0", "-0.0", "1E400", "1" * 5000, "0.1e-5000", "01", "+1", "'x'",
    "[" * 60_000, '{"a":' * 60_000, "[" * 900 + "]" * 900, '"\\ud800"', '"\x01"', "tru", "1.", "//",
)  # fmt: skip
_MARK = "<raw>"
Node = tuple[Any, Any]  # what holds it, and where


def walk(node: Any) -> Iterator[Node]:
    for key in list(node.keys() if isinstance(node, dict) else range(len(node))):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from walk(node[key])


def change_tree(content: Any, rng: random.Random, hostile: tuple[Any, ...] = HOSTILE) -> Any:
    """A copy with one node changed, removed, renamed, swapped or moved."""
    content = copy.deepcopy(content)
    nodes = list(walk(content))
    if not nodes:
        return rng.choice(hostile)
    parent, key = rng.choice(nodes)
    kind, old = rng.randrange(9), parent[key]
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(key, str):
        parent[key[:-1] + rng.choice("xyz0")] = parent.pop(key)
    elif kind in (2, 3) and type(old) in (int, float):
        parent[key] = rng.choice(
            (old - 2, old - 1, old + 1, old + 2, old + 64, -old, old * 2, old * 1e9)
        )
    elif kind == 4:
        other, other_key = rng.choice(nodes)
        parent[key] = copy.deepcopy(other[other_key])
    elif kind == 5 and isinstance(parent, dict):
        parent[rng.choice(("x", "", "weight", "name", "é", "a" * 300))] = rng.choice(hostile)
    elif kind == 6:
        parent[key] = rng.choice(([old], {"x": old}, str(old), [old, old]))
    elif kind == 7 and isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        odd = ("\x00", "\x1b", "\n", "\u202e", "\ud800", "\ufdd0", " ", "é", "\\", "'", "x" * 9999)
        parent[key] = old[:at] + rng.choice(odd) + old[at:]
    else:
        parent[key] = copy.deepcopy(rng.choice(hostile))
    return content


def change_json(data: bytes, rng: random.Random) -> bytes:
    """The tree changed, or spelled as no writer would."""
    content, kind = json.loads(data), rng.randrange(10)
    if kind < 7:
        return json.dumps(change_tree(content, rng), indent=rng.choice((None, 2))).encode()
    nodes = list(walk(content))
    parent, key = rng.choice(nodes)
    if kind == 7 and isinstance(key, str):
        once, text = f"{json.dumps(key)}: ", json.dumps(content)
        return text.replace(once, f"{once}{json.dumps(rng.choice(HOSTILE))}, {once}", 1).encode()
    if kind == 8:
        parent[key] = _MARK
        return json.dumps(content).replace(json.dumps(_MARK), rng.choice(_RAW)).encode()
    text = json.dumps(content, ensure_ascii=False)
    return rng.choice(
        (
            b"\xef\xbb\xbf" + text.encode(),
            text.encode("utf-16"),
            text.encode() + b"{}",
            text.encode() + b"\x00",
            text.replace(" ", "\u00a0").encode(),
            text.encode().replace(b'"', b"'", 2),
            json.dumps([content]).encode(),
        )
    )


def text_or_json(data: bytes, rng: random.Random) -> bytes:
    return any_bytes(data, rng) if rng.random() < 0.4 else change_json(data, rng)


def in_lines(data: bytes, rng: random.Random) -> bytes:
    """One line of a file of JSON lines, or the order or number of lines."""
    if rng.random() < 0.3:
        return any_bytes(data, rng)
    lines = data.splitlines()
    at, kind = rng.randrange(len(lines)), rng.randrange(8)
    if kind == 0:
        lines[at] += lines.pop(rng.randrange(len(lines))) if len(lines) > at + 1 else b"{}"
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 2:
        lines.insert(at, rng.choice((b"", b"  ", b"null", b"3", b"[]", b"{}", b'"x"', b"\x0c")))
    else:
        lines[at] = change_json(lines[at], rng)
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n")).join(lines) + b"\n"


def in_json_of(
    read: Callable[[bytes], Any], write: Callable[[Any], bytes]
) -> Callable[[bytes, random.Random], bytes]:
    """The same changes to what another format spells."""

    def change(data: bytes, rng: random.Random) -> bytes:
        return write(change_tree(read(data), rng))

    return change
