"""A conversation as text, as both processes name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
