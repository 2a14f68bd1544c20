"""Chat templates: jinja2 in a sandbox, and which characters of a conversation the assistant wrote.

A template comes with a checkpoint, so it is untrusted code. jinja2's sandbox keeps it from Python's
internals, the limits of the process from taking all time and memory, also while it is compiled. The
environment offers the extras that published templates use: `raise_exception`, `strftime_now`, a
plain `tojson`, loop controls and the `{% generation %}` tag, which marks an assistant's text.

Work is on characters; the tokenizer's offsets carry the result to tokens, so a token merged across
a border cannot shift the mask. Templates that mark their text with `{% generation %}` are taken at
their word. All others, such as the stock Llama 3.1 one, are read from outside:

* a turn starts where `render(messages before it, add_generation_prompt=True)` ends;
* its content ends where a rendering with other content in its place starts to agree again;
* the end-of-turn token after the content belongs to the turn (it has to be trained, or the model
  never stops); what the template puts before the next turn does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from qlora_builders.confined.process import Message, RenderedChat, Span
from qlora_builders.errors import DataError, UnsafeTemplateError

# Unicode noncharacters: reserved for use inside one program, so no interchanged text has them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
NONCHARACTERS = ("\ufdd0", "\ufdd1", "\ufdd2")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: its text, marked when that is asked for."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_wrap", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _wrap(self, context: Context, caller: Callable[[], str]) -> str:
        if not context.get("_mark_generation"):
            return caller()
        return f"{_OPEN}{caller()}{_CLOSE}"


class CompiledTemplate:
    """One compiled template.

    `special_tokens` are the variables a template may write (`bos_token`, `eos_token`, ...);
    `origin` is the file named in errors. `now` is the date that `strftime_now` gives.

    Raises:
        DataError: if the template does not compile, or breaks out of the sandbox when rendered.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], origin: str, now: datetime
    ) -> None:
        self.origin = origin
        self.marks_generation = _GENERATION_TAG.search(source) is not None
        self._variables = dict(special_tokens)
        try:
            self._template = _environment(now).from_string(source)
        except MemoryError:
            raise
        except RecursionError as error:
            raise DataError(
                f"{origin}: the chat template does not compile: nested too deeply"
            ) from error
        except Exception as error:  # Python's compiler refuses some of what jinja2 makes
            raise DataError(f"{origin}: the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, including the BOS that the template writes.

        Raises:
            DataError: if the template refuses the messages.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """The conversation and the non-empty spans inside `{% generation %}` blocks, in order."""
        marked = self._render(messages, tools=tools, _mark_generation=True)
        parts = re.split(f"([{_OPEN}{_CLOSE}])", marked)
        text, spans, open_at = "", [], None
        for part in parts:
            if part == _OPEN:
                open_at = len(text)
            elif part == _CLOSE:
                if open_at is not None and len(text) > open_at:
                    spans.append((open_at, len(text)))
                open_at = None
            else:
                text += part
        return text, spans

    def _render(self, messages: Sequence[Message], **variables: Any) -> str:
        # A key holding None means "not there" (parquet fills absent keys so); templates that test
        # `is defined` would otherwise write the word None.
        present = [{k: v for k, v in m.items() if v is not None} for m in messages]
        variables.setdefault("add_generation_prompt", False)
        try:
            return self._template.render(
                messages=present, documents=None, **{**self._variables, **variables}
            )
        except SecurityError as error:
            raise UnsafeTemplateError(
                f"{self.origin}: the chat template tries to leave its sandbox ({error}); "
                "do not use this checkpoint's template"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # a template can raise anything: filters run Python code
            raise DataError(
                f"{self.origin}: the chat template fails on these messages: "
                f"{error or type(error).__name__} (roles: {_roles(messages)})"
            ) from error


def compiled(*arguments: Any) -> tuple[CompiledTemplate, None]:
    """`CompiledTemplate(*arguments)`, to be kept."""
    return CompiledTemplate(*arguments), None


render = CompiledTemplate.render
render_marked = CompiledTemplate.render_marked


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(m.get("role")) for m in messages) or "none"


_STAND_IN = NONCHARACTERS[2]


Answer = tuple[str, list[Span], bool]


def spans_answer(template: CompiledTemplate, *arguments: Any) -> Answer:
    """`render_with_spans` as JSON has it."""
    chat = render_with_spans(template, *arguments)
    return chat.text, chat.spans, chat.needs_eos


def each(template: CompiledTemplate, conversations: Sequence[Sequence[Any]]) -> list[Answer | None]:
    """`spans_answer` of the arguments of each; None where it raises, to be asked alone."""
    found: list[Answer | None] = []
    for arguments in conversations:
        try:
            found.append(spans_answer(template, *arguments))
        except DataError:
            found.append(None)
    return found


def render_with_spans(
    template: CompiledTemplate,
    messages: Sequence[Message],
    stop_strings: Sequence[str],
    train_on: str = "assistant",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> RenderedChat:
    """Render and find the assistant turns: all, with "completion" the last one, with "all" none.

    Raises:
        DataError: if the template fails, or rewrites a turn so that its place cannot be found.
    """
    if train_on == "all":
        return RenderedChat(template.render(messages, tools=tools), [], needs_eos=False)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    last_only = train_on == "completion"
    if last_only:
        turns = turns[-1:]
    reader = _TurnReader(template, list(messages), stop_strings, tools)
    if template.marks_generation:
        spans = reader.marked_spans(turns[0] if last_only and turns else None)
    else:
        spans = [reader.turn_span(i) for i in turns]
    text = reader.text
    ends_with_turn = bool(turns) and turns[-1] == len(messages) - 1 and bool(spans)
    closed = bool(spans) and text[: spans[-1][1]].rstrip().endswith(tuple(stop_strings))
    if ends_with_turn and not closed and not text[spans[-1][1] :].strip():
        return RenderedChat(text[: spans[-1][1]], spans, needs_eos=True)
    return RenderedChat(text, spans, needs_eos=False)


def end_of_turn_text(template: CompiledTemplate) -> str:
    """What the template writes after an assistant's content at the end of a conversation.

    Empty when the template cannot render a question and an answer, or rewrites the answer.
    """
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _STAND_IN}]
    try:
        return template.render(probe).rpartition(_STAND_IN)[2]
    except UnsafeTemplateError:
        raise
    except DataError:
        return ""


