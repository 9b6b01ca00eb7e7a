"""From token ids to an answer: a weight node is borrowed, called, and its replies made into pieces.

Shared by both front doors. A node that is UNAVAILABLE before it has answered anything is replaced once;
after that, what a client has seen cannot be taken back, and the error is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

import grpc
import msgspec
import structlog
from flume_common.tasks import background
from flume_protos.v1 import weight_pb2 as pb

from flume_router.answer import Answer, Piece
from flume_router.errors import (
    BadRequest,
    CapacityExceeded,
    RouterError,
    WeightNodeFailed,
    WeightNodeLost,
)
from flume_router.tokenizer import Tokenizer
from flume_router.weight_pool import WeightNode, WeightPool

log = structlog.get_logger(__name__)

_ATTEMPTS = 2
_PIECES_AHEAD = 64  # of a slow client, before its weight nodes are held back
_SLACK_S = 1.0  # so that our own deadline, which has the better message, comes first


class SequenceRequest(msgspec.Struct, frozen=True):
    id: str
    prompt_token_ids: Sequence[int]
    sampling: pb.Sampling
    stop: tuple[str, ...]
    deadline_at: float
    """Loop time; the weight node is given what remains."""
    metadata: Mapping[str, str]
    """gRPC metadata of the call."""


async def answer(pool: WeightPool, tokenizer: Tokenizer, request: SequenceRequest) -> AsyncGenerator[Piece]:
    """The last piece, and only that one, is finished. Closing it ends the call. Raises RouterError."""
    growing = Answer(
        tokenizer,
        request.stop,
        prompt_tokens=len(request.prompt_token_ids),
        min_tokens=request.sampling.min_tokens,
    )
    async with contextlib.aclosing(_replies(pool, request)) as replies:
        async for reply in replies:
            piece = growing.push(reply)
            yield piece
            if piece.finished:
                return


async def _replies(pool: WeightPool, request: SequenceRequest) -> AsyncGenerator[pb.GenerateReply]:
    failed: list[str] = []
    while True:
        started = False
        with pool.borrow(exclude=failed) as node:
            try:
                async with contextlib.aclosing(_call(node, request)) as replies:
                    async for reply in replies:
                        started = True
                        yield reply
                return
            except WeightNodeLost as error:
                node.suspect()
                failed.append(node.id)
                log.warning("weight_node_lost", weight_node=node.id, sequence=request.id, detail=str(error))
                if started or len(failed) == _ATTEMPTS:
                    raise


async def _call(node: WeightNode, request: SequenceRequest) -> AsyncGenerator[pb.GenerateReply]:
    remaining_s = request.deadline_at - asyncio.get_running_loop().time()
    call = node.generate(
        pb.GenerateRequest(
            request_id=request.id, prompt_token_ids=request.prompt_token_ids, sampling=request.sampling
        ),
        timeout_s=max(remaining_s, 0.0) + _SLACK_S,
        metadata=tuple(request.metadata.items()),
    )
    try:
        async for reply in call:
            if reply.finish.reason == pb.ABORT:
                raise WeightNodeFailed(node.id, "it aborted the sequence")
            yield reply
            if reply.HasField("finish"):
                return
    except grpc.aio.AioRpcError as error:
        raise error_of(node.id, error) from error
    finally:
        call.cancel()  # frees the KV of a sequence nobody reads any more; does nothing once it is over
    raise WeightNodeFailed(node.id, "the stream ended without a finish")


def error_of(node: str, error: grpc.aio.AioRpcError) -> RouterError:
    """What a failed call to a weight node means to a client."""
    detail = error.details() or error.code().name
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return BadRequest(detail, code="invalid_value")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CapacityExceeded(detail)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # ours would be a CancelledError
            return WeightNodeLost(node, detail)
        case _:
            return WeightNodeFailed(node, f"{error.code().name}: {detail}")


Pieces = AsyncIterator[tuple[int, Piece]]


@contextlib.asynccontextmanager
async def merged(answers: Sequence[AsyncGenerator[Piece]]) -> AsyncIterator[Pieces]:
    """The pieces of several answers as they come, each with its answer's index, until all are finished.

    They run while the body does. The first error of any ends all, and is raised where pieces are taken.
    """
    queue: asyncio.Queue[tuple[int, Piece] | RouterError] = asyncio.Queue(_PIECES_AHEAD)
    async with background(**{f"answer_{i}": _feed(queue, i, one) for i, one in enumerate(answers)}):
        yield _taken(queue, len(answers))


async def _feed(
    queue: asyncio.Queue[tuple[int, Piece] | RouterError], index: int, pieces: AsyncGenerator[Piece]
) -> None:
    try:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                await queue.put((index, piece))
    except RouterError as error:
        await queue.put(error)


async def _taken(queue: asyncio.Queue[tuple[int, Piece] | RouterError], unfinished: int) -> Pieces:
    while unfinished:
        item = await queue.get()
        if isinstance(item, RouterError):
            raise item
        unfinished -= item[1].finished is not None
        yield item
