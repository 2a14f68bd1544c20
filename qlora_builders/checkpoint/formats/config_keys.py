"""Keys of a checkpoint's JSON file, and what each may hold: a table of `Key`s, and one reader.

Files of checkpoints come from anywhere. What is of another type, or beyond any model there could
be, is refused by name before anything is built by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_builders.errors import CheckpointError

REQUIRED: Any = object()


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key may hold, and the field that it fills.

    Attributes:
        field: the name of the same thing in `LlamaArch` or `RopeScaling`.
        kind: int, float (an integer is one too), bool or str.
        default: what a missing key stands for.
        low, high: the least and the most, both allowed.
        above: a bound that is not allowed itself.
        null: it stands for the default too.
    """

    field: str
    kind: type
    default: Any = REQUIRED
    low: float | None = None
    above: float | None = None
    high: float | None = None
    null: bool = False

    @property
    def allowed(self) -> str:
        if self.kind in (bool, str):
            text = "true or false" if self.kind is bool else "a string"
        else:
            text = "an integer" if self.kind is int else "a number"
            least = f"> {self.above:g}" if self.low is None else f">= {self.low:g}"
            text += f" {least} and <= {self.high:,}"
        return f"{text}, or null" if self.null else text

    def holds(self, value: Any) -> bool:
        if type(value) not in ((int, float) if self.kind is float else (self.kind,)):
            return False
        return self.kind in (bool, str) or (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def size(field: str, most: int, **options: Any) -> Key:
    return Key(field=field, kind=int, low=1, high=most, **options)


def read_keys(keys: Mapping[str, Key], content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Field -> value, or its default.

    Args:
        source: the file, and where in it, for messages.

    Raises:
        CheckpointError: naming the first key that is missing or holds something else.
    """
    missing = sorted(k for k, key in keys.items() if key.default is REQUIRED and k not in content)
    if missing:
        raise CheckpointError(f"{source}: missing keys: {', '.join(missing)}")
    return {key.field: _read(name, key, content, source) for name, key in keys.items()}


def _read(name: str, key: Key, content: Mapping[str, Any], source: str) -> Any:
    value = content.get(name, key.default)
    if name not in content or (value is None and key.null):
        return key.default
    if not key.holds(value):
        raise CheckpointError(f"{source}: {name} is {value!r}; expected {key.allowed}")
    return float(value) if key.kind is float else value


def in_words_of(keys: Mapping[str, Key], message: object) -> str:
    """A message about fields, with the names that the file has for them."""
    names = {key.field: name for name, key in keys.items()}
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(message))
