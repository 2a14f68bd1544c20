"""The pattern language of component rules, and what to say when a pattern matches nothing.

A pattern is compared with dot-separated names: `*` stays inside one segment, `**` spans any
number of segments, `[28-31]` is a range of numbers, `{q,k,v}` a choice. Every alternative that a
choice or a range spells out must match something: `{q,v,typo}_proj` is an error, not a rule that
quietly adapts two projections of three.

A pattern may be a stranger's, so what it spells out is counted before it is spelled out, and each
`*` takes the shortest text that the rest of its segment allows: nothing is tried twice.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from qlora_builders.errors import PlanError, did_you_mean

_LONGEST = 1000  # characters
_MOST_ALTERNATIVES = 2000  # Llama 3.1 405B, the largest, has 883 slots
_MOST_TOKENS = 1_000_000  # the largest vocabularies have some 260,000
_GROUP = re.compile(r"\{([^{}]*)\}|\[([^\[\]]*)\]")


def match_names(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that `pattern` matches, in their order.

    Raises:
        PlanError: if the pattern is malformed, or one of its alternatives matches no name.
    """
    matched: set[str] = set()
    for alternative in dict.fromkeys(expand(pattern)):
        segments = alternative.split(".")
        hits = [name for name in names if _matches(segments, name.split("."))]
        if not hits:
            raise PlanError(_explain_no_match(pattern, alternative, names))
        matched.update(hits)
    return [name for name in names if name in matched]


def expand(pattern: str) -> list[str]:
    """Every alternative of the choices and ranges: `{q,k}_proj` -> q_proj, k_proj."""
    if len(pattern) > _LONGEST:
        raise PlanError(
            f"match {pattern[:40]!r}... has {len(pattern):,} characters; at most {_LONGEST:,}"
        )
    parts: list[list[str]] = []
    end = 0
    for group in _GROUP.finditer(pattern):
        parts.append([pattern[end : group.start()]])
        parts.append(_choices(group, pattern))
        end = group.end()
    parts.append([pattern[end:]])
    if math.prod(map(len, parts)) > _MOST_ALTERNATIVES:
        raise PlanError(_too_many(pattern))
    alternatives = ["".join(combination) for combination in itertools.product(*parts)]
    for alternative in alternatives:
        if not alternative or set(alternative) & set("{}[]"):
            raise PlanError(
                f"match {pattern!r} is malformed; use * ** [first-last] and {{a,b}} without nesting"
            )
    return alternatives


def token_ids(pattern: str) -> list[int] | None:
    """The tokens of `embed_tokens[5,128256-128260]`; None for a pattern that is none of these.

    Raises:
        PlanError: for something else between the brackets.
    """
    match = re.fullmatch(r"embed_tokens\[(.*)\]", pattern)
    if match is None:
        return None
    tokens: list[int] = []
    for part in match[1].split(","):
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if span is None:
            raise PlanError(
                f"train {pattern!r}: {part!r} is no token id or range; write embed_tokens[5,8-11]"
            )
        first, last = int(span[1]), int(span[2] or span[1])
        if last - first + len(tokens) >= _MOST_TOKENS:
            raise PlanError(
                f"train {part!r}: more than {_MOST_TOKENS:,} tokens; no model has so many"
            )
        tokens += range(first, last + 1)
    return tokens


def _choices(group: re.Match[str], pattern: str) -> list[str]:
    if group[1] is not None:
        return [choice.strip() for choice in group[1].split(",")]
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", group[2])
    if numbers is None or int(numbers[2] or numbers[1]) < int(numbers[1]):
        raise PlanError(
            f"match {pattern!r}: [{group[2]}] is not a range of numbers such as [0-3] or [7]"
        )
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if last - first >= _MOST_ALTERNATIVES:
        raise PlanError(_too_many(pattern))
    return [str(n) for n in range(first, last + 1)]


def _too_many(pattern: str) -> str:
    return (
        f"match {pattern!r} spells out more than {_MOST_ALTERNATIVES:,} alternatives; write * for "
        "all, or several rules"
    )


def _matches(segments: Sequence[str], parts: Sequence[str]) -> bool:
    """`a.**.b` also matches `a.b`, as in `.gitattributes`."""
    taken = {0}  # how many parts of the name the segments so far may stand for
    for index, segment in enumerate(segments):
        if segment == "**":
            last = index == len(segments) - 1
            taken = set(range(min(taken) + last, len(parts) + 1))
        else:
            ends = (n for n in taken if n < len(parts) and _segment_matches(segment, parts[n]))
            taken = {n + 1 for n in ends}
        if not taken:
            return False
    return len(parts) in taken


def _segment_matches(segment: str, part: str) -> bool:
    first, *others = segment.split("*")
    if not others:
        return segment == part
    *middle, last = others
    start, end = len(first), len(part) - len(last)
    if start > end or not (part.startswith(first) and part.endswith(last)):
        return False
    for text in middle:
        found = part.find(text, start, end)
        if found < 0:
            return False
        start = found + len(text)
    return True


def _explain_no_match(pattern: str, alternative: str, names: Sequence[str]) -> str:
    which = f"match {pattern!r}"
    if alternative != pattern:
        which += f" includes {alternative!r}, which"
    known = sorted({segment for name in names for segment in name.split(".")})
    for segment in alternative.split("."):
        if segment == "**" or any(_segment_matches(segment, other) for other in known):
            continue
        numbers = [int(other) for other in known if other.isdigit()]
        if segment.isdigit() and numbers:
            return f"{which} matches nothing: the layers are {min(numbers)} to {max(numbers)}"
        words = [other for other in known if not other.isdigit()]
        return (
            f"{which} matches nothing: no name has a part {segment!r}"
            f"{did_you_mean(segment, words)} (names leave out the leading 'model.')"
        )
    shapes = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
    # the last segment is what was meant; those before it are what was forgotten
    leaf = alternative.split(".")[-1]
    same_leaf = {shape for shape in shapes if _segment_matches(leaf, shape.split(".")[-1])}
    return f"{which} matches nothing{did_you_mean(alternative, same_leaf or shapes)}"
