"""A template that takes all time or memory is one error, in each of the ways to do so."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_builders.confined.process import Limits
from qlora_builders.data import Tokenizer, build_dataset, chat_template
from qlora_builders.data.chat_template import ChatTemplate
from qlora_builders.errors import DataError, UnsafeTemplateError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
NESTED = (
    "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"
    "{% set d = [c] * 1000 %}"
)
DICTS = "{% set ns = namespace(d={'k': 1}) %}{% for i in range(60) %}" + (
    "{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{% set d = ns.d %}"
)
TUPLES = "{% set ns = namespace(d=(1, 2)) %}{% for i in range(60) %}" + (
    "{% set ns.d = (ns.d, ns.d) %}{% endfor %}{% set d = ns.d %}"
)
EQUALS = TUPLES + (
    "{% set ns = namespace(d=(1, 2)) %}{% for i in range(60) %}"
    "{% set ns.d = (ns.d, ns.d) %}{% endfor %}{% set e = ns.d %}"
)
BYTES = "{% set s = 'x' * 9999999 %}{% set b = s.encode() %}"
# what is done with something enormous
USES = {
    "print": "{{ d }}",
    "tilde": "{{ d ~ d }}",
    "string": "{{ (d | string) | length }}",
    "join": "{{ [d, d] | join(',') }}",
    "format": "{{ '{}'.format(d) }}",
    "format map": "{{ '{a}'.format_map({'a': d}) }}",
    "percent": "{{ '%s' % d }}",
    "percent of a list": "{{ '%s' % [d] }}",
    "format filter": "{{ '%r' | format(d) }}",
    "tojson": "{{ d | tojson }}",
    "tojson with indent": "{{ d | tojson(indent=9) }}",
    "pprint": "{{ d | pprint }}",
    "escape": "{{ d | escape }}",
    "urlencode": "{{ d | urlencode }}",
    "upper": "{{ d | upper }}",
    "error": "{{ raise_exception(d) }}",
    "macro": "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(d) }}",
    "generation": "{% generation %}{{ d }}{% endgeneration %}",
}
COMPARED = {
    "equal": "{{ d == e }}",
    "in": "{{ d in [e] }}",
    "sort": "{{ [d, e] | sort }}",
    "index": "{{ [e].index(d) }}",
    "unique": "{{ [d, e] | unique | list | length }}",
    "hash": "{{ {d: 1} | length }}",
    "max": "{{ [d, e] | max | length }}",
    "groupby": "{{ [{'k': d}, {'k': e}] | groupby('k') | list | length }}",
}
LOOP = "{% set ns = namespace(s='x', n=9, l=[1]) %}{% for i in range(80) %}"
ALONE = {
    "loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "loops with conditions": (
        "{% set r = range(99999) %}{% for i in r %}{% for j in r if j < 0 %}{% endfor %}"
        "{% endfor %}"
    ),
    "concatenation": LOOP + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "addition": LOOP + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "addition of lists": LOOP + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "repetition": "{{ 'x' * 10**10 }}",
    "folded repetition": "{% set s = 'x' * 999999999 %}",
    "repeated list": "{{ 10**10 * [0] }}",
    "power": "{{ 9**(9**9) }}",
    "squares": LOOP + "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "width": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "indent": "{{ 'x\\ny'|indent(10**10) }}",
    "percent width": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent precision": "{{ '%.999999999f' % 1 }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "format of a list": "{{ '{0[0]:{0[1]}}'.format([1, 10**9]) }}",
    "replace": "{% set s = 'x' * 99999 %}{{ s.replace('x', s) }}",
    "replace filter": "{% set s = 'x' * 99999 %}{{ s | replace('x', s) }}",
    "join of text": "{% set s = 'x' * 99999 %}{{ s.join(s) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
    "lipsum of long words": "{{ lipsum(n=1, min=10**9, max=10**9 + 1) }}",
    "round": "{{ 1.5|round(100000000,'ceil') }}",
    "tojson indent": "{{ [[[[[[[[[[1]]]]]]]]]]|tojson(indent=90000000) }}",
    "tojson separators": "{{ [1] * 9999 | int | tojson(separators=('x' * 999999, ':')) }}",
    "sum": "{{ ([[1] * 9999] * 99999)|sum(start=[]) }}",
    "translate": "{% set s = 'x' * 99999 %}{{ s.translate({120: s}) }}",
    "bytes join": BYTES + "{{ b.join([b] * 999) | length }}",
    "bytes replace": BYTES + "{{ b.replace('x'.encode(), b) | length }}",
    "bytes width": "{{ 'x'.encode().ljust(10**10) }}",
    "bytes in a loop": BYTES + "{% for i in range(99999) %}{% set c = b.hex() %}{% endfor %}",
    "int to bytes": "{{ (1).to_bytes(10**9, 'big') | length }}",
    "output": "{% set s = 'x' * 999999 %}{% for i in range(9999) %}{{ s }}{% endfor %}",
    "output in a block": (
        "{% set s = 'x' * 999999 %}{% set t %}{% for i in range(9999) %}{{ s }}{% endfor %}"
        "{% endset %}"
    ),
    "much output": "{% set s = 'x' * 99999999 %}{{ s }}",
    "macro tree": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "calls": (
        "{% macro f(n) %}{{ caller(n) }}{% endmacro %}{% call(x) f(1) %}{{ f(x) }}{% endcall %}"
    ),
    "recursive loop": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "generators": (
        "{% set ns = namespace(g=range(99999)) %}{% for i in range(99) %}"
        "{% set ns.g = ns.g | map('string') %}{% endfor %}{{ ns.g | list | length }}"
        "{% set r = range(99999) %}{% for i in r %}{{ r | select('odd') | list | length }}"
        "{% endfor %}"
    ),
    "slices": "{{ range(99999)|slice(10**9)|list|length }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "wordwrap": "{{ ('x ' * 999999)|wordwrap(1, wrapstring='y' * 9999) }}",
    "cycler": "{% set c = cycler(*([1] * 10**9)) %}",
    "dictsort": "{{ dict.fromkeys(range(99999), 1) }}{{ [[1] * 10**9] }}",
    "casefold in a loop": (
        "{% set s = 'ß' * 999999 %}{% for i in range(99999) %}"
        "{% set t = s.casefold() %}{% endfor %}"
    ),
    "strip": (
        "{% set s = ' ' * 9999999 ~ 'x' %}{% for i in range(99999) %}"
        "{% set t = s | trim %}{% endfor %}"
    ),
    "regex of a filter": "{{ ('<' * 999999) | striptags | length }}{{ '<a ' * 10**9 }}",
    "urlize": "{{ ('a.' * 9999999) | urlize }}",
    "title": "{% for i in range(9999) %}{% set t = ('x ' * 999999)|title %}{% endfor %}",
    "strftime": "{{ strftime_now('%d' * 99999999) }}",
    "self include": "{% include 'x' %}",
    "import": "{% import 'x' as x %}",
    "extends": "{% extends 'x' %}",
    "deep brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "deep lists": "{{ " + "[" * 9999 + "]" * 9999 + " }}",
    "deep blocks": "{% if 1 %}" * 9999 + "{% endif %}" * 9999,
    "deep loops": "{% for i in [1] %}" * 99 + "{% endfor %}" * 99,
    "many sums": "{{ " + "1 + " * 99999 + "1 }}",
    "deep value": "{% set ns = namespace(d=[]) %}{% for i in range(99999) %}"
    "{% set ns.d = [ns.d] %}{% endfor %}{{ ns.d }}",
    "deep value as JSON": "{% set ns = namespace(d=[]) %}{% for i in range(99999) %}"
    "{% set ns.d = [ns.d] %}{% endfor %}{{ ns.d | tojson }}",
    "lone surrogates": "{{ raise_exception('\\ud800' * 999999) }}",
}
TEMPLATES = (
    {f"{kind} by {use}": start + text
     for kind, start in (("lists", NESTED), ("dicts", DICTS), ("tuples", TUPLES))
     for use, text in USES.items()}
    | {f"tuples by {use}": EQUALS + text for use, text in COMPARED.items()}
    | ALONE
)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, met sooner."""
    monkeypatch.setattr(chat_template, "LIMITS", Limits(0.25, 96_000_000, 4_000_000))


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_stopped(name: str, small: None) -> None:
    def render() -> None:
        template = ChatTemplate(TEMPLATES[name], special_tokens={}, origin="chat_template.jinja")
        template.render(MESSAGES)

    started = time.monotonic()
    with pytest.raises(DataError, match=r"^chat_template\.jinja: the chat template "):
        render()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (ALONE["loops"], r"takes more than 0\.25\d* s of CPU time for one conversation; do not"),
        ("{{ 9**(9**9) }}", r"takes more than 0\.25\d* s of CPU time to compile; do not use"),
        ("{% set n = 10**9 + messages|length %}{{ 'x' * n }}", "takes more than 96 MB of memory"),
        ("{{ messages[0].content * 4000000 }}", "makes more than 4 MB of output for one"),
    ],
)
def test_each_limit_is_named(source: str, what: str, small: None) -> None:
    with pytest.raises(UnsafeTemplateError, match=rf"^x: the chat template {what}"):
        ChatTemplate(source, special_tokens={}, origin="x").render(MESSAGES)


