"""The assistant's characters are found in every style of template, or an error says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_builders.data import Tokenizer, build_dataset
from qlora_builders.data.chat_template import ChatTemplate, Conversation
from qlora_builders.errors import DataError

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!\n\n"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4.\n\nYes 😀"},
]


def spans_of(
    source: str,
    messages: list[dict[str, Any]],
    *,
    stops: tuple[str, ...] = ("</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"),
    **options: Any,
) -> list[str]:
    template = ChatTemplate(
        source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, origin="file.jinja"
    )
    chat = template.render_with_spans(messages, stop_strings=stops, **options)
    return [chat.text[start:end] for start, end in chat.spans]


EXPECTED = {
    "llama2": [" Hello! </s>", " 4.\n\nYes 😀 </s>"],
    "llama31": ["Hello!<|eot_id|>", "4.\n\nYes 😀<|eot_id|>"],
    "chatml": ["Hello!\n\n<|im_end|>", "4.\n\nYes 😀<|im_end|>"],
    "generation": ["Hello!\n\n<|im_end|>", "4.\n\nYes 😀<|im_end|>"],
    "thinking": ["Hello!\n\n<|im_end|>", "4.\n\nYes 😀<|im_end|>"],
}


@pytest.mark.parametrize("style", EXPECTED)
def test_turns_with_their_end_and_without_what_follows(
    style: str, templates: dict[str, str]
) -> None:
    assert spans_of(templates[style], CHAT) == EXPECTED[style]
    assert spans_of(templates[style], CHAT, train_on="completion") == EXPECTED[style][1:]


def test_old_thinking_that_the_template_drops_is_not_looked_for(templates: dict[str, str]) -> None:
    turns = [dict(message) for message in CHAT]
    turns[2]["content"] = "<think>\nold\n</think>\nHello"
    turns[4]["content"] = "<think>\nnew\n</think>\nFour"
    # The last turn begins with what the generation prompt writes, so that part is not trained.
    expected = ["Hello<|im_end|>", "new\n</think>\nFour<|im_end|>"]
    assert spans_of(templates["thinking"], turns) == expected


def test_a_system_text_that_moves_to_the_last_question() -> None:
    source = """{{ bos_token }}{% set ns = namespace(system='', last=0) %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (ns.system + '\\n\\n' if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
    assert spans_of(source, CHAT) == ["Hello!\n\n</s>", " 4.\n\nYes 😀</s>"]


def test_a_conversation_that_the_assistant_opens(templates: dict[str, str]) -> None:
    source = "{% if not messages %}{{ raise_exception('empty') }}{% endif %}" + templates["chatml"]
    assert spans_of(source, CHAT[2:]) == EXPECTED["chatml"]


def test_two_assistant_turns_in_a_row(templates: dict[str, str]) -> None:
    turns = [CHAT[1], CHAT[2], CHAT[4]]
    assert spans_of(templates["chatml"], turns) == EXPECTED["chatml"]


def test_a_tool_call_is_an_assistant_turn(templates: dict[str, str]) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2}}}],
    }
    turns = [CHAT[1], call, {"role": "tool", "content": "4"}, CHAT[4]]
    expected = ['{"name": "add", "arguments": {"x": 2}}<|eom_id|>', EXPECTED["llama31"][1]]
    assert spans_of(templates["llama31"], turns) == expected


def test_content_that_spells_a_stop_token(templates: dict[str, str]) -> None:
    turns = [CHAT[1], {"role": "assistant", "content": "say <|im_end|> twice"}]
    assert spans_of(templates["chatml"], turns) == ["say <|im_end|> twice<|im_end|>"]


def test_text_between_content_and_stop_token_is_trained() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}></s>\n{% endfor %}"
    turns = spans_of(source, CHAT)
    assert turns[1] == "<assistant>4.\n\nYes 😀</assistant></s>"


def test_a_stop_token_written_before_the_next_turn() -> None:
    source = (
        "{% for m in messages %}{% if not loop.first %}</s>\n{% endif %}"
        "{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}</s>\nassistant: {% endif %}"
    )
    assert spans_of(source, CHAT) == ["Hello!\n\n</s>", "4.\n\nYes 😀"]


def test_a_template_without_end_of_turn_asks_for_eos() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate(source, special_tokens={}, origin="o")
    chat = template.render_with_spans(CHAT, stop_strings=["</s>"])
    assert chat.needs_eos
    assert chat.text.endswith("Yes 😀")
    assert [chat.text[a:b] for a, b in chat.spans][1] == "4.\n\nYes 😀"
    assert not template.render_with_spans(CHAT[:4], stop_strings=["</s>"]).needs_eos
    assert template.end_of_turn_text() == "\n"


