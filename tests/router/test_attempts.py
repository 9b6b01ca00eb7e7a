"""Whatever happens to the weight nodes, the answer is the undisturbed one. Nodes in memory, many of them."""

from contextlib import contextmanager

import grpc
import hypothesis.strategies as st
import pytest
from flume_protos.v1 import weight_pb2 as pb
from flume_router import attempts
from flume_router.detokenizer import Detokenizer
from flume_router.errors import (
    CapacityExceeded,
    EngineCrashed,
    InternalError,
    NoLane,
    NotContinued,
    NotYet,
    NoWeightNode,
    SequenceFailed,
    WeightNodeFailed,
    WeightNodeLost,
    WeightNodeSilent,
)
from flume_router.generation import Generation
from flume_router.progress import ResumeLimits
from flume_router.sequence_request import SequenceRequest
from hypothesis import given, settings

ENDS = {
    "lost": lambda: WeightNodeLost("n", "gone"),
    "silent": lambda: WeightNodeSilent("n", 1.0),
    "crashed": lambda: EngineCrashed("n", "its engine ended"),
    "not_yet": lambda: NotYet("n", "busy"),
    "capacity": lambda: CapacityExceeded("needs 9 of 8 blocks"),
}


class Call:
    def __init__(self, replies):
        self.replies = iter(replies)
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


class Node:
    """Deterministic: the answer to a prompt is `ids`, however often it is begun."""

    def __init__(self, pool):
        self.id = f"n{len(pool.requests)}"
        self.pool = pool
        self.quiet_since_s = 0.0
        self.canary = self

    def proved(self):
        self.pool.num_proofs += 1

    def generate(self, request, *, timeout_s, metadata):
        self.pool.requests.append(request)
        self.pool.calls.append(Call(self._replies(request)))
        return self.pool.calls[-1]

    def _replies(self, request):
        ids, had = self.pool.ids, len(request.output_token_ids)
        assert list(request.output_token_ids) == ids[:had]
        tokens, size, end = self.pool.deaths.pop(0) if self.pool.deaths else (len(ids), 1, None)
        until = min(had + tokens, len(ids))
        for at in range(had, until, size):
            yield reply_of(ids[at : min(at + size, until)])
        if end:
            raise ENDS[end]()
        finish = pb.Finish(reason=pb.STOP, prompt_tokens=1, completion_tokens=len(ids) + 1)
        yield pb.GenerateReply(finish=finish)

    async def read(self, call):
        return next(call.replies, None)

    def suspect(self):
        self.pool.suspected.append(self.id)


def reply_of(ids):
    logprobs = [pb.Logprobs(chosen=pb.TokenLogprob(token_id=i, logprob=-i)) for i in ids]
    return pb.GenerateReply(token_ids=ids, logprobs=logprobs)


class Pool:
    model = "m"
    known = lendable = True

    def __init__(self, ids, deaths):
        self.ids, self.deaths = ids, list(deaths)
        self.requests, self.calls, self.suspected = [], [], []
        self.why_not, self.preparing, self.num_proofs = [], False, 0

    @contextmanager
    def borrow(self):
        yield Node(self)


async def run(tokenizer, pool, stops=(), **limits):
    generation = Generation(pool, tokenizer, ResumeLimits(**limits))
    request = SequenceRequest("r", [1], pb.Sampling(temperature=1), tuple(stops), 1e9, {})
    pieces = [piece async for piece in generation.answer(request)]
    return pieces, generation.counts


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(attempts, "_FIRST_PAUSE_S", 0.0)


