"""Damage to what people write: YAML and chat templates."""

from __future__ import annotations

import random
import re
from typing import Any

import yaml
from mutate_bytes import any_bytes
from mutate_json import change_tree

# ---- YAML ---------------------------------------------------------------------------------------

_SCALARS = (
    ".nan", ".inf", "-.inf", "1e999", "0x1F", "0o17", "1_000", "2024-01-01", "12:30:00", "~",
    "null",
    "yes", "no", "on", "=", "!!str 3", "!!int x", "!!float .", "!!binary aGk=", "!!set {a}", "&a 3",
    "*a", "&a [*a]", "!!python/object/apply:os.system [echo]", "!x y", "|\n  a\n  b", ">-\n  a",
    "'",
    '"\\x00"', '"\\ud800"', "\u202e", "a: b", "[a, b", "{a: b", "- a", "? a", "@a", "`a", "%a",
    "${x}",
    "${oc.env:HOME}", "${now:%Y}", "???", "9" * 5000, "[" * 2000, "{a: " * 2000, "x" * 50_000, "-1",
    "0", "1.5", "true", "[]", "{}", "[1, 2]", "{a: 1}", "2", "1e-3", "''", "torch.optim.SGD",
)  # fmt: skip
_LINES = (
    "---", "...", "%YAML 1.2", "<<: {a: 1}", "a", "- a", "a: 1", "\ta: 1", "# @package _global_",
    "? [a]", "[]: 1", "1: 2", "null: 1", "training:", "training: {seed: 3}", "defaults: [_self_]",
    "defaults: 3", "defaults: [{override /data: text}]", "defaults: [{override /nothing: x}]",
    "components: [{match: lm_head, kind: lora}]", "x: &x [1]", "y: *x", "hydra: {run: {dir: x}}",
)  # fmt: skip


def change_yaml_text(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    at, kind = rng.randrange(len(lines)), rng.randrange(9)
    if kind == 0:
        lines[at] = rng.choice((" ", "  ", "\t", "    ")) + lines[at]
    elif kind == 1:
        lines[at] = lines[at].lstrip()
    elif kind == 2:
        lines.insert(at, lines[rng.randrange(len(lines))])
    elif kind == 3:
        del lines[at]
    elif kind == 4:
        lines.insert(at, rng.choice(_LINES))
    elif kind == 5:
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = re.sub(r": .*", lambda _: f": {rng.choice(_SCALARS)}", lines[at], count=1)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def change_yaml_tree(data: bytes, rng: random.Random) -> bytes:
    """Comments before the first key stay: one of them gives an experiment its package."""
    head = re.match(rb"(#.*\n)*", data)
    assert head is not None
    content: Any = change_tree(yaml.safe_load(data), rng)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return head[0] + text.encode("utf-8", "surrogatepass")


YAML = (any_bytes, change_yaml_text, change_yaml_text, change_yaml_tree, change_yaml_tree)

# ---- chat templates -----------------------------------------------------------------------------

_STATEMENTS = (
    "{{ 1/0 }}", "{% if x %}", "{% endif %}", "{% else %}", "{% for m in messages %}",
    "{% endfor %}",
    "{% set messages = 3 %}", "{% set messages = messages[1:] %}", "{% set message = none %}",
    "{{ messages.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}",
    "{{ 'a' * 100 }}", "{{ bos_token }}", "{{ eos_token }}", "{{ unk_token }}", "{% include 'x' %}",
    "{% import 'x' as x %}", "{% extends 'x' %}", "{% block b %}x{% endblock %}",
    "{{ nothing.at }}",
    "{% macro f() %}x{% endmacro %}{{ f() }}", "{{ nothing }}", "{{ messages[99].role }}", "{{",
    "{{ loop.index }}", "{{ '\ufdd0' }}", "\ufdd1", "{{ '%d' % 'x' }}", "{{ 10**300 }}", "{%",
    "{{ messages|tojson }}", "{{ messages|length }}", "{% raw %}", "{% endraw %}", "{# a #}", "{#",
    "{% continue %}", "{% break %}", "{{ cycler('a', 'b').next() }}", "{{ self }}",
    "{{ range(3) }}",
    "{{ namespace(a=1).a }}", "{{ messages[0]['role'] }}", "{{ messages[0].content|upper }}",
    "{{ 'x'|nothing }}", "{{ tools }}", "{{ add_generation_prompt }}",
    "{% if messages is nothing %}",
    "{{ messages|map(attribute='role')|join(',') }}", "{{ [3, 'a']|sort }}", "{{ 'é\U0001f600' }}",
    "{{ -1 }}", "{{ messages.append(1) }}", "{{ dict(a=1) }}", "{{ {'a': 1}['b'] }}", "}}", "%}",
    "{% generation %}", "{% endgeneration %}", "{% generation %}x{% endgeneration %}", "\x00",
    "\r\n",
    "{% do 1 %}", "{% with %}{% endwith %}", "{% filter upper %}a{% endfilter %}", "{% call f() %}",
    "{{ '\\ud800' }}", "{{ 0.1 }}", "{{ none }}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}",
)  # fmt: skip


def change_template(data: bytes, rng: random.Random) -> bytes:
    """A statement more between the others, one less, or two of them swapped."""
    parts = re.split(r"(\{[{%].*?[%}]\})", data.decode())
    at, kind = rng.randrange(len(parts)), rng.randrange(8)
    if kind == 0:
        del parts[at]
    elif kind == 1:
        parts.insert(at, parts[rng.randrange(len(parts))])
    elif kind == 2:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    else:
        parts.insert(at, rng.choice(_STATEMENTS))
    return "".join(parts).encode()


TEMPLATES = (any_bytes, change_template, change_template, change_template)