def test_a_marked_span_takes_the_stop_token_behind_it(templates: dict[str, str]) -> None:
    source = templates["generation"].replace(
        "{{ message.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ message.content }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert source != templates["generation"]
    assert spans_of(source, CHAT) == EXPECTED["generation"]


def test_the_last_marked_turn_where_its_prefix_does_not_render(templates: dict[str, str]) -> None:
    source = (
        "{% if messages[-1].role == 'user' %}{{ raise_exception('ends early') }}{% endif %}"
        + templates["generation"]
    )
    assert spans_of(source, CHAT, train_on="completion") == EXPECTED["generation"][1:]


def test_a_template_that_depends_on_the_whole_conversation_is_refused(
    templates: dict[str, str],
) -> None:
    source = "{{ messages | map(attribute='content') | join | length }}" + templates["chatml"]
    with pytest.raises(
        DataError,
        match=r"file\.jinja: cannot find the start of message 3, the .*\{% generation %\}",
    ):
        spans_of(source, CHAT)


def test_a_turn_that_the_template_leaves_out_is_refused() -> None:
    source = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"cannot find the end of message 3, the assistant's, in"):
        spans_of(source, CHAT)


def test_a_rewritten_turn_whose_stop_token_is_set_apart_is_refused(
    templates: dict[str, str],
) -> None:
    source = templates["thinking"].replace("content + '<|im_end|>", "content + '(end)<|im_end|>")
    assert spans_of(source, CHAT)[0] == "Hello!\n\n(end)<|im_end|>"
    turns = [dict(message) for message in CHAT]
    turns[2]["content"] = "<think>\nold\n</think>\nHello"
    with pytest.raises(DataError, match=r"cannot find the end of message 3, the assistant's, in"):
        spans_of(source, turns)


def test_noncharacters_in_marked_text_are_refused(templates: dict[str, str]) -> None:
    turns = [CHAT[1], {"role": "assistant", "content": "a\ufdd0b"}]
    with pytest.raises(DataError, match="noncharacter"):
        spans_of(templates["generation"], turns)


def test_an_unrenderable_probe_gives_no_end_of_turn() -> None:
    template = ChatTemplate("{{ raise_exception('no') }}", special_tokens={}, origin="o")
    assert template.end_of_turn_text() == ""


def test_mask_equals_transformers_where_it_has_one(
    templates: dict[str, str], write_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = write_tokenizer(templates["generation"])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, return_assistant_tokens_mask=True, return_dict=True
    )
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"messages": CHAT}]), encoding="utf-8")
    ours = build_dataset(file, Tokenizer.from_dir(folder), format="chat", max_seq_len=512)[0]
    assert ours.input_ids.tolist() == theirs["input_ids"]
    assert [int(label != -100) for label in ours.labels.tolist()] == theirs["assistant_masks"]


TEXT = st.text(alphabet=st.sampled_from("ab Z9.,!?\n\té😀漢<|>/"), min_size=1, max_size=12).filter(
    lambda text: text.strip()
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(answers=st.lists(TEXT, min_size=1, max_size=3), questions=TEXT)
@pytest.mark.parametrize("style", ["llama31", "chatml", "generation"])
def test_trained_tokens_spell_the_answers(
    style: str,
    answers: list[str],
    questions: str,
    fixed_tokenizers: dict[str, Tokenizer],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tokenizer = fixed_tokenizers[style]
    messages = []
    for answer in answers:
        messages.append({"role": "user", "content": questions})
        messages.append({"role": "assistant", "content": answer})
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps([{"messages": messages}]), encoding="utf-8")
    example = build_dataset(file, tokenizer, format="chat", max_seq_len=4096)[0]
    trained = [label for label in example.labels.tolist() if label != -100]
    text = tokenizer.decode(trained, skip_special_tokens=False)
    stop = "<|eot_id|>" if style == "llama31" else "<|im_end|>"
    turns = text.split(stop)
    assert turns.pop() == ""
    expected = [answer.strip() if style == "llama31" else answer for answer in answers]
    for turn, answer in zip(turns, expected, strict=True):
        # Where the answer begins with a line break, BPE may join it to the header's.
        assert turn.endswith(answer)
        assert turn[: len(turn) - len(answer)].strip("\n") == ""
        assert turn == answer or answer[0].isspace()


@pytest.fixture
def fixed_tokenizers(
    templates: dict[str, str], make_tokenizer: Callable[..., Tokenizer]
) -> dict[str, Tokenizer]:
    return {s: make_tokenizer(templates[s]) for s in ("llama31", "chatml", "generation")}


@pytest.mark.parametrize("train_on", ["assistant", "completion", "all"])
def test_conversations_rendered_together_are_those_rendered_alone(train_on: str) -> None:
    source = (
        "{% for m in messages %}{{ raise_exception('no ' ~ m.role) if m.role == 'tool' }}"
        "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = ChatTemplate(source, special_tokens={}, origin="x")
    refused = [*CHAT, {"role": "tool", "content": "1"}]
    found = template.render_each(
        [Conversation(messages, train_on, None) for messages in (CHAT, refused, CHAT[:3])],
        stop_strings=["</s>"],
    )
    for messages, chat in zip((CHAT, CHAT[:3]), found[::2], strict=True):
        alone = template.render_with_spans(messages, stop_strings=["</s>"], train_on=train_on)
        assert chat == alone
        assert bool(alone.spans) == (train_on != "all")
    assert isinstance(found[1], DataError)
    assert "fails on these messages: no tool" in str(found[1])
