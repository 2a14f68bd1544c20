"""What became of the rows of a dataset."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from qlora_builders.errors import counted

_SHOWN = 5  # skipped rows of which the reason is told


@dataclass
class DatasetReport:
    """What became of the rows. Token counts are those kept, after truncation.

    A preference row is one example, of two sequences.
    """

    source: str
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    cut_tokens: int = 0
    longest_row: int = 0  # tokens, before truncation
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    skipped_rows: int = 0  # that cannot be used, with on_error="skip"
    skipped: list[str] = field(default_factory=list)  # where the first of them are, and why

    def skip(self, reason: str) -> None:
        self.skipped_rows += 1
        if len(self.skipped) < _SHOWN:
            self.skipped.append(reason)

    def summary(self) -> str:
        """One line for a log."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        text = (
            f"{self.source}: {counted(self.examples, 'example')}, {counted(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} trained ({share:.0f} %)"
        )
        if self.truncated_rows:
            text += (
                f"; {counted(self.truncated_rows, 'row')} truncated, "
                f"{counted(self.cut_tokens, 'token')} cut"
            )
        for reason, count in sorted(self.dropped.items()):
            text += f"; {counted(count, 'row')} dropped: {reason}"
        if self.skipped_rows:
            text += f"; {self.skipped_summary()}"
        return text

    def skipped_summary(self) -> str:
        """How many, where the first of them are and what is wrong with them."""
        more = self.skipped_rows - len(self.skipped)
        reasons = [reason.removeprefix(f"{self.source}, ") for reason in self.skipped]
        if more:
            reasons.append(f"and {more:,} more")
        skipped = counted(self.skipped_rows, "row")
        return f"{skipped} skipped (data.on_error=skip): {'; '.join(reasons)}"
