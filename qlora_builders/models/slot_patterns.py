"""The pattern language of component rules, and what to say when a pattern matches nothing.

A pattern is compared with dot-separated names: `*` stays inside one segment, `**` spans any
number of segments, `[28-31]` is a range of numbers, `{q,k,v}` a choice. Every alternative that a
choice or a range spells out must match something: `{q,v,typo}_proj` is an error, not a rule that
quietly adapts two projections of three.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from qlora_builders.errors import PlanError, did_you_mean

_MOST = 10_000  # alternatives of one pattern, or numbers of one range; models have some 130 layers
_MOST_TOKENS = 2_000_000
_GROUP = re.compile(r"\{([^{}]*)\}|\[([^\[\]]*)\]")


def match_names(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that `pattern` matches, in their order.

    Raises:
        PlanError: if the pattern is malformed, or one of its alternatives matches no name.
    """
    matched: set[str] = set()
    for alternative in expand(pattern):
        regex = _regex(alternative)
        hits = [name for name in names if regex.fullmatch(name)]
        if not hits:
            raise PlanError(_explain_no_match(pattern, alternative, names))
        matched.update(hits)
    return [name for name in names if name in matched]


def expand(pattern: str) -> list[str]:
    """Every alternative of the choices and ranges: `{q,k}_proj` -> q_proj, k_proj."""
    parts: list[list[str]] = []
    end = 0
    for group in _GROUP.finditer(pattern):
        parts.append([pattern[end : group.start()]])
        parts.append(_choices(group, pattern))
        end = group.end()
    parts.append([pattern[end:]])
    if math.prod(map(len, parts)) > _MOST:
        raise PlanError(f"match {pattern!r:.200} has more than {_MOST:,} alternatives; use *")
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
        PlanError: for something else between the brackets, or more tokens than vocabularies have.
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
        found = range(int(span[1]), int(span[2] or span[1]) + 1)
        if len(tokens) + len(found) > _MOST_TOKENS:
            raise PlanError(f"train {pattern!r:.200}: more than {_MOST_TOKENS:,} tokens")
        tokens += found
    return tokens


def _choices(group: re.Match[str], pattern: str) -> list[str]:
    if group[1] is not None:
        return [choice.strip() for choice in group[1].split(",")]
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", group[2])
    if numbers is None or int(numbers[2] or numbers[1]) < int(numbers[1]):
        raise PlanError(
            f"match {pattern!r}: [{group[2]}] is not a range of numbers such as [0-3] or [7]"
        )
    if int(numbers[2] or numbers[1]) - int(numbers[1]) >= _MOST:
        raise PlanError(f"match {pattern!r:.200} has more than {_MOST:,} alternatives; use *")
    return [str(n) for n in range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)]


def _regex(alternative: str) -> re.Pattern[str]:
    """`a.**.b` also matches `a.b`, as in `.gitattributes`."""
    regex = ""
    segments = alternative.split(".")
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        if segment == "**":
            regex += r".+" if last else r"(?:[^.]+\.)*"
        else:
            regex += _segment_regex(segment).pattern + ("" if last else r"\.")
    return re.compile(regex)


def _segment_regex(segment: str) -> re.Pattern[str]:
    return re.compile(re.escape(segment).replace(r"\*", r"[^.]*"))


def _explain_no_match(pattern: str, alternative: str, names: Sequence[str]) -> str:
    which = f"match {pattern!r}"
    if alternative != pattern:
        which += f" includes {alternative!r}, which"
    known = sorted({segment for name in names for segment in name.split(".")})
    for segment in alternative.split("."):
        if segment == "**" or any(_segment_regex(segment).fullmatch(other) for other in known):
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
    leaf = _segment_regex(alternative.split(".")[-1])
    same_leaf = {shape for shape in shapes if leaf.fullmatch(shape.split(".")[-1])}
    return f"{which} matches nothing{did_you_mean(alternative, same_leaf or shapes)}"
