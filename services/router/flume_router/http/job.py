"""The body of a completion request, made into what is to be generated. No I/O, no waiting, for any process.

Two steps, as the second is work that lets other threads run: `draft` reads JSON, checks the fields and
renders a chat; `finish` makes token ids. Both raise RouterError, `draft` also HttpError.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec

from flume_router.control_tokens import ShieldedText
from flume_router.errors import ModelNotFound
from flume_router.http.errors import HttpError
from flume_router.http.sampling import Common
from flume_router.http.schema import read_chat, read_completion
from flume_router.prompts import ModelLimits, Prompt, Prompts

_NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
    "library correctly. This API expects a JSON payload, but what was sent was not valid JSON.)"
)


class Kind(StrEnum):
    """Which completion API."""

    CHAT = "chat"
    COMPLETION = "completion"

    @property
    def param(self) -> str:
        """The field that holds the prompt."""
        return "messages" if self is Kind.CHAT else "prompt"


class Draft(msgspec.Struct, frozen=True):
    """A request whose fields are right."""

    kind: Kind
    common: Common
    prompts: tuple[Prompt, ...]
    echo: bool = False

    @property
    def characters(self) -> int:
        """Of text that is to be tokenised."""
        texts = (p.text if isinstance(p, ShieldedText) else p for p in self.prompts)
        return sum(len(text) for text in texts if isinstance(text, str))


class Job(msgspec.Struct, frozen=True):
    """What is to be generated."""

    common: Common
    prompts: tuple[Sequence[int], ...]
    echoes: tuple[str, ...] = ()
    """For each prompt; empty where none is wanted."""


def draft(kind: Kind, data: bytes, prompts: Prompts, limits: ModelLimits | None) -> Draft:
    """`limits`: None while they are not known; then nothing is refused for its length."""
    body = decode_object(data)
    drafted = _chat(body, prompts, limits) if kind is Kind.CHAT else _completion(body, prompts)
    for prompt in drafted.prompts:
        prompts.check_floor(prompt, drafted.common.max_tokens, limits, kind.param)
    return drafted


def _chat(body: dict[str, Any], prompts: Prompts, limits: ModelLimits | None) -> Draft:
    request = read_chat(body, at_most=limits.context_tokens if limits else None)
    _require_model(request.common, prompts)
    return Draft(Kind.CHAT, request.common, (prompts.render(request.messages, request.options),))


def _completion(body: dict[str, Any], prompts: Prompts) -> Draft:
    request = read_completion(body)
    _require_model(request.common, prompts)
    return Draft(Kind.COMPLETION, request.common, request.prompts, request.echo)


def _require_model(common: Common, prompts: Prompts) -> None:
    if common.model != prompts.model:
        raise ModelNotFound(common.model, prompts.model)


def finish(draft: Draft, prompts: Prompts, limits: ModelLimits | None) -> Job:
    """The job of a draft; the first prompt that is too long ends it."""
    if limits is not None:
        limits.check_sampling(draft.common.sampling)
    ids = []
    for prompt in draft.prompts:
        encoded = prompts.encode(prompt, rendered=draft.kind is Kind.CHAT)
        if limits is not None:
            limits.check_prompt(encoded, draft.kind.param)
            limits.check_length(len(encoded), draft.common.max_tokens, draft.kind.param)
        ids.append(encoded)
    skip = draft.common.skip_special_tokens
    texts = (prompts.as_text(prompt, skip_special_tokens=skip) for prompt in draft.prompts)
    echoes = tuple(texts) if draft.echo else ()
    return Job(draft.common, tuple(ids), echoes)


def decode_object(data: bytes) -> dict[str, Any]:
    """Raises HttpError, 400, for what is no JSON object."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise HttpError(400, _NOT_JSON) from error
    if not isinstance(value, dict):
        raise HttpError(400, "The JSON body of a request must be an object.")
    return value
