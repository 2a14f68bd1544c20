"""Text of files and models where people read it: what would act on a terminal is spelled out.

ESC moves cursors, sets titles and hides links; NUL ends strings; overrides of the reading direction
show text in another order than it is in. A line break would begin a line of its own.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, TextIO

# C0, DEL, C1; separators of lines and paragraphs; overrides and isolates of the reading direction;
# halves of surrogate pairs, which no encoding takes
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "\n\t") -> str:
    """`text` with such characters as Python escapes them, `\\x1b`, but for those to keep."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def visible_json(value: Any, indent: int | None = None) -> str:
    """JSON that is read as `value`, with such characters as JSON escapes them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    return _HIDDEN.sub(lambda c: "\n" if c[0] == "\n" else f"\\u{ord(c[0]):04x}", text)


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, each of which stays one, whatever it quotes."""
    for line in lines:
        print(visible(line, keep="\t"), file=file or sys.stdout, flush=True)
