"""gRPC face of a weight node: decode, submit, stream back. Decisions are the engine's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from flume_common.engine_progress import Activity, Progress, activity_message
from flume_common.failures import FAILURE, Failure
from flume_common.routes import Route, TokenRange
from flume_protos.v1 import weight_pb2 as pb
from flume_protos.v1 import weight_pb2_grpc as rpc

from flume_weight import messages as m
from flume_weight.attachments import layout_of
from flume_weight.errors import RequestRefused
from flume_weight.sampling.params import InvalidSampling, SamplingParams
from flume_weight.sequence_views import SequenceView
from flume_weight.streams import Event, StreamExists
from flume_weight.supervisor import Supervisor

_FINISH = {"stop": pb.STOP, "length": pb.LENGTH, "abort": pb.ABORT}
_MAX_BATCHED_TOKENS = 64  # in one reply, when the reader is slower than the engine


class WeightServicer(rpc.WeightServicer):
    """One per weight node."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateReply],
    ) -> AsyncIterator[pb.GenerateReply]:
        name = request.request_id
        ended = False
        try:
            submit = _decode(request)
            with self._supervisor.streams.listen(name) as events:
                if request.adopt_from:
                    submit.kept = await self._supervisor.kept(name, request.adopt_from)
                self._supervisor.submit(submit)
                try:
                    while not ended:
                        batch = await _next_events(events)
                        last = batch[-1]
                        ended = not isinstance(last, m.Token)
                        if isinstance(last, m.Failed):
                            if batch[:-1]:
                                yield _encode(batch[:-1])
                            raise RequestRefused(last.code, last.message, last.failure)
                        yield _encode(batch)
                finally:
                    if not ended:
                        self._supervisor.cancel(name)
        except StreamExists as error:
            await _abort(context, "ALREADY_EXISTS", str(error))
        except (InvalidSampling, ValueError) as error:
            await _abort(context, "INVALID_ARGUMENT", str(error))
        except RequestRefused as refused:
            await _abort(context, refused.code, str(refused), refused.failure)

    async def Describe(
        self,
        request: pb.DescribeRequest,
        context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.DescribeReply],
    ) -> pb.DescribeReply:
        supervisor, ready = self._supervisor, self._supervisor.ready
        if ready is None:
            await _abort(context, "UNAVAILABLE", f"weight node {supervisor.node} is loading its model")
        return pb.DescribeReply(
            node=supervisor.node,
            model=supervisor.model_name,
            architecture=ready.architecture,
            dtype=ready.dtype,
            vocab_size=ready.vocab_size,
            context_tokens=ready.context_tokens,
            layout=layout_of(ready).to_proto(),
            kv_capacity_tokens=supervisor.capacity_tokens,
        )

    async def ListSequences(
        self,
        request: pb.ListSequencesRequest,
        context: grpc.aio.ServicerContext[pb.ListSequencesRequest, pb.ListSequencesReply],
    ) -> pb.ListSequencesReply:
        supervisor = self._supervisor
        if supervisor.ready is None:
            await _abort(context, "UNAVAILABLE", f"weight node {supervisor.node} is loading its model")
        now_s = time.monotonic()
        return pb.ListSequencesReply(
            sequences=[self._info(view, now_s) for view in supervisor.sequences],
            confirmed_s=_since_a_turn(supervisor.progress),
        )

    async def Status(
        self,
        request: pb.WeightStatusRequest,
        context: grpc.aio.ServicerContext[pb.WeightStatusRequest, pb.WeightStatusReply],
    ) -> pb.WeightStatusReply:
        return status_message(self._supervisor)

    async def Canary(
        self,
        request: pb.CanaryRequest,
        context: grpc.aio.ServicerContext[pb.CanaryRequest, pb.CanaryReply],
    ) -> pb.CanaryReply:
        supervisor = self._supervisor
        if supervisor.ready is None:
            await _abort(context, "UNAVAILABLE", f"weight node {supervisor.node} is loading its model")
        outcome = await supervisor.canary.run(request.timeout_s)
        return pb.CanaryReply(
            node=supervisor.node,
            verdict=outcome.verdict,
            reason=outcome.reason,
            elapsed_s=outcome.elapsed_s,
        )

    def _info(self, view: SequenceView, now_s: float) -> pb.SequenceInfo:
        info = pb.SequenceInfo(
            sequence=view.sequence,
            state=view.stage,
            prompt_tokens=view.prompt_tokens,
            completion_tokens=view.completion_tokens,
            age_s=now_s - view.submitted_s,
            computed_tokens=view.computed_tokens,
        )
        if view.ranges:
            ranges = tuple(TokenRange(item.start, item.end, item.node) for item in view.ranges)
            route = Route(view.sequence, self._supervisor.node, self._supervisor.epoch, ranges)
            info.route.CopyFrom(route.to_proto())
        return info


