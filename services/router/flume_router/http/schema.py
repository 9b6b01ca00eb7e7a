"""What a client may ask for: JSON bodies of the two completion APIs into requests.

Every field is read, refused by name or known to be harmless; nothing is silently dropped that would
change the answer. Raises BadRequest with OpenAI's wording, `param` and `code`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from flume_router.chat_template import ChatOptions, Message
from flume_router.errors import BadRequest
from flume_router.http import fields
from flume_router.http.fields import Object, take
from flume_router.http.sampling import COMMON_FIELDS, MAX_SEQUENCES, Common, read_common

_INT32_MAX = 2**31 - 1
_COMPLETION_MAX_TOKENS = 16  # OpenAI's default; chats have none
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_UNSUPPORTED_ROLES = ("function",)
_ASSISTANTS_FIELDS = ("tool_calls", "reasoning_content", "reasoning")
Prompt = str | tuple[int, ...]


class ChatRequest(msgspec.Struct, frozen=True):
    common: Common
    messages: tuple[Message, ...]
    options: ChatOptions


class CompletionRequest(msgspec.Struct, frozen=True):
    common: Common
    prompts: tuple[Prompt, ...]
    echo: bool


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value == harmless and type(value) is type(harmless) for harmless in values)


def _any(_value: Any) -> bool:
    return True


_HARMLESS_CHAT: Mapping[str, Callable[[Any], bool]] = {
    "audio": _is(),
    "function_call": _is("none", "auto"),
    "functions": _is([]),
    "metadata": lambda value: isinstance(value, dict),
    "modalities": _is(["text"], []),
    "moderation": _is(),
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "prediction": _is(),
    "prompt_cache_key": lambda value: isinstance(value, str),
    "prompt_cache_options": lambda value: isinstance(value, dict),
    "prompt_cache_retention": lambda value: isinstance(value, str),
    "reasoning_effort": _is("none"),
    "response_format": _is({"type": "text"}),
    "safety_identifier": lambda value: isinstance(value, str),
    "service_tier": _is("auto", "default"),
    "store": _is(False),
    "verbosity": _is("medium"),
    "web_search_options": _is(),
}
_HARMLESS_COMPLETION: Mapping[str, Callable[[Any], bool]] = {"suffix": _is("")}
_HARMLESS_MESSAGE: Mapping[str, Callable[[Any], bool]] = {
    "annotations": _is([]),
    "audio": _is(),
    "function_call": _is(),
    "refusal": _is(""),
}
_CHAT_FIELDS = COMMON_FIELDS | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs",
    "add_generation_prompt", "continue_final_message", *_HARMLESS_CHAT,
}  # fmt: skip
_COMPLETION_FIELDS = COMMON_FIELDS | {"prompt", "echo", "best_of", *_HARMLESS_COMPLETION}
_MESSAGE_FIELDS = {"role", "content", "name", "tool_call_id", *_ASSISTANTS_FIELDS, *_HARMLESS_MESSAGE}


def read_chat(body: Object, *, at_most: int | None = None) -> ChatRequest:
    """POST /v1/chat/completions. `at_most`: messages, and parts of one; None: any number."""
    fields.refuse_unknown(body, _CHAT_FIELDS)
    common = read_common(body, max_tokens=_chat_max_tokens(body), logprobs=_chat_logprobs(body))
    messages = fields.require(body, "messages", lambda value, param: _messages(value, param, at_most))
    fields.refuse_unsupported(body, _HARMLESS_CHAT)
    _check_tools(body)
    return ChatRequest(common, messages, _options(body))


def _check_tools(body: Object) -> None:
    """Tools may be offered if they are not to be called: their calls would not be told from text."""
    tools = take(body, "tools", fields.array, [])
    for index, tool in enumerate(tools):
        fields.obj(tool, f"tools[{index}]")
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto") or (tools and choice != "none"):
        raise BadRequest(
            "Unsupported parameter: 'tools' are supported by this server with 'tool_choice' \"none\" only.",
            param="tools" if tools else "tool_choice",
            code="unsupported_parameter",
        )


def _options(body: Object) -> ChatOptions:
    goes_on = take(body, "continue_final_message", fields.boolean, False)
    prompted = take(body, "add_generation_prompt", fields.boolean, not goes_on)
    if goes_on and prompted:
        raise fields.combination(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.",
            "continue_final_message",
        )
    return ChatOptions(
        add_generation_prompt=prompted,
        continue_final_message=goes_on,
        variables=take(body, "chat_template_kwargs", fields.obj, {}),
    )


def read_completion(body: Object) -> CompletionRequest:
    """POST /v1/completions."""
    fields.refuse_unknown(body, _COMPLETION_FIELDS)
    echo = take(body, "echo", fields.boolean, False)
    # An echo may be all that is wanted.
    max_tokens = take(body, "max_tokens", fields.integer(0 if echo else 1), _COMPLETION_MAX_TOKENS)
    logprobs = take(body, "logprobs", fields.integer(0, 5), None)
    common = read_common(body, max_tokens=max_tokens, logprobs=logprobs)
    prompts = fields.require(body, "prompt", _prompts)
    fields.refuse_unsupported(body, _HARMLESS_COMPLETION)
    if echo and logprobs is not None:
        raise fields.combination("'echo' together with 'logprobs' is not supported by this server.", "echo")
    _check_counts(body, common.n, len(prompts))
    return CompletionRequest(common, prompts, echo)


def _check_counts(body: Object, n: int, num_prompts: int) -> None:
    best_of = take(body, "best_of", fields.integer(1), n)
    if best_of != n:
        raise fields.combination(
            f"'best_of' ({fields.shown(best_of)}) other than 'n' ({n}) is not supported by this server.",
            "best_of",
        )
    if n * num_prompts > MAX_SEQUENCES:
        raise fields.combination(
            f"{num_prompts} prompts times n = {n} exceed the {MAX_SEQUENCES} answers of one request.", "n"
        )


def _chat_max_tokens(body: Object) -> int | None:
    read = fields.integer(1)
    old, new = take(body, "max_tokens", read, None), take(body, "max_completion_tokens", read, None)
    if old is not None and new is not None and old != new:
        raise fields.combination(
            "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
            "max_tokens",
        )
    return old if new is None else new


def _chat_logprobs(body: Object) -> int | None:
    wanted = take(body, "logprobs", fields.boolean, False)
    top = take(body, "top_logprobs", fields.integer(0, 20), None)
    if top is not None and not wanted:
        raise fields.combination(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", "top_logprobs"
        )
    return (top or 0) if wanted else None


def _messages(value: Any, param: str, at_most: int | None) -> tuple[Message, ...]:
    listed = fields.array(value, param, at_least=1, at_most=at_most)
    return tuple(
        _message(fields.obj(item, f"{param}[{i}]"), f"{param}[{i}].", at_most)
        for i, item in enumerate(listed)
    )


def _message(message: Object, path: str, at_most: int | None) -> Message:
    fields.refuse_unknown(message, _MESSAGE_FIELDS, path)
    role = _role(message, path)
    fields.refuse_unsupported(message, _HARMLESS_MESSAGE, path)
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""  # of one that only called tools, say; templates want a text
    read: dict[str, Any] = {"role": role, "content": _content(content, f"{path}content", at_most)}
    for name in ("name", *(("tool_call_id",) if role == "tool" else ())):
        if message.get(name) is not None:
            read[name] = fields.string(message[name], f"{path}{name}")
    return read | (_assistants(message, path) if role == "assistant" else _none_of_those(message, path))


def _assistants(message: Object, path: str) -> dict[str, Any]:
    """What only assistants have beside content. vLLM calls `reasoning` what it called reasoning_content."""
    read: dict[str, Any] = {}
    for name in ("reasoning_content", "reasoning"):
        if message.get(name) is not None:
            read["reasoning_content"] = fields.string(message[name], f"{path}{name}")
    if calls := message.get("tool_calls"):
        param = f"{path}tool_calls"
        listed = fields.array(calls, param)
        read["tool_calls"] = [_tool_call(call, f"{param}[{i}]") for i, call in enumerate(listed)]
    if message.get("tool_call_id") is not None:
        raise _not_for("tool_call_id", "assistant", path)
    return read


def _none_of_those(message: Object, path: str) -> dict[str, Any]:
    role = message["role"]
    for name in (*_ASSISTANTS_FIELDS, *(() if role == "tool" else ("tool_call_id",))):
        if message.get(name) not in (None, []):
            raise _not_for(name, role, path)
    return {}


def _not_for(name: str, role: str, path: str) -> BadRequest:
    return BadRequest(
        f"Unsupported parameter: '{path}{name}' is not supported in messages with role '{role}'.",
        param=f"{path}{name}",
        code="unsupported_parameter",
    )


def _tool_call(value: Any, param: str) -> dict[str, Any]:
    """As it is, as templates read what they like of it; checked where they do."""
    call = fields.obj(value, param)
    function = fields.obj(call.get("function"), f"{param}.function")
    fields.string(function.get("name"), f"{param}.function.name")
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        fields.string("" if arguments is None else arguments, f"{param}.function.arguments")
    return dict(call)


def _role(message: Object, path: str) -> str:
    param = f"{path}role"
    if "role" not in message:
        raise BadRequest(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    role = fields.string(message["role"], param)
    if role in _ROLES:
        return _ROLES[role]
    supported = ", ".join(f"'{name}'" for name in _ROLES)
    code = "unsupported_value" if role in _UNSUPPORTED_ROLES else "invalid_value"
    raise BadRequest(
        f"Invalid value: '{fields.shown(role)}'. Supported values are: {supported}.", param=param, code=code
    )


def _content(value: Any, param: str, at_most: int | None) -> str | list[dict[str, str]]:
    """A text, or parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return fields.string(value, param)  # raises, naming what it got
    parts = fields.array(value, param, at_least=1, at_most=at_most)
    return [
        {"type": "text", "text": _text_part(part, f"{param}[{index}]")} for index, part in enumerate(parts)
    ]


