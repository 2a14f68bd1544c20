"""A checkpoint's chat template, which `confined.chat` compiles and renders in another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from qlora_builders.confined.process import Kept, Limits, OverrunError, RaisedError
from qlora_builders.confined.rendered import Message, RenderedChat, Span
from qlora_builders.errors import DataError, UnsafeTemplateError

LIMITS = Limits()  # of one conversation
_RENDERINGS_PER_TURN = 3  # to find where it begins and ends
_SECONDS_PER_MESSAGE = 2e-4  # of each rendering; some take a tenth of that


class ChatTemplate:
    """One compiled template.

    `special_tokens` are the variables a template may write (`bos_token`, `eos_token`, ...);
    `origin` is the file named in errors. The date that `strftime_now` gives is that of
    construction, so all renderings of one run agree even across midnight.

    Raises:
        DataError: if the template does not compile, breaks out of the sandbox when rendered, or
            takes more than `LIMITS`.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], origin: str) -> None:
        self.source = source
        self.origin = origin
        arguments = (source, dict(special_tokens), origin, datetime.now())
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
        last_only: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedChat:
        """Render and find the assistant turns (`last_only`: just the last one).

        Raises:
            DataError: if the template fails, or rewrites a turn so that its place cannot be found.
        """
        text, spans, needs_eos = self._ask(
            "assistant_mask.spans_answer", messages, stop_strings, last_only, tools
        )
        return RenderedChat(text, [(start, end) for start, end in spans], needs_eos)

    def end_of_turn_text(self) -> str:
        """What the template writes after an assistant's content at the end of a conversation.

        Empty when the template cannot render a question and an answer, or rewrites the answer.
        """
        text: str = self._ask("assistant_mask.end_of_turn_text")
        return text

    def _ask(self, function: str, *arguments: Any) -> Any:
        messages = arguments[0] if arguments else ()
        turns = sum(message.get("role") == "assistant" for message in messages)
        renderings = 1 + _RENDERINGS_PER_TURN * turns
        more = len(messages) * renderings * _SECONDS_PER_MESSAGE
        limits = Limits(LIMITS.seconds + more, LIMITS.memory, LIMITS.answer)
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