def test_a_template_goes_on_after_another_met_a_limit(small: None) -> None:
    good = ChatTemplate("{{ messages[0].content }}", special_tokens={}, origin="x")
    bad = ChatTemplate("{{ messages[0].content * 10**9 }}", special_tokens={}, origin="x")
    for _ in range(2):
        with pytest.raises(UnsafeTemplateError):
            bad.render(MESSAGES)
        assert good.render(MESSAGES) == "hi"


def test_a_row_that_meets_a_limit_is_not_skipped(
    make_tokenizer: Callable[..., Tokenizer], tmp_path: Path, small: None
) -> None:
    source = "{{ messages[0].content * (10**9 if messages[0].content == 'bomb' else 1) }}"
    file = tmp_path / "rows.jsonl"
    rows = [[{"role": "user", "content": text}, MESSAGES[1]] for text in ("a", "bomb")]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = {"format": "chat", "train_on": "all", "max_seq_len": 9, "on_error": "skip"}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*: the chat template "):
        build_dataset(file, make_tokenizer(source), **options)


def test_a_thousand_turns(templates: dict[str, str]) -> None:
    chat = ChatTemplate(templates["chatml"], special_tokens={}, origin="x")
    rendered = chat.render_with_spans(MESSAGES * 500, stop_strings=["<|im_end|>"])
    assert len(rendered.spans) == 500


