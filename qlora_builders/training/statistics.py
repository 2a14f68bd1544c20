"""How far a mean can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_error(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """(sum of `sums` / sum of `weights`, its standard error), each over independent parts.

    A part is what was drawn as one: a row with the sum of its tokens' losses and their number, or
    an answer with 0 or 1 and weight 1. The error is that of a ratio of two sums, which for equal
    weights is the usual one of a mean; infinite for a single part.
    """
    total, count = sum(weights), len(weights)
    mean = sum(sums) / total
    if count < 2:
        return mean, math.inf
    squares = sum((part - mean * weight) ** 2 for part, weight in zip(sums, weights, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total
