"""The pattern language: every form, every malformed one, and what a miss says."""

from __future__ import annotations

import re
from random import Random

import pytest

from qlora_builders.errors import PlanError
from qlora_builders.models.slot_patterns import expand, match_names, token_ids

NAMES = [
    f"layers.{layer}.{slot}"
    for layer in range(12)
    for slot in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
] + ["lm_head"]


def hits(pattern: str) -> set[str]:
    return set(match_names(pattern, NAMES))


def layers(pattern: str) -> set[int]:
    return {int(name.split(".")[1]) for name in match_names(pattern, NAMES)}


def test_exact_name() -> None:
    assert hits("lm_head") == {"lm_head"}
    assert hits("layers.1.mlp.up_proj") == {"layers.1.mlp.up_proj"}  # not layer 10 or 11


def test_star_stays_inside_a_segment() -> None:
    assert hits("layers.*.mlp.up_proj") == {f"layers.{i}.mlp.up_proj" for i in range(12)}
    assert {name.split(".")[-1] for name in hits("layers.0.*.*_proj")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert layers("layers.1*.mlp.up_proj") == {1, 10, 11}
    with pytest.raises(PlanError, match="matches nothing"):
        match_names("layers.*.up_proj", NAMES)
    with pytest.raises(PlanError, match="matches nothing"):
        match_names("layers.*", NAMES)


def test_double_star_spans_segments() -> None:
    assert hits("**") == set(NAMES)
    assert hits("layers.**") == set(NAMES) - {"lm_head"}
    assert hits("layers.3.**") == {name for name in NAMES if name.startswith("layers.3.")}
    assert hits("**.q_proj") == {f"layers.{i}.self_attn.q_proj" for i in range(12)}
    assert hits("**.mlp.*") == {name for name in NAMES if ".mlp." in name}
    assert hits("layers.**.up_proj") == hits("layers.*.mlp.up_proj")
    assert hits("**.lm_head") == {"lm_head"}  # any number of segments includes none
    assert hits("layers.0.**.self_attn.**.q_proj") == {"layers.0.self_attn.q_proj"}


def test_range() -> None:
    assert layers("layers.[8-11].**") == {8, 9, 10, 11}
    assert layers("layers.[9-10].mlp.up_proj") == {9, 10}
    assert layers("layers.[1].**") == {1}
    assert layers("layers.[0-0].**") == {0}


def test_choice() -> None:
    assert hits("layers.0.self_attn.{q,k,v}_proj") == {
        f"layers.0.self_attn.{name}_proj" for name in "qkv"
    }
    assert hits("{lm_head, layers.0.mlp.up_proj}") == {"lm_head", "layers.0.mlp.up_proj"}
    assert layers("layers.{0,1,5}.mlp.up_proj") == {0, 1, 5}


def test_forms_combine() -> None:
    assert hits("layers.[0-1].**.{q,up}_proj") == {
        f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert expand("a.[1-2].{x,y}") == ["a.1.x", "a.1.y", "a.2.x", "a.2.y"]


def test_order_is_that_of_the_names_and_without_duplicates() -> None:
    assert match_names("{lm_head,**}", NAMES) == NAMES


def test_other_characters_are_literal() -> None:
    for pattern in ("layers.0.mlp.up?proj", "layers.0.mlp.(up_proj)", "layers+0", "^lm_head$"):
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
    for pattern in ("embed_tokens[0-99999999999]", "embed_tokens[0-600000,0-600000]"):
        with pytest.raises(PlanError, match="more than 1,000,000 tokens"):
            token_ids(pattern)
