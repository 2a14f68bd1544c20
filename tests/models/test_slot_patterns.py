"""The pattern language: every form, every malformed one, and what a miss says."""

from __future__ import annotations

import re
from collections.abc import Iterable
from random import Random

import pytest

from qlora_builders.errors import PlanError
from qlora_builders.models.slot_patterns import expand, match_names, token_ids

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = [*(f"layers.{n}.{slot}" for n in range(12) for slot in (*ATTENTION, *MLP)), "lm_head"]


def in_layers(numbers: Iterable[int], *slots: str) -> set[str]:
    return {f"layers.{layer}.{slot}" for layer in numbers for slot in slots}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("lm_head", {"lm_head"}),
        ("layers.1.mlp.up_proj", in_layers([1], "mlp.up_proj")),  # not layer 10 or 11
        # a star stays inside a segment
        ("layers.*.mlp.up_proj", in_layers(range(12), "mlp.up_proj")),
        ("layers.0.*.*_proj", in_layers([0], *ATTENTION, *MLP)),
        ("layers.1*.mlp.up_proj", in_layers([1, 10, 11], "mlp.up_proj")),
        # two span any number, none too
        ("**", set(NAMES)),
        ("layers.**", set(NAMES) - {"lm_head"}),
        ("layers.3.**", in_layers([3], *ATTENTION, *MLP)),
        ("**.q_proj", in_layers(range(12), "self_attn.q_proj")),
        ("**.mlp.*", in_layers(range(12), *MLP)),
        ("layers.**.up_proj", in_layers(range(12), "mlp.up_proj")),
        ("**.lm_head", {"lm_head"}),
        ("layers.0.**.self_attn.**.q_proj", in_layers([0], "self_attn.q_proj")),
        # ranges
        ("layers.[8-11].**", in_layers([8, 9, 10, 11], *ATTENTION, *MLP)),
        ("layers.[9-10].mlp.up_proj", in_layers([9, 10], "mlp.up_proj")),
        ("layers.[1].**", in_layers([1], *ATTENTION, *MLP)),
        ("layers.[0-0].**", in_layers([0], *ATTENTION, *MLP)),
        # choices
        ("layers.0.self_attn.{q,k,v}_proj", in_layers([0], *ATTENTION[:3])),
        ("{lm_head, layers.0.mlp.up_proj}", {"lm_head", "layers.0.mlp.up_proj"}),
        ("layers.{0,1,5}.mlp.up_proj", in_layers([0, 1, 5], "mlp.up_proj")),
        ("layers.[0-1].**.{q,up}_proj", in_layers([0, 1], "self_attn.q_proj", "mlp.up_proj")),
        ("{lm_head,**}", set(NAMES)),
    ],
)
def test_what_a_pattern_matches(pattern: str, expected: set[str]) -> None:
    """In the order of the names, and without duplicates."""
    assert match_names(pattern, NAMES) == [name for name in NAMES if name in expected]


def test_alternatives_are_spelled_out_in_order() -> None:
    assert expand("a.[1-2].{x,y}") == ["a.1.x", "a.1.y", "a.2.x", "a.2.y"]


@pytest.mark.parametrize(
    "pattern",
    [
        *("layers.*.up_proj", "layers.*", "layers.0.mlp.up?proj", "layers.0.mlp.(up_proj)"),
        *("layers+0", "^lm_head$"),
    ],
)
def test_other_characters_are_literal(pattern: str) -> None:
    with pytest.raises(PlanError, match="matches nothing"):
        match_names(pattern, NAMES)
    with pytest.raises(PlanError, match="matches nothing"):
        match_names("layers.0.mlp.up_proj", ["layersX0XmlpXup_proj"])  # "." is no wildcard


@pytest.mark.parametrize(
    "pattern",
    ["", "{}", "{q_proj", "q_proj}", "layers.[0-1", "layers.0]", "{a,{b,c}}", "layers.[[0-1]]"],
)
def test_malformed(pattern: str) -> None:
    with pytest.raises(PlanError, match="malformed; use"):
        match_names(pattern, NAMES)


