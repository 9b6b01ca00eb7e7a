"""gRPC face of the router: decode, ask, encode. What it decides is in `service.py` and `generation.py`."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import TypeAlias

import grpc
import structlog
from flume_common.serving import status_errors
from flume_protos.v1 import router_pb2 as pb
from flume_protos.v1 import router_pb2_grpc as rpc
from flume_protos.v1 import weight_pb2

from flume_router.answer import Piece
from flume_router.errors import (
    BadRequest,
    CapacityExceeded,
    DeadlineExceeded,
    InternalError,
    ModelNotFound,
    ReaderFailed,
    RouterError,
    Unavailable,
    WeightNodeFailed,
)
from flume_router.sequence_request import SequenceRequest
from flume_router.service import Service

log = structlog.get_logger(__name__)

SERVICE = "flume.v1.Router"
STATUS_OF: Mapping[type[Exception], grpc.StatusCode] = {
    CapacityExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    InternalError: grpc.StatusCode.INTERNAL,
    WeightNodeFailed: grpc.StatusCode.INTERNAL,
    ReaderFailed: grpc.StatusCode.INTERNAL,
}
Context: TypeAlias = "grpc.aio.ServicerContext[pb.GenerateTextRequest, pb.GenerateTextReply]"
_FINISH = {"stop": weight_pb2.STOP, "length": weight_pb2.LENGTH}


class RouterServicer(rpc.RouterServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, request: pb.GenerateTextRequest, context: Context
    ) -> AsyncIterator[pb.GenerateTextReply]:
        request_id = f"gen-{uuid.uuid4().hex}"
        context.set_trailing_metadata((("x-request-id", request_id),))  # also where there is no reply
        async with (
            status_errors(context, STATUS_OF),
            _logged(request_id),
            self._service.in_flight.request() as opened,
        ):
            sequence = await self._sequence(request, request_id, opened.deadline_at)
            opened.wait()
            async with contextlib.aclosing(self._service.generation.answer(sequence)) as pieces:
                async for piece in pieces:
                    opened.started()
                    yield encode(piece, request_id)

    async def _sequence(
        self, request: pb.GenerateTextRequest, request_id: str, deadline_at: float
    ) -> SequenceRequest:
        if request.model:
            self._service.require_model(request.model)
        if not all(request.stop):
            raise BadRequest("stop: a stop string must not be empty", param="stop")
        with self._service.bodies.hold() as held:
            held.add(request.ByteSize())
            prompt = await self._service.reader.grpc_prompt(request)
        self._service.limits.check_sampling(request.sampling)
        return SequenceRequest(
            request_id,
            prompt,
            request.sampling,
            tuple(request.stop),
            deadline_at,
            {"x-request-id": request_id},
        )


def encode(piece: Piece, request_id: str) -> pb.GenerateTextReply:
    """One reply per piece."""
    reply = pb.GenerateTextReply(
        text=piece.text, token_ids=[token.id for token in piece.tokens], request_id=request_id
    )
    if piece.finished:
        reply.finish.reason = _FINISH[piece.finished.reason]
        reply.finish.prompt_tokens = piece.finished.prompt_tokens
        reply.finish.completion_tokens = piece.finished.completion_tokens
    return reply


@contextlib.asynccontextmanager
async def _logged(request_id: str) -> AsyncIterator[None]:
    with structlog.contextvars.bound_contextvars(request_id=request_id, sequence=request_id):
        try:
            yield
        except RouterError as error:
            log.info("request_refused", error=type(error).__name__, detail=str(error))
            raise
        except Exception as error:
            log.exception("request_failed")
            raise InternalError("Answering the request", error) from error
        log.info("request_answered")
