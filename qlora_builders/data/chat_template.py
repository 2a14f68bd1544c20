"""A checkpoint's chat template, which `confined.chat` compiles and renders in another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_builders.confined.process import (
    Kept,
    Limits,
    Message,
    OverrunError,
    RaisedError,
    RenderedChat,
    Span,
)
from qlora_builders.errors import DataError, UnsafeTemplateError

LIMITS = Limits(2.0, 128 * 10**6, 8 * 10**6)  # of one conversation; and to compile
_RENDERINGS_PER_TURN = 3  # to find where it begins and ends
_SECONDS_PER_MESSAGE = 2e-4  # of each rendering; some take a tenth of that


@dataclass(frozen=True)
class Conversation:
    """What is to be rendered.

    `train_on` says which turns to find: those of the assistant, the last one of them
    ("completion"), or none ("all").
    """

    messages: Sequence[Message]
    train_on: str
    tools: Sequence[Mapping[str, Any]] | None


class ChatTemplate:
    """One compiled template.

    `special_tokens` are the variables a template may write (`bos_token`, `eos_token`, ...);
    `origin` is the file named in errors. `now` is the date that `strftime_now` gives, by default
    that of construction: all renderings agree, even across midnight.

    Raises:
        DataError: if the template does not compile, breaks out of the sandbox when rendered, or
            takes more than `LIMITS`.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        origin: str,
        now: datetime | None = None,
    ) -> None:
        self.source = source
        self.origin = origin
        arguments = (source, dict(special_tokens), origin, now or datetime.now())
        try:
            self._compiled = Kept("chat.compiled", *arguments, limits=LIMITS)
        except (RaisedError, OverrunError) as error:
            raise self._translated(error, "to compile") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text, including the BOS that the template writes.

        Raises:
            DataError: if the template refuses the messages.
        """
        text: str = self._ask("chat.render", messages, add_generation_prompt, tools)
        return text

    def render_marked(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """The conversation and the non-empty spans inside `{% generation %}` blocks, in order."""
        text, spans = self._ask("chat.render_marked", messages, tools)
        return text, [(start, end) for start, end in spans]

    def render_with_spans(
        self,
        messages: Sequence[Message],
        *,
        stop_strings: Sequence[str],
        train_on: str = "assistant",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedChat:
        """Render and find the turns of the assistant; `train_on` is as in `Conversation`.

        Raises:
            DataError: if the template fails, or rewrites a turn so that its place cannot be found.
        """
        arguments = (messages, stop_strings, train_on, tools)
        return _rendered(self._ask("chat.spans_answer", *arguments))

    def render_each(
        self, conversations: Sequence[Conversation], *, stop_strings: Sequence[str]
    ) -> list[RenderedChat | DataError]:
        """`render_with_spans` of each, or what it raises; all go over together."""
        requests = [(c.messages, stop_strings, c.train_on, c.tools) for c in conversations]
        limits = _limits(*(c.messages for c in conversations))
        try:
            answers = self._compiled.ask("chat.each", requests, limits=limits).value
        except (RaisedError, OverrunError):
            answers = [None] * len(requests)
        found: list[RenderedChat | DataError] = []
        for (messages, _, train_on, tools), answer in zip(requests, answers, strict=True):
            try:
                found.append(
                    _rendered(answer)
                    if answer is not None
                    else self.render_with_spans(
                        messages, stop_strings=stop_strings, train_on=train_on, tools=tools
                    )
                )
            except UnsafeTemplateError as error:
                return [*found, error]  # the others would take as long
            except DataError as error:
                found.append(error)
        return found

    def end_of_turn_text(self) -> str:
        """What the template writes after an assistant's content at the end of a conversation.

        Empty when the template cannot render a question and an answer, or rewrites the answer.
        """
        text: str = self._ask("chat.end_of_turn_text")
        return text

    def _ask(self, function: str, *arguments: Any) -> Any:
        limits = _limits(*arguments[:1])
        try:
            return self._compiled.ask(function, *arguments, limits=limits).value
        except (RaisedError, OverrunError) as error:
            raise self._translated(error, "for one conversation") from error

    def _translated(self, error: RaisedError | OverrunError, purpose: str) -> DataError:
        if isinstance(error, OverrunError):
            return UnsafeTemplateError(
                f"{self.origin}: the chat template {error} {purpose}; do not use this "
                "checkpoint's template"
            )
        if error.kind == "UnsafeTemplateError":
            return UnsafeTemplateError(str(error))
        if error.kind == "DataError":
            return DataError(str(error))
        return DataError(f"{self.origin}: the chat template fails on these messages: {error}")


def _limits(*conversations: Sequence[Message]) -> Limits:
    """Of a request that renders them; a long one is rendered often."""
    seconds = LIMITS.seconds
    for messages in conversations:
        turns = sum(message.get("role") == "assistant" for message in messages)
        seconds += len(messages) * (1 + _RENDERINGS_PER_TURN * turns) * _SECONDS_PER_MESSAGE
    return Limits(seconds, LIMITS.memory, LIMITS.answer)


def _rendered(answer: Any) -> RenderedChat:
    text, spans, needs_eos = answer
    return RenderedChat(text, [(start, end) for start, end in spans], needs_eos)