deaths = st.lists(
    st.tuples(st.integers(0, 8), st.integers(1, 4), st.sampled_from(sorted(set(ENDS) - {"capacity"}))),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 49151), max_size=40),
    stops=st.lists(st.text("aeiou tn", min_size=1, max_size=3), max_size=2),
    deaths=deaths,
)
async def test_however_often_nodes_die_the_answer_is_the_undisturbed_one(text_model, ids, stops, deaths):
    tokenizer = text_model.tokenizer
    undisturbed, counts = await run(tokenizer, Pool(ids, []), stops)
    assert (counts.resumed, counts.failed, counts.retries.total()) == (0, 0, 0)
    pool = Pool(ids, deaths)
    disturbed, counts = await run(tokenizer, pool, stops, fruitless=20, engine_crashes=20)
    assert "".join(p.text for p in disturbed) == "".join(p.text for p in undisturbed)
    assert [t for p in disturbed for t in p.tokens] == [t for p in undisturbed for t in p.tokens]
    assert disturbed[-1].finished == undisturbed[-1].finished
    assert len({(r.request_id, r.sampling.seed, r.sampling.temperature) for r in pool.requests}) == 1
    assert all(call.cancelled for call in pool.calls)
    assert counts.retries.total() == len(pool.requests) - 1
    assert counts.resumed <= counts.retries.total()
    assert counts.failed == 0


async def test_a_resumed_sequence_waits_for_the_kv_that_it_had(text_model):
    pool = Pool([100] * 4, [(2, 1, "lost"), (0, 1, "capacity"), (0, 1, "capacity")])
    pieces, counts = await run(text_model.tokenizer, pool)
    assert [t.id for p in pieces for t in p.tokens] == [100] * 4
    assert dict(counts.retries) == {"lost": 1, "not_yet": 2}
    assert [r.adopt_from for r in pool.requests] == ["", "n0", "n0", "n0"]
    assert pool.suspected == ["n0"]  # being full is no fault


async def test_one_that_never_fitted_is_refused_at_once(text_model):
    pool = Pool([100] * 4, [(0, 1, "capacity")])
    with pytest.raises(CapacityExceeded):
        await run(text_model.tokenizer, pool)
    assert len(pool.requests) == 1


async def test_one_that_outgrew_the_kv_is_refused_at_once(text_model):
    pool = Pool([100] * 4, [(1, 1, "lost"), (2, 1, "capacity")])
    with pytest.raises(CapacityExceeded):
        await run(text_model.tokenizer, pool)
    assert len(pool.requests) == 2


async def test_a_request_that_kills_its_nodes_kills_so_many_and_no_more(text_model):
    pool = Pool([100] * 4, [(1, 1, "lost"), *[(0, 1, "lost")] * 50])
    generation = Generation(pool, text_model.tokenizer, ResumeLimits(fruitless=4))
    request = SequenceRequest("r", [1], pb.Sampling(), (), 1e9, {})
    with pytest.raises(NotContinued, match="could go on after 1 tokens: weight node n went away: gone"):
        async for _ in generation.answer(request):
            pass
    assert len(pool.requests) == 4
    assert (generation.counts.failed, generation.counts.retries["lost"]) == (1, 3)


async def test_a_request_that_ends_engines_is_not_sent_to_a_third(text_model):
    pool = Pool([100] * 4, [(1, 1, "crashed"), (0, 1, "not_yet"), *[(0, 1, "crashed")] * 50])
    with pytest.raises(SequenceFailed, match="2 engines in a row ended in a step of this request") as caught:
        await run(text_model.tokenizer, pool)
    assert caught.value.code == "engine_crashed"
    assert [r.engine_crashes for r in pool.requests] == [0, 1, 1]


async def test_a_token_between_two_crashes_clears_a_request(text_model):
    pool = Pool([100] * 6, [(1, 1, "crashed"), (1, 1, "crashed"), (0, 1, "lost"), (1, 1, "crashed")])
    pieces, _ = await run(text_model.tokenizer, pool)
    assert [t.id for p in pieces for t in p.tokens] == [100] * 6
    assert [r.engine_crashes for r in pool.requests] == [0, 1, 1, 1, 1]