@pytest.mark.parametrize("group", ["[3-1]", "[a-b]", "[]", "[1-]", "[-1]", "[1,2]", "[!0]"])
def test_not_a_range(group: str) -> None:
    with pytest.raises(PlanError, match="is not a range of numbers such as"):
        match_names(f"layers.{group}.**", NAMES)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.*.self_attn.q_porj", "no name has a part 'q_porj'; did you mean 'q_proj'"),
        ("layers.*.self_atn.q_proj", "no name has a part 'self_atn'; did you mean 'self_attn'"),
        ("layers.99.**", "matches nothing: the layers are 0 to 11"),
        ("layers.[8-12].**", "includes 'layers.12.**', which matches nothing: the layers are"),
        ("layers.*.self_attn.{q,v,x}_proj", "includes 'layers.*.self_attn.x_proj', which"),
        ("layers.*.mlp.{up,q}_proj", "includes 'layers.*.mlp.q_proj', which matches nothing"),
        ("{q,}_proj", "matches nothing"),
        ("model.layers.*.mlp.up_proj", "leave out the leading 'model.'"),
        ("layers.*.q_proj", "did you mean 'layers.*.self_attn.q_proj'"),
        ("zzz", "no name has a part 'zzz'; allowed: down_proj, gate_proj"),
    ],
)
def test_a_miss_explains_itself(pattern: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        match_names(pattern, NAMES)
    assert message in str(caught.value)
    assert repr(pattern) in str(caught.value)


def as_regex(pattern: str) -> re.Pattern[str]:
    """The language again, as a regular expression; these may backtrack without end."""
    *others, last = pattern.split(".")
    text = "".join(
        r"(?:[^.]+\.)*" if part == "**" else re.escape(part).replace(r"\*", "[^.]*") + r"\."
        for part in others
    )
    return re.compile(text + (".+" if last == "**" else re.escape(last).replace(r"\*", "[^.]*")))


def test_matching_is_that_of_a_regular_expression() -> None:
    random = Random(0)
    words = ["a", "b", "ab", "aab", "ba"]
    names = list({".".join(random.choices(words, k=n % 4 + 1)): n for n in range(60)})
    hits = 0
    for _ in range(3000):
        parts = ["**", "*", "a*", "*b", "a*b", "*a*", "a**b", "a", "ab"]
        pattern = ".".join(random.choices(parts, k=random.randint(1, 4)))
        wanted = [name for name in names if as_regex(pattern).fullmatch(name)]
        hits += len(wanted)
        if wanted:
            assert match_names(pattern, names) == wanted, pattern
        else:
            with pytest.raises(PlanError):
                match_names(pattern, names)
    assert hits > 3000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{a,b}" * 40, "spells out more than 2,000 alternatives"),
        ("[0-999999999]", "spells out more than 2,000 alternatives"),
        ("[0-99].[0-99]", "spells out more than 2,000 alternatives"),
        ("[0-" + "9" * 900 + "]", "spells out more than 2,000 alternatives"),
        ("*a" * 200 + "*b", "matches nothing"),
        ("**." * 300 + "b", "matches nothing"),
        ("*" * 1001, "has 1,001 characters; at most 1,000"),
    ],
)
def test_what_a_pattern_costs_is_bounded(pattern: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        match_names(pattern, ["a" * 60, ".".join("a" * 60)])


def test_so_are_the_tokens_of_one() -> None:
    assert len(token_ids("embed_tokens[0-299999]") or []) == 300_000
    with pytest.raises(PlanError, match="'x' is no token id or range"):
        token_ids("embed_tokens[1,x]")
    for pattern in ("embed_tokens[0-99999999999]", "embed_tokens[0-600000,0-600000]"):
        with pytest.raises(PlanError, match="more than 1,000,000 tokens"):
            token_ids(pattern)
