"""One request to a completion API, from its body to its last byte. The APIs differ by an `Api`.

Until the first piece of an answer is there nothing is sent, so whatever goes wrong before has a proper
status. A client that goes away ends the work at once: its disconnect is watched beside the answer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Protocol

import structlog
from flume_common.tasks import background
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from flume_router.answer import Finished, Piece
from flume_router.errors import RouterError
from flume_router.generation import Pieces, merged
from flume_router.http.body import read_body
from flume_router.http.errors import HttpError, reply_of, unexpected
from flume_router.http.job import Job, Kind
from flume_router.http.reply import Reply
from flume_router.http.shape import Shape, Usage, UsageReporting
from flume_router.in_flight import OpenRequest
from flume_router.sequence_request import SequenceRequest
from flume_router.service import Service, sequences

log = structlog.get_logger(__name__)

_AFTER_DRIPS_S = 1.0  # so that a body that only drips is cut off by its connection before it gets a 408


class Api(Protocol):
    """What differs between the completion APIs."""

    id_prefix: str
    kind: Kind

    def shape(self, service: Service, job: Job, request_id: str, created_s: int) -> Shape: ...


class CompletionEndpoint:
    """An ASGI application for one path."""

    def __init__(self, api: Api, service: Service) -> None:
        self._api = api
        self._service = service
        self._limits = service.door.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, scope["state"])
        try:
            async with self._service.in_flight.request() as opened:
                with self._service.bodies.hold() as held:
                    data = await read_body(
                        Request(scope, receive),
                        held,
                        limit_bytes=self._limits.body_bytes,
                        timeout_s=self._limits.body_timeout_s + _AFTER_DRIPS_S,
                    )
                    async with background(client=_until_gone(receive, reply)):
                        request_id = f"{self._api.id_prefix}-{uuid.uuid4().hex}"
                        structlog.contextvars.bind_contextvars(sequence=request_id)
                        job = await self._service.reader.job(self._api.kind, data)
                        # An answer may take long, and its body may be large.
                        del data
                        held.release()
                        opened.wait()
                        await self._answer(job, request_id, opened, reply)
        except (RouterError, HttpError) as error:
            log.info("request_refused", error=type(error).__name__, detail=str(error))
            self._service.door.refusals.count_error(error)
            await reply.error(reply_of(error))
        except ClientDisconnect:
            log.info("request_abandoned")
        except Exception:
            log.exception("request_failed")
            await reply.error(unexpected())

    async def _answer(self, job: Job, request_id: str, opened: OpenRequest, reply: Reply) -> None:
        usage = Usage(sum(map(len, job.prompts)))
        shape = self._api.shape(self._service, job, request_id, int(time.time()))
        async with merged(self._answers(job, request_id, opened.deadline_at)) as merged_pieces:
            pieces = _noting_start(merged_pieces, opened)
            if job.common.stream:
                await _stream(
                    reply, shape, pieces, usage, at_the_end=job.common.usage is not UsageReporting.NEVER
                )
            else:
                await _whole(reply, shape, pieces, usage, len(job.prompts) * job.common.n)
        log.info(
            "request_answered",
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def _answers(self, job: Job, request_id: str, deadline_at: float) -> list[AsyncGenerator[Piece]]:
        job.common.sampling.max_tokens = job.common.max_tokens or 0
        metadata = {
            "x-request-id": str(structlog.contextvars.get_contextvars().get("request_id", request_id))
        }
        base = SequenceRequest(
            request_id,
            (),
            job.common.sampling,
            job.common.stop,
            deadline_at,
            metadata,
            job.common.skip_special_tokens,
        )
        if job.common.max_tokens == 0:
            return [_nothing(len(prompt)) for prompt in job.prompts for _ in range(job.common.n)]
        return [self._service.generation.answer(one) for one in sequences(base, job.prompts, job.common.n)]


async def _nothing(prompt_tokens: int) -> AsyncGenerator[Piece]:
    """An answer of no tokens: an echo alone."""
    yield Piece("", (), Finished("length", prompt_tokens, 0))


async def _noting_start(pieces: Pieces, opened: OpenRequest) -> Pieces:
    async for piece in pieces:
        opened.started()
        yield piece


async def _stream(reply: Reply, shape: Shape, pieces: Pieces, usage: Usage, *, at_the_end: bool) -> None:
    opened: set[int] = set()
    async for index, piece in pieces:
        if not reply.streaming:
            await reply.start_events()
        if index not in opened:
            opened.add(index)
            for choice in shape.opening(index):
                await reply.event(shape.chunk(choice, usage))
        usage.count(index, piece)
        for choice in shape.choices(index, piece):
            await reply.event(shape.chunk(choice, usage))
    if at_the_end:
        await reply.event(shape.usage_chunk(usage))
    await reply.end_events()


async def _whole(reply: Reply, shape: Shape, pieces: Pieces, usage: Usage, num_answers: int) -> None:
    answers: list[list[Piece]] = [[] for _ in range(num_answers)]
    async for index, piece in pieces:
        answers[index].append(piece)
        usage.count(index, piece)
    await reply.json(shape.whole(answers, usage))


async def _until_gone(receive: Receive, reply: Reply) -> None:
    """Raises ClientDisconnect when the client closes its connection before it has its answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not reply.ended:
        raise ClientDisconnect