def status_message(supervisor: Supervisor) -> pb.WeightStatusReply:
    """What the supervisor knows without asking its engine."""
    progress, stages = supervisor.progress, supervisor.sequences.count()
    computed_tokens, total_tokens = supervisor.sequences.prefill()
    reply = pb.WeightStatusReply(
        node=supervisor.node,
        working=supervisor.working,
        queued=stages[m.Stage.QUEUED] + stages[m.Stage.WAITING],
        prefilling=stages[m.Stage.PREFILLING],
        decoding=stages[m.Stage.DECODING],
        paused=stages[m.Stage.PAUSED],
        prefill_computed_tokens=computed_tokens,
        prefill_total_tokens=total_tokens,
    )
    if progress is not None:
        reply.engine.CopyFrom(activity_message(progress))
    return reply


def _since_a_turn(progress: Progress | None) -> float:
    """For how long the engine has not looked at its messages: a step may have moved sequences on."""
    if progress is None:
        return 0.0
    return progress.activity_s if progress.activity is Activity.STEPPING else progress.quiet_s


def _decode(request: pb.GenerateRequest) -> m.Submit:
    """Raises InvalidSampling or ValueError naming the field."""
    if not request.request_id:
        raise ValueError("request_id is empty; it must be unique among live requests")
    sampling = SamplingParams.from_proto(request.sampling).validate()
    if request.output_token_ids and sampling.temperature and sampling.seed is None:
        raise ValueError("output_token_ids need sampling.seed, or the rest would be another answer's")
    return m.Submit(
        request.request_id,
        list(request.prompt_token_ids),
        sampling,
        list(request.output_token_ids),
        suspect=request.engine_crashes > 0,
    )


async def _next_events(events: asyncio.Queue[Event]) -> list[Event]:
    """At least one; more when they are there already, up to and with the one that ends the stream."""
    batch = [await events.get()]
    while isinstance(batch[-1], m.Token) and not events.empty() and len(batch) < _MAX_BATCHED_TOKENS:
        batch.append(events.get_nowait())
    return batch


def _encode(batch: list[Event]) -> pb.GenerateReply:
    reply = pb.GenerateReply()
    for event in batch:
        match event:
            case m.Token():
                reply.token_ids.append(event.token_id)
                if event.logprob is not None:
                    reply.logprobs.append(_logprobs(event))
            case m.Finished():
                reply.finish.reason = _FINISH[event.reason]
                reply.finish.stop_token_id = event.stop_token_id
                reply.finish.prompt_tokens = event.prompt_tokens
                reply.finish.completion_tokens = event.completion_tokens
    return reply


def _logprobs(token: m.Token) -> pb.Logprobs:
    top = [pb.TokenLogprob(token_id=item.token_id, logprob=item.logprob) for item in token.top]
    return pb.Logprobs(chosen=pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob or 0.0), top=top)


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], code: str, message: str, failure: Failure | None = None
) -> NoReturn:
    await context.abort(grpc.StatusCode[code], message, ((FAILURE, failure.value),) if failure else ())
    raise AssertionError("abort returned")
