"""Chat templates: jinja2 in a sandbox, with what templates of Hugging Face expect.

A template comes with a checkpoint, so it is untrusted code. jinja2's sandbox keeps it from Python's
internals, the limits of the process from taking all time and memory, also while it is compiled. The
environment offers the extras that published templates use: `raise_exception`, `strftime_now`, a
plain `tojson`, loop controls and the `{% generation %}` tag, which marks an assistant's text.
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

from qlora_builders.confined.wire import Message, Span
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
