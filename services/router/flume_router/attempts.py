"""The replies to one sequence, from as many weight nodes as it takes.

A node that goes away, or falls silent, is followed by another, or by itself when it is back, which is
told what the client has already: so no token comes twice and none is missing. Each token counts as had
from the moment it is taken from a call; what the abandoned call would still bring is never read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import grpc
import structlog
from flume_common.backoff import Backoff
from flume_common.failures import Failure, failure_in
from flume_protos.v1 import weight_pb2 as pb

from flume_router.errors import (
    BadRequest,
    CapacityExceeded,
    EngineCrashed,
    NoLane,
    NotContinued,
    NotYet,
    NoWeightNode,
    RouterError,
    SequenceFailed,
    WeightNodeFailed,
    WeightNodeLost,
    WeightNodeSilent,
)
from flume_router.progress import Progress, Reason, ResumeCounts, ResumeLimits, seeded
from flume_router.sequence_request import SequenceRequest
from flume_router.weight_node import WeightNode
from flume_router.weight_pool import WeightPool

log = structlog.get_logger(__name__)

_SLACK_S = 1.0  # so that our own deadline, which has the better message, comes first
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_LOOK_EVERY_S = 1.0
_COMING_S = 5.0  # from READY to the first answer to us


class Attempts:
    """Of one sequence."""

    def __init__(
        self, pool: WeightPool, request: SequenceRequest, limits: ResumeLimits, counts: ResumeCounts
    ) -> None:
        self._pool = pool
        self._request = request
        self._counts = counts
        self._new_until_s = _now_s() + limits.unavailable_s
        self._progress = Progress(
            pb.GenerateRequest(
                request_id=request.id,
                prompt_token_ids=request.prompt_token_ids,
                sampling=seeded(request.sampling),
            ),
            limits,
        )

    async def replies(self) -> AsyncGenerator[pb.GenerateReply]:
        """The last one, and only that, carries `finish`. Closing it ends the call. Raises RouterError."""
        pauses = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        while True:
            await self._lendable()
            with self._pool.borrow() as node:
                try:
                    async with contextlib.aclosing(self._attempt(node)) as replies:
                        async for reply in replies:
                            pauses.reset()
                            yield reply
                    return
                except WeightNodeLost as error:
                    node.suspect()
                    if isinstance(error, EngineCrashed) and self._progress.crashed():
                        raise self._refused(node, error) from error
                    self._lost(node, error)
                except NoLane as error:
                    node.suspect()
                    self._unserved(node, error)
                except NotYet as error:
                    self._not_yet(node, error)
                except CapacityExceeded as error:
                    # It fitted before it was interrupted: attention nodes are still being attached there.
                    if self._progress.lost_at_s is None:
                        raise
                    self._not_yet(node, error)
            await asyncio.sleep(pauses.next_s())

    async def _lendable(self) -> None:
        """Wait until there is a weight node to try. Raises NoWeightNode, NotContinued."""
        if not self._pool.known and not self._progress.why:
            raise NoWeightNode(self._pool.model, self._pool.why_not)
        until_s = _now_s() + self._progress.remaining_s(_now_s())
        if self._progress.is_new:
            until_s = self._new_until_s
        while not self._pool.lendable:
            if not self._progress.is_new and self._pool.preparing:  # the request's own deadline counts
                until_s = max(until_s, _now_s() + _COMING_S)
            if (left_s := until_s - _now_s()) <= 0:
                raise self._given_up()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._pool.changed(), min(left_s, _LOOK_EVERY_S))

    async def _attempt(self, node: WeightNode) -> AsyncGenerator[pb.GenerateReply]:
        resuming = self._progress.lost_at_s is not None
        call = node.generate(
            self._progress.next_request(),
            timeout_s=max(self._request.deadline_at - _now_s(), 0.0) + _SLACK_S,
            metadata=tuple(self._request.metadata.items()),
        )
        had_tokens = False
        try:
            while (reply := await node.read(call)) is not None:
                if reply.finish.reason == pb.ABORT:
                    raise WeightNodeFailed(node.id, "it aborted the sequence")
                if resuming:
                    self._resumed(node)
                    resuming = False
                self._progress.took(reply)
                if had_tokens and reply.token_ids:  # all but the first take what attention nodes hold
                    node.canary.proved()
                had_tokens = had_tokens or bool(reply.token_ids)
                yield reply
                if reply.HasField("finish"):
                    return
        except grpc.aio.AioRpcError as error:
            raise error_of(node.id, error) from error
        finally:
            call.cancel()  # frees the KV of a sequence nobody reads any more; does nothing once it is over
        raise WeightNodeFailed(node.id, "the stream ended without a finish")

    def _resumed(self, node: WeightNode) -> None:
        progress, lost_at_s = self._progress, self._progress.lost_at_s
        self._counts.resumed += 1
        log.info(
            "sequence_resumed",
            request=self._request.id,
            to=node.id,
            tokens_so_far=len(progress.token_ids),
            elapsed_ms=round((_now_s() - (lost_at_s or 0.0)) * 1000, 1),
            resumed_total=self._counts.resumed,
            **{"from": progress.lost_node},
        )

    def _lost(self, node: WeightNode, error: WeightNodeLost) -> None:
        reason: Reason = "lost"
        lost_at_s = _now_s()
        if isinstance(error, WeightNodeSilent):
            reason = "silent"
            lost_at_s -= error.silence_s
        self._progress.lost(node.id, str(error), lost_at_s, node.quiet_since_s)
        self._count(reason, node, error)

    def _refused(self, node: WeightNode, error: EngineCrashed) -> SequenceFailed:
        self._counts.failed += 1
        crashes = self._progress.crashes_in_a_row
        log.error("sequence_ends_engines", request=self._request.id, engines=crashes, detail=str(error))
        return SequenceFailed(
            node.id,
            Failure.ENGINE_CRASHED,
            f"{crashes} engines in a row ended in a step of this request; it is not tried again ({error})",
        )

    def _unserved(self, node: WeightNode, error: NoLane) -> None:
        """A new sequence has waited there already. Raises NoWeightNode when no other node is left for it."""
        if not self._progress.is_new:
            self._not_yet(node, error)
            return
        self._progress.why = str(error)
        if not self._pool.lendable and _now_s() >= self._new_until_s:
            raise self._given_up() from error

    def _not_yet(self, node: WeightNode, error: RouterError) -> None:
        self._progress.not_yet(str(error), _now_s())
        self._count("not_yet", node, error)

    def _count(self, reason: Reason, node: WeightNode, error: RouterError) -> None:
        """Raises NotContinued when this was the last attempt."""
        if self._progress.remaining_s(_now_s()) <= 0:
            raise self._given_up() from error
        self._counts.retries[reason] += 1
        log.warning(
            "sequence_interrupted",
            request=self._request.id,
            weight_node=node.id,
            reason=reason,
            tokens_so_far=len(self._progress.token_ids),
            detail=str(error),
        )

    def _given_up(self) -> NoWeightNode | NotContinued:
        progress, tokens = self._progress, len(self._progress.token_ids)
        self._counts.failed += 1
        log.error("sequence_given_up", request=self._request.id, tokens_so_far=tokens, detail=progress.why,
                  failed_total=self._counts.failed)  # fmt: skip
        if progress.is_new:
            known = [progress.why] if progress.why else []
            return NoWeightNode(self._pool.model, self._pool.why_not or known)
        return NotContinued(self._pool.model, progress.why, tokens)


def error_of(node: str, error: grpc.aio.AioRpcError) -> RouterError:
    """What a failed call to a weight node means to a client."""
    detail = error.details() or error.code().name
    failure = failure_in(error.trailing_metadata())
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return BadRequest(detail, code="invalid_value")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CapacityExceeded(detail)
        case grpc.StatusCode.ALREADY_EXISTS:
            return NotYet(node, detail)
        case grpc.StatusCode.UNAVAILABLE if failure is Failure.ENGINE_CRASHED:
            return EngineCrashed(node, detail)
        case grpc.StatusCode.UNAVAILABLE if failure is Failure.NO_LANE:
            return NoLane(node, detail)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:  # ours would be a CancelledError
            return WeightNodeLost(node, detail)
        case grpc.StatusCode.UNKNOWN if detail.startswith(
            "Stream removed"
        ):  # a lost connection, now and then
            return WeightNodeLost(node, detail)
        case grpc.StatusCode.INTERNAL if failure is not None:
            return SequenceFailed(node, failure, detail)
        case _:
            return WeightNodeFailed(node, f"{error.code().name}: {detail}")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
