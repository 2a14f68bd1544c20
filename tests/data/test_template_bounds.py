"""A template that loops or grows without end is stopped, quickly; one that is only long is not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from qlora_builders.data.chat_template import ChatTemplate, UnsafeTemplateError
from qlora_builders.errors import DataError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops without calls": (
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    ),
    "long range": "{% for i in range(10**12) %}{% endfor %}",
    "concatenation": (
        "{% set ns = namespace(s='x') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "addition": (
        "{% set ns = namespace(s='x') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "repetition": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ 10**10 * [0] }}",
    "power": "{{ 9**(9**9) }}",
    "power of a power": (
        "{% set ns = namespace(n=9) %}{% for i in range(9) %}{% set ns.n = ns.n**64 %}{% endfor %}"
    ),
    "width": "{{ 'x'.ljust(10**10) }}",
    "filter": "{{ 'x'|center(10**10) }}",
    "indent": "{{ 'x\\ny'|indent(10**10) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "percent of a tuple": "{{ '%*d' % (10**10, 1) }}",
    "percent of a name": "{{ '%(a(b))9999999999d' % {'a(b)': 1} }}",
    "format of a list": "{{ '{0[0]:{0[1]}}'.format([1, 10**10]) }}",
    "replace": (
        "{% set s = 'x' * 99999 %}{% for i in range(9999) %}"
        "{% set t = s.replace('x', s) %}{% endfor %}"
    ),
    "output": "{% set s = 'x' * 999999 %}{% for i in range(9999) %}{{ s }}{% endfor %}",
    "output in a block": (
        "{% set s = 'x' * 999999 %}{% set t %}{% for i in range(9999) %}{{ s }}{% endfor %}"
        "{% endset %}"
    ),
    "join": "{% set s = 'x' * 99999 %}{{ s.join(s) }}{{ s|join(s) }}",
    "tabs": "{{ ('\\t' * 99999).expandtabs(99999) }}",
    "macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
}


def reset_peak_kib() -> int:
    """From here on, the process's peak is a new one (on Linux, as in CI)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def peak_kib() -> int:
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("name", ENDLESS)
def test_it_is_stopped(name: str) -> None:
    template = ChatTemplate(ENDLESS[name], special_tokens={}, origin="chat_template.jinja")
    before = reset_peak_kib()
    started = time.process_time()
    with pytest.raises(DataError, match=r"^chat_template\.jinja: the chat template "):
        template.render(MESSAGES)
    assert time.process_time() - started < 60
    assert peak_kib() - before < 500 * 2**10


def test_each_conversation_has_a_budget_of_its_own() -> None:
    source = "{% for i in range(99999) %}{% for j in range(4) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, special_tokens={}, origin="x")
    for _ in range(3):
        assert template.render(MESSAGES) == ""


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
