"""Rendering agrees with transformers, and a template cannot leave the sandbox."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_builders.data.chat_template import ChatTemplate
from qlora_builders.errors import DataError, UnsafeTemplateError

USER = {"role": "user", "content": " What is 2 < 3? "}
ASSISTANT = {"role": "assistant", "content": "True,\n\nas ever 😀 "}
SYSTEM = {"role": "system", "content": "Be brief & kind."}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"x": "<é>"}}}],
}
RESULT = {"role": "tool", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds <b>"}}]
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [USER, ASSISTANT],
    [SYSTEM, USER],
    [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
]


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, special_tokens={}, origin="file.jinja").render(messages, **options)


@pytest.mark.parametrize("style", ["llama2", "llama31", "chatml", "generation", "thinking"])
def test_rendering_equals_transformers(
    style: str, templates: dict[str, str], write_tokenizer: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    from qlora_builders.data import Tokenizer

    folder = write_tokenizer(templates[style], kind="llama2" if style == "llama2" else "byte")
    ours, theirs = Tokenizer.from_dir(folder), AutoTokenizer.from_pretrained(folder)
    for messages in CHATS:
        for prompt in (False, True):
            text = ours.render_chat(messages, add_generation_prompt=prompt)
            options = {"add_generation_prompt": prompt, "return_dict": False}
            assert text == theirs.apply_chat_template(messages, tokenize=False, **options)
            ids = ours.encode(text, add_special_tokens=False)
            assert ids == theirs.apply_chat_template(messages, **options)


def test_tools_equal_transformers(
    templates: dict[str, str], write_tokenizer: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer

    from qlora_builders.data import Tokenizer

    folder = write_tokenizer(templates["llama31"])
    messages = [USER, CALL, RESULT, ASSISTANT]
    theirs = AutoTokenizer.from_pretrained(folder)
    text = Tokenizer.from_dir(folder).render_chat(messages, tools=TOOLS)
    assert text == theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert "adds <b>" in text
    assert '"x": "<é>"' in text


def test_the_date_is_that_of_the_start() -> None:
    template = ChatTemplate("{{ strftime_now('%H:%M:%S.%f') }}", special_tokens={}, origin="o")
    assert template.render([]) == template.render([])


def test_special_tokens_are_variables() -> None:
    template = ChatTemplate("{{ bos_token }}|", special_tokens={"bos_token": "<s>"}, origin="o")
    assert template.render([USER]) == "<s>|"


def test_blocks_are_trimmed_and_loops_can_break() -> None:
    source = """
    {% for m in messages %}
        {% if loop.index0 == 1 %}{% break %}{% endif %}
{{ m.content }}
    {% endfor %}"""
    assert render(source, [{"role": "user", "content": "a"}, USER]) == "\na\n"


def test_a_key_that_is_none_counts_as_absent() -> None:
    source = "{% for m in messages %}{{ 'name' in m }}{% endfor %}"
    assert render(source, [{"role": "user", "name": None}]) == "False"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__self__.__class__ }}{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_an_attack_is_refused(attack: str) -> None:
    with pytest.raises(UnsafeTemplateError, match=r"file\.jinja: .* tries to leave its sandbox"):
        render(attack, [USER])


def test_an_attack_is_refused_when_the_tokenizer_is_read(
    make_tokenizer: Callable[..., Any],
) -> None:
    with pytest.raises(DataError, match=r"tokenizer_config\.json: .*leave its sandbox"):
        make_tokenizer("{{ ''.__class__.__mro__ }}")


def test_a_broken_template_is_named() -> None:
    with pytest.raises(
        DataError, match=r"file\.jinja: the chat template does not compile: Expected"
    ):
        ChatTemplate("{% for m in %}", special_tokens={}, origin="file.jinja")


def test_a_refusal_by_the_template_is_passed_on(templates: dict[str, str]) -> None:
    with pytest.raises(
        DataError, match=r"fails on these messages: roles must alternate.*\(roles: user, user\)"
    ):
        render("{% set bos_token = '' %}" + templates["llama2"], [USER, USER])


def test_generation_blocks_are_marked_exactly() -> None:
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}[{{ say(m) }}]"
        "{% else %}({{ m.content }}){% endif %}{% endfor %}"
        "{%- generation -%} {%- endgeneration -%}"
    )
    template = ChatTemplate(source, special_tokens={}, origin="o")
    text, spans = template.render_marked([USER, ASSISTANT, USER, {**ASSISTANT, "content": "b"}])
    assert [text[a:b] for a, b in spans] == [ASSISTANT["content"], "b"]  # the empty one is left out
    assert text == template.render([USER, ASSISTANT, USER, {**ASSISTANT, "content": "b"}])
