"""What goes between the two processes.

A request is `HEAD` and a pickle; it is from the parent and so trusted. An answer is two lengths,
JSON, and bytes for arrays of numbers; it is never unpickled.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

HEAD = struct.Struct("<QdQQ")  # length; limits: seconds, bytes of memory, bytes of the answer
LENGTHS = struct.Struct("<QQ")
CHUNK = 2**20  # bytes per read


class WithBytes(NamedTuple):
    """What a function returns whose answer has more than JSON."""

    value: Any
    data: bytes


class Request(NamedTuple):
    """`function` is `module.name` of this package.

    Its first argument is the object kept as `handle`, if there is one, unless it `makes` that: then
    it returns the object to keep and the value to answer. `dropped` are handles that nobody has any
    more. `rebase`: what the function leaves in memory does not count against later requests.
    """

    function: str
    arguments: tuple[Any, ...]
    handle: int | None = None
    makes: bool = False
    rebase: bool = False
    dropped: tuple[int, ...] = ()


# ---- a conversation as text, as both processes name it ----------------------------------------

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class RenderedChat:
    """
    `spans` are the assistant's characters, end-of-turn tokens included. `needs_eos` is set when
    the text ends with an assistant turn that the template does not close: the caller appends EOS.
    """

    text: str
    spans: list[Span]
    needs_eos: bool