class _TurnReader:
    """One conversation and the renderings that place its assistant turns."""

    def __init__(
        self,
        template: CompiledTemplate,
        messages: list[Message],
        stop_strings: Sequence[str],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools
        stops = "|".join(re.escape(s) for s in sorted(stop_strings, key=len, reverse=True))
        self.stop = re.compile(stops or "(?!)")
        self.text = template.render(messages, tools=tools)

    def marked_spans(self, last_turn: int | None) -> list[Span]:
        """Spans of the generation blocks, all of them or those from message `last_turn` on."""
        text, spans = self.template.render_marked(self.messages, tools=self.tools)
        if text != self.text:
            raise DataError(
                "the conversation holds a Unicode noncharacter (U+FDD0 to U+FDD2), which this "
                "program uses to mark the assistant's text; remove it from the data"
            )
        if last_turn is not None and spans:
            try:
                earlier = self.template.render_marked(self.messages[:last_turn], tools=self.tools)
            except DataError:
                spans = spans[-1:]
            else:
                spans = spans[len(earlier[1]) :]
        # Some templates leave the end-of-turn token outside the block; it still has to be trained.
        return [self._with_stop(start, end) for start, end in spans]

    def turn_span(self, index: int) -> Span:
        """Characters of assistant message `index`, from its header's end to its end of turn."""
        prompt = self._render(self.messages[:index], add_generation_prompt=True)
        before, after = self._around_content(index)
        if prompt is not None and self.text.startswith(prompt):
            start = len(prompt)
        elif before is not None and self.text.startswith(before):
            start = len(before)
        else:
            raise self._unplaced(index, "start")
        if after is not None and self.text.endswith(after):
            content_end = len(self.text) - len(after)
            _, end = self._with_stop(content_end, content_end)
            if end == content_end:
                end = self._turn_end(index, content_end)
        else:
            end = self._turn_end(index, start)
        if end <= start:
            raise self._unplaced(index, "end")
        return start, end

    def _turn_end(self, index: int, content_end: int) -> int:
        """The end of the turn when its stop token does not follow its content directly."""
        through = self._render(self.messages[: index + 1])
        if through is None or not self.text.startswith(through):
            raise self._unplaced(index, "end")
        stop = self.stop.search(self.text, content_end, len(through))
        if stop is not None:
            return stop.end()
        return content_end + len(self.text[content_end : len(through)].rstrip())

    def _with_stop(self, start: int, end: int) -> Span:
        """The span, grown over white space and a stop token that follow it directly."""
        if any(m.end() == end for m in self.stop.finditer(self.text, start, end)):
            return start, end
        at = end + len(self.text[end:]) - len(self.text[end:].lstrip())
        stop = self.stop.match(self.text, at)
        return (start, stop.end()) if stop is not None else (start, end)

    def _around_content(self, index: int) -> tuple[str | None, str | None]:
        """What is rendered before and after the content of message `index`."""
        if not self.messages[index].get("content"):
            return None, None
        stand_in = {**self.messages[index], "content": _STAND_IN}
        swapped = self._render([*self.messages[:index], stand_in, *self.messages[index + 1 :]])
        if swapped is None or swapped.count(_STAND_IN) != 1:
            return None, None
        before, _, after = swapped.partition(_STAND_IN)
        return before, after

    def _render(
        self, messages: list[Message], *, add_generation_prompt: bool = False
    ) -> str | None:
        """The rendering, or None where the template refuses such a part of a conversation."""
        try:
            return self.template.render(
                messages, add_generation_prompt=add_generation_prompt, tools=self.tools
            )
        except DataError:
            return None

    def _unplaced(self, index: int, what: str) -> DataError:
        return DataError(
            f"{self.template.origin}: cannot find the {what} of message {index + 1}, the "
            "assistant's, in the rendered conversation, because the template rewrites it; put "
            "{% generation %} and {% endgeneration %} around the assistant's text in the template, "
            "or set data.train_on=all"
        )
