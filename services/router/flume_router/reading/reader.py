"""Decides where a request is read: in the event loop, in a thread, or in a worker process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from flume_protos.v1 import router_pb2

from flume_router.errors import ReaderFailed
from flume_router.http import job as jobs
from flume_router.prompts import ModelLimits, Prompts, read_grpc
from flume_router.reading import frames
from flume_router.reading.workers import Workers

LARGE_BYTES = 16 << 10
"""Requests from this size on go to a worker: as many messages take 10 ms to check and render."""

_LONG_CHARACTERS = 2048  # about a millisecond of tokenising, which a thread can do beside the loop


class Model(Protocol):
    """What is known of the served model; a `WeightPool`."""

    @property
    def limits(self) -> ModelLimits:
        """Raises NoWeightNode."""

    @property
    def known_limits(self) -> ModelLimits | None:
        """None where `limits` would raise."""


class RequestReader:
    """Made once per router."""

    def __init__(self, prompts: Prompts, workers: Workers, model: Model) -> None:
        self._prompts = prompts
        self._workers = workers
        self._model = model

    async def job(self, kind: jobs.Kind, data: bytes) -> jobs.Job:
        """What a body asks for. Raises RouterError, HttpError."""
        if len(data) < LARGE_BYTES:
            return await self._small(kind, data)
        reply = await self._large(kind, data)
        if not isinstance(reply, frames.JobRead):
            raise ReaderFailed(f"unexpected {type(reply).__name__}")
        return frames.job_of(reply)

    async def grpc_prompt(self, request: router_pb2.GenerateTextRequest) -> Sequence[int]:
        """Token ids of a gRPC request's prompt. Raises RouterError."""
        size = request.ByteSize()
        if size < _LONG_CHARACTERS:
            return read_grpc(request, self._prompts, self._model.limits)
        if size < LARGE_BYTES:
            return await asyncio.to_thread(read_grpc, request, self._prompts, self._model.limits)
        reply = await self._large("grpc", request.SerializeToString())
        if not isinstance(reply, frames.PromptRead):
            raise ReaderFailed(f"unexpected {type(reply).__name__}")
        return frames.unpack_ids(reply.prompt)

    async def _small(self, kind: jobs.Kind, data: bytes) -> jobs.Job:
        draft = jobs.draft(kind, data, self._prompts, self._model.known_limits)
        limits = self._model.limits
        if draft.characters < _LONG_CHARACTERS:
            return jobs.finish(draft, self._prompts, limits)
        return await asyncio.to_thread(jobs.finish, draft, self._prompts, limits)

    async def _large(self, kind: str, data: bytes) -> frames.Reply:
        reply = await self._workers.run(frames.Task(kind, self._model.limits, data))
        match reply:
            case frames.Refused() | frames.RefusedModel() | frames.RefusedHttp():
                raise frames.error_of(reply)
            case frames.Failed():
                raise ReaderFailed(reply.why)
            case _:
                return reply