def _text_part(value: Any, param: str) -> str:
    part = fields.obj(value, param)
    kind = fields.string(part.get("type"), f"{param}.type")
    if kind != "text":
        raise BadRequest(
            f"Content of type '{fields.shown(kind)}' is not supported by this server; 'text' is.",
            param=f"{param}.type",
            code="unsupported_value",
        )
    fields.refuse_unknown(part, ("type", "text", "prompt_cache_breakpoint"), f"{param}.")
    return fields.string(part.get("text"), f"{param}.text")


def _prompts(value: Any, param: str) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of either kind."""
    if isinstance(value, str):
        return (value,)
    listed = fields.array(value, param, at_least=1)
    if isinstance(listed[0], int):
        return (_token_ids(listed, param),)
    if isinstance(listed[0], str):
        return tuple(fields.string(text, f"{param}[{index}]") for index, text in enumerate(listed))
    return tuple(_token_ids(ids, f"{param}[{index}]") for index, ids in enumerate(listed))


def _token_ids(value: Any, param: str) -> tuple[int, ...]:
    listed = fields.array(value, param, at_least=1)
    # One by one, with its path, only where one is wrong: there may be a million.
    if not all(type(token) is int and 0 <= token <= _INT32_MAX for token in listed):
        read = fields.integer(0, _INT32_MAX)
        for index, token in enumerate(listed):
            read(token, f"{param}[{index}]")
    return tuple(listed)