async def test_a_defect_in_making_text_ends_one_answer_with_an_error(text_model, monkeypatch):
    monkeypatch.setattr(Detokenizer, "push", lambda *_: {}["no such token"])
    pool = Pool([100] * 4, [])
    with pytest.raises(InternalError, match="Turning tokens into text failed: KeyError"):
        await run(text_model.tokenizer, pool)
    assert pool.calls[0].cancelled


def no_lane():
    metadata = grpc.aio.Metadata(("flume-failure", "no_lane"))
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, "no lane")


async def test_a_sequence_that_ran_resumes_after_its_node_had_no_lane(text_model, monkeypatch):
    monkeypatch.setitem(ENDS, "no_lane", no_lane)
    pool = Pool([100] * 4, [(2, 1, "no_lane")])
    pieces, counts = await run(text_model.tokenizer, pool, unavailable_s=0)
    assert pieces[-1].finished and counts.resumed == 1 and pool.suspected == ["n0"]


async def test_a_new_sequence_that_waited_for_a_lane_in_vain_is_refused_with_the_reason(
    text_model, monkeypatch
):
    monkeypatch.setitem(ENDS, "no_lane", no_lane)
    pool = Pool([100] * 4, [(0, 1, "no_lane")] * 2)
    assert (await run(text_model.tokenizer, pool, unavailable_s=0))[0][-1].finished, "there was another node"
    pool = Pool([100] * 4, [(0, 1, "no_lane")])
    monkeypatch.setattr(Node, "suspect", lambda node: setattr(node.pool, "lendable", False))
    with pytest.raises(NoWeightNode, match="n0: no lane"):
        await run(text_model.tokenizer, pool, unavailable_s=0)
    assert len(pool.requests) == 1


async def test_all_but_the_first_token_of_an_attempt_prove_that_attention_nodes_are_reached(text_model):
    pool = Pool([100] * 5, [(1, 1, "lost"), (2, 1, "lost")])
    await run(text_model.tokenizer, pool)
    assert pool.num_proofs == 0 + 1 + 1


async def test_without_patience_the_first_loss_is_the_last(text_model):
    pool = Pool([100] * 4, [(1, 1, "lost")])
    with pytest.raises(NotContinued):
        await run(text_model.tokenizer, pool, resume_s=0)
    assert len(pool.requests) == 1


@pytest.mark.parametrize(
    "code, detail, kind",
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", WeightNodeLost),
        (grpc.StatusCode.CANCELLED, "", WeightNodeLost),
        (grpc.StatusCode.UNKNOWN, "Stream removed (Socket closed)", WeightNodeLost),
        (grpc.StatusCode.UNKNOWN, "Unexpected <class 'KeyError'>", WeightNodeFailed),
        (grpc.StatusCode.ALREADY_EXISTS, "live", NotYet),
        (grpc.StatusCode.INTERNAL, "", WeightNodeFailed),
    ],
)
def test_what_a_failed_call_means(code, detail, kind):
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=detail)
    assert type(attempts.error_of("n", error)) is kind


@pytest.mark.parametrize(
    "code, failure, kind",
    [
        (grpc.StatusCode.INTERNAL, "model_output_invalid", SequenceFailed),
        (grpc.StatusCode.INTERNAL, "sequence_failed", SequenceFailed),
        (grpc.StatusCode.INTERNAL, "engine_crashed", SequenceFailed),
        (grpc.StatusCode.INTERNAL, "of a newer version", WeightNodeFailed),
        (grpc.StatusCode.UNAVAILABLE, "engine_crashed", EngineCrashed),
        (grpc.StatusCode.UNAVAILABLE, "no_lane", NoLane),
        (grpc.StatusCode.UNAVAILABLE, "of a newer version", WeightNodeLost),
    ],
)
def test_what_a_failed_call_means_by_the_word_beside_its_status(code, failure, kind):
    metadata = grpc.aio.Metadata(("flume-failure", failure))
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="why")
    found = attempts.error_of("n", error)
    assert type(found) is kind
    if kind is SequenceFailed:
        assert (found.code, found.message) == (failure, "why")
