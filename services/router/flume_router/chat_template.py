"""Chat messages into the text a model was trained on, by the model's own Jinja template.

A template that takes content only as parts gets parts, one that takes only text gets the parts' texts on
lines of their own; which it is shows when the template is loaded. Where control tokens are given, texts of
messages are never read as such (`control_tokens.py`).

* ChatTemplateError      base
  + TemplateBroken       the template is not valid Jinja, or does not end; found when it is loaded
  + TemplateRefused      the template does not take these messages (`raise_exception`, a missing field)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import jinja2
import msgspec

from flume_router.control_tokens import ControlTokens, ShieldedText
from flume_router.template_environment import SHIELD, NeverEnds, TemplateEnvironment, limited

Message = Mapping[str, Any]
_PROBE = "flume probe"
_PROBE_LIMIT_S = 2.0
_OWN = ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", SHIELD)


class ChatTemplateError(Exception):
    """Base of what goes wrong with a chat template."""


class TemplateBroken(ChatTemplateError):
    """The template cannot be compiled, with its line in the message, or it never ends."""


class TemplateRefused(ChatTemplateError):
    """The template cannot render these messages; the message is the template's own."""


class Content(Enum):
    """What a template takes as a message's content."""

    TEXT = "text"
    PARTS = "parts"
    EITHER = "either"


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a chat is rendered, beside its messages."""

    add_generation_prompt: bool = True
    """The text ends where the assistant's next answer begins."""

    continue_final_message: bool = False
    """The text ends with the content of the last message, which the answer goes on with."""

    variables: Mapping[str, Any] = {}
    """For the template."""


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token and so on, as the template may name them. Raises TemplateBroken."""
        try:
            self._template = TemplateEnvironment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateBroken(f"chat template, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise TemplateBroken("chat template: it is nested too deeply") from error
        self._source = source
        self._special_tokens = dict(special_tokens)
        try:
            with limited(_PROBE_LIMIT_S):
                self.content = self._probed()
        except NeverEnds as error:
            raise TemplateBroken(f"chat template: with one short message, {error}") from error

    def render(self, messages: Sequence[Message], options: ChatOptions | None = None) -> str:
        """The prompt. Raises TemplateRefused."""
        return self._render(messages, options or ChatOptions(), lambda value: value, None)

    def render_shielded(
        self, messages: Sequence[Message], options: ChatOptions, control: ControlTokens
    ) -> str | ShieldedText:
        """The prompt, in which control tokens are the template's own alone. Raises TemplateRefused."""
        try:
            mark = control.mark_for([*messages, options.variables], self._source)
        except ValueError as error:
            raise TemplateRefused(str(error)) from error
        if mark is None:
            return self.render(messages, options)
        rendered = self._render(
            messages,
            options,
            lambda value: control.shielded(value, mark),
            lambda text: control.shield(text, mark),
        )
        return control.read(rendered, mark)

    def reserves(self, name: str) -> bool:
        """True for a variable that a client may not set."""
        return name in _OWN or name in self._special_tokens or name.startswith("_")

    def _render(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        shielded: Callable[[Any], Any],
        shield: Callable[[str], str] | None,
    ) -> str:
        """`shielded` goes over JSON values, `shield` over texts that the template writes them as."""
        end = _end_of(messages) if options.continue_final_message else ""
        variables = {**shielded(dict(options.variables)), SHIELD: shield}
        add_generation_prompt = options.add_generation_prompt and not options.continue_final_message

        def text_of(given: Sequence[Message]) -> str:
            prepared = [self._prepared(_marked(message, shielded)) for message in given]
            if end:
                prepared[-1] = _ending(prepared[-1], end)
            return self._text(prepared, variables, add_generation_prompt)

        parsed = [_with_parsed_arguments(message) for message in messages]
        try:
            with limited():
                try:
                    text = text_of(parsed)
                except TemplateRefused:
                    if parsed == list(messages):
                        raise
                    # Some templates take the arguments of a call as the JSON text that they came as.
                    text = text_of(messages)
        except NeverEnds as error:
            raise TemplateRefused(str(error)) from error
        return _cut(text, end) if end else text

    def _text(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], prompted: bool) -> str:
        try:
            return self._template.render(
                **{
                    **variables,
                    **self._special_tokens,
                    "messages": messages,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": prompted,
                }
            )
        except NeverEnds:
            raise
        # Whatever a template does wrong with a client's messages is an answer to that client.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise TemplateRefused(str(error)) from error

    def _prepared(self, message: Message) -> dict[str, Any]:
        """A message with its content in the form the template takes."""
        content = message.get("content")
        if isinstance(content, str) and self.content is Content.PARTS:
            content = [{"type": "text", "text": content}]
        elif isinstance(content, list) and self.content is Content.TEXT:
            content = "\n".join(part["text"] for part in content)
        return {**message, "content": content}

    def _probed(self) -> Content:
        as_text = self._shows(_PROBE)
        as_parts = self._shows([{"type": "text", "text": _PROBE}])
        if as_text:
            return Content.EITHER if as_parts else Content.TEXT
        return Content.PARTS if as_parts else Content.TEXT

    def _shows(self, content: str | list[dict[str, str]]) -> bool:
        try:
            text = self._text([{"role": "user", "content": content}], {}, True)
        except TemplateRefused:
            return False
        return _PROBE in text and "'type'" not in text and '"type"' not in text


def _marked(message: Message, shielded: Callable[[Any], Any]) -> dict[str, Any]:
    """All but the role, which is one of a few, and which templates make control tokens of."""
    return {name: value if name == "role" else shielded(value) for name, value in message.items()}


def _with_parsed_arguments(message: Message) -> Message:
    """The arguments of tool calls as objects, as most templates take them, rather than as their JSON."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", {})
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _end_of(messages: Sequence[Message]) -> str:
    """A text that no message has, to find the end of the last one by. Its last space may be trimmed."""
    if not messages or messages[-1].get("role") != "assistant":
        raise TemplateRefused("the last message, which is to be continued, must be the assistant's")
    return f"{secrets.token_hex(16)} "


def _ending(message: dict[str, Any], end: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        last = {**content[-1], "text": content[-1]["text"] + end}
        return {**message, "content": [*content[:-1], last]}
    return {**message, "content": content + end}


def _cut(text: str, end: str) -> str:
    at = text.rfind(end.strip())
    if at < 0:
        raise TemplateRefused("the template does not show the last message, so it cannot be continued")
    # A template that trims content would have trimmed it without our text behind it, too.
    return text[:at] if text.startswith(end, at) else text[:at].rstrip()
