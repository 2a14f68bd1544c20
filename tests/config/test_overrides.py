"""Text in an override reaches the config unchanged, whatever hydra's grammar makes of it."""

from __future__ import annotations

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hypothesis import assume, example, given
from hypothesis import strategies as st

from qlora_builders.config.overrides import QUOTED, quote


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\\\\'\\")
@example("'a' and 'b'")
def test_any_text_survives_hydras_grammar(text: str) -> None:
    assume(not QUOTED.fullmatch(text) and "${" not in text)
    parsed = OverridesParser.create().parse_override(f"prompt={quote(text)}").value()
    assert (parsed.text if isinstance(parsed, QuotedString) else parsed) == text


def test_quoted_text_is_left_alone() -> None:
    for text in ("'a, b'", '"a"', r"'it\'s'", "''"):
        assert quote(text) == text
    assert quote("'a' and 'b'") == r"'\'a\' and \'b\''"
