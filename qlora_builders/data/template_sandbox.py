"""jinja2's immutable sandbox with a budget: a template cannot take all time or all memory.

jinja2 keeps a template from Python's internals, but not from loops in loops or from doubling a
string forty times. Here every iteration, call, filter, operator and output is a step, text costs a
step for each 64 characters, and a rendering has a million steps: seconds, and 64 MB of text.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
_CHARACTERS_PER_STEP = 64
_MAX_SIZE = 200_000_000  # of what one function could make: bytes, elements
_PERCENT_WIDTH = re.compile(r"[%)][-+ #0]*(\d*\.)?(\*|\d{7,})")  # after % or %(name)
_BRACE_WIDTH = re.compile(r"\d{7,}|\{")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """`start()` before each rendering. Past the budget it raises `SecurityError`."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._charged, **options)
        self._steps = 0
        self.filters = {name: self._bounded(filter) for name, filter in self.filters.items()}
        self.filters |= {"_counted": self._counted, "_joined": self._joined}

    def start(self) -> None:
        self._steps = 0

    def add_filter(self, name: str, filter: Callable[..., Any]) -> None:
        self.filters[name] = self._bounded(filter)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | list | tuple):  # "x".ljust(width)
            self._check(owner, (*args, *kwargs.values()))
        if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
            for _, _, width, _ in Formatter().parse(owner):
                _check_width(_BRACE_WIDTH, width)
        return self._charged(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_size(200 * left.bit_length() * abs(right))  # digits take that much longer
        elif operator != "+":
            for value, other in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple):
                    self._check(value, (other,))
        if operator == "%":
            _check_width(_PERCENT_WIDTH, left)
        return self._charged(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return template

    def _bounded(self, filter: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 1 + hasattr(filter, "jinja_pass_arg")  # the value, and what comes before it

        @functools.wraps(filter)  # with the mark of filters that take the context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check(args[skipped - 1], (*args[skipped:], *kwargs.values()))
            if filter is do_format:
                _check_width(_PERCENT_WIDTH, args[0])
            return self._charged(filter(*args, **kwargs))

        return bounded

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._charge(0)
            yield item

    def _joined(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        self._charge(sum(map(len, texts)))
        return "".join(texts)

    def _charged(self, value: Any) -> Any:
        self._charge(_length(value))
        return value

    def _charge(self, length: int) -> None:
        self._steps += 1 + length // _CHARACTERS_PER_STEP
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps for one conversation")

    def _check(self, value: Any, arguments: Iterable[Any]) -> None:
        """Before a function makes more of `value`: replaces, repeats, pads it."""
        factor = sum(abs(x) if isinstance(x, int) else _length(x) for x in arguments)
        self._check_size((_length(value) + 1) * (factor + 1))

    def _check_size(self, size: int) -> None:
        if size > _MAX_SIZE:
            raise SecurityError(f"it could make something of size {size:.0e}")


class _Counting(NodeTransformer):
    """Loops count their iterations, `~` the text that it makes."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.Tuple(node.nodes, "load", lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


def _check_width(pattern: re.Pattern[str], text: Any) -> None:
    if isinstance(text, str) and pattern.search(text):
        raise SecurityError("it formats text to a width of millions, or of an argument")


def _length(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()  # numbers of a million digits are slow
    return len(value) if isinstance(value, str | list | tuple | dict) else 0
