"""Damage to a file as bytes, whatever is in it."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutator = Callable[[bytes, random.Random], bytes]

SNIPPETS = (
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"NaN", b"1e999", b"-", b"\x00", b"\xff", b"\n",
    b"\t", b"\r", b"\\", b"\\u0000", b"\x1b[2J", b"\xed\xa0\x80", b"\xe2\x80\xae", b"#", b"&", b"*",
    b"'", b"%}", b"{{", b"\xef\xbb\xbf", b"null", b"\x80\x04",
)  # fmt: skip
TEXTS = (
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"9" * 50_000,
    b"",
    b"null",
    b"[]",
    b"{}",
    b"\xef\xbb\xbf{}",
    b"\x00" * 4096,
    b"\n\n\n",
    b"PAR1PAR1",
    b"PK\x05\x06" + b"\x00" * 18,
)
_LENGTHS = (1, 1, 2, 4, 20, 300)


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    return at, min(at + rng.choice(_LENGTHS), len(data))


def flip_a_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    at, end = _range(data, rng)
    return data[:at] + rng.randbytes(end - at) + data[end:]


def remove(data: bytes, rng: random.Random) -> bytes:
    at, end = _range(data, rng)
    return data[:at] + data[end:]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\x00", b"\n", b"x", rng.randbytes(9), data[:20], data))


def zero(data: bytes, rng: random.Random) -> bytes:
    at, end = _range(data, rng)
    return data[:at] + bytes(end - at) + data[end:]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    at, end = _range(data, rng)
    return data[:end] + data[at:]


def swap(data: bytes, rng: random.Random) -> bytes:
    (a, b), (c, d) = sorted((_range(data, rng), _range(data, rng)))
    if b > c:
        return data
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(SNIPPETS) + data[at:]


def change_a_digit(data: bytes, rng: random.Random) -> bytes:
    digits = [i for i, byte in enumerate(data[:20_000]) if byte in b"0123456789"]
    if not digits:
        return data
    at = rng.choice(digits)
    return data[:at] + bytes([rng.choice(b"0123456789.-e")]) + data[at + 1 :]


def replace_all(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(TEXTS)


BYTES: tuple[Mutator, ...] = (
    flip_a_bit, overwrite, remove, cut, extend, zero, duplicate, swap, insert, change_a_digit,
)  # fmt: skip


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """One of them; now and then two, or all of the file."""
    if rng.random() < 0.03:
        return replace_all(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = rng.choice(BYTES)(data, rng) or b"x"
    return data
