"""The Jinja environment of chat templates: that of `transformers`, with limits.

Sandboxed and immutable, blocks trimmed, loop controls, `raise_exception`, `strftime_now`, an unescaped
`tojson`, `{% generation %}` as plain text, as templates are written against it. A template comes with a
model, and what it does with a client's messages must end: loops and calls count towards a limit of CPU time,
and no text of it may grow without bound.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

RENDER_LIMIT_S = 5.0  # CPU time
_MOST_CHARACTERS = 32 << 20
_MOST_BITS = 4096
_TICKS_BETWEEN_LOOKS = 256
_WIDE_FORMAT = re.compile(r"\d{5,}")
SHIELD = "flume_shield"
"""Variable with the function that protects texts of clients, where they are protected."""


class NeverEnds(jinja2.TemplateError):
    """The template takes too much time, too deep a recursion or too much memory."""


@contextmanager
def limited(limit_s: float = RENDER_LIMIT_S) -> Iterator[None]:
    """Bound what templates do in the body, in this thread. Raises NeverEnds."""
    _budget.end_s, _budget.ticks = time.thread_time() + limit_s, 0
    try:
        yield
    except RecursionError as error:
        raise NeverEnds("it calls itself without end") from error
    except MemoryError as error:
        raise NeverEnds("it takes too much memory") from error


class _Budget(threading.local):
    end_s = float("inf")
    ticks = 0

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks % _TICKS_BETWEEN_LOOKS == 0 and time.thread_time() > self.end_s:
            raise NeverEnds("it takes too long")


_budget = _Budget()


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.filters[_Limits.LOOP] = _Loop
        self.filters[_Limits.JOIN] = _joined
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join what a macro or a block has written."""
        return str(_bounded("".join(parts)))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = _Limits().visit(super()._parse(source, name, filename))
        template.set_environment(self)
        assert isinstance(template, nodes.Template)
        return template

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _budget.tick()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if (
            operator == "*"
            and _length(left) * _factor(right) + _length(right) * _factor(left) > _MOST_CHARACTERS
        ):
            raise NeverEnds("it makes too long a text")
        if operator == "**" and _bits(left) * _factor(right) > _MOST_BITS:
            raise NeverEnds("it makes too large a number")
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise NeverEnds("it makes too long a text")
        return _bounded(super().call_binop(context, operator, left, right))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _factor(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _bounded(value: Any) -> Any:
    if _length(value) > _MOST_CHARACTERS:
        raise NeverEnds("it makes too long a text")
    return value


class _Limits(NodeTransformer):
    """Puts the limits into a template: around what loops go over, and in place of `~`."""

    LOOP, JOIN = "flume_loop", "flume_joined"

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, self.LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), self.JOIN)


def _filter(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Loop:
    """What a loop goes over, each item counted."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _budget.tick()
            yield item

    def __len__(self) -> int:
        if not isinstance(self._items, Sized):
            raise TypeError("a loop over items that are not counted")
        return len(self._items)


def _joined(parts: list[Any]) -> str:
    return str(_bounded("".join(map(str, parts))))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


@jinja2.pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, this one leaves <, > and & alone."""
    written = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    shield: Callable[[str], str] | None = context.get(SHIELD)
    return written if shield is None else shield(written)