def test_long_conversations_and_large_numbers_are_welcome() -> None:
    source = (
        "{% for m in messages %}{{ m.role ~ ': ' ~ m.content + '\n' }}"
        "{{ m.at | string }} {{ loop.index }}/{{ loop.length }}{% if not loop.last %};{% endif %}"
        "{% endfor %}{% set ns = namespace(at=1700000000) %}{{ ns.at + 1 }}"
    )
    content = "a long text " * 200_000  # 2.4 MB
    messages = [{"role": "user", "content": content, "at": 1_700_000_000}] * 3
    text = ChatTemplate(source, special_tokens={}, origin="x").render(messages)
    row = f"user: {content}\n1700000000 "
    assert text == ";".join(f"{row}{i}/3" for i in (1, 2, 3)) + "1700000001"


def test_numbers_in_text_are_no_widths() -> None:
    source = (
        "{% for m in messages %}{{ m.content|trim|replace('x', 'y') }}{{ m.content.strip() }}"
        "{{ '{:>3}%5.2f'.format(7) % 1 }}{{ '%s %d'|format(m.content, 12345678) }}{% endfor %}"
    )
    template = ChatTemplate(source, special_tokens={}, origin="chat_template.jinja")
    content = '{"id": 12345678, "at": {"s": 1700000000}, "share": "5% 12345678"}'
    text = template.render([{"role": "user", "content": content}])
    assert text == f"{content}{content}  7 1.00{content} 12345678"


def test_what_leaves_the_sandbox_says_so() -> None:
    template = ChatTemplate("{{ ''.__class__.__mro__ }}", special_tokens={}, origin="x")
    with pytest.raises(UnsafeTemplateError, match="tries to leave its sandbox"):
        template.render(MESSAGES)
