import pytest
from flume_weight.scheduler import Candidate, Share, StepLimits, admits, needed_blocks, schedule
from hypothesis import given
from hypothesis import strategies as st

LIMITS = StepLimits(max_sequences=4, prefill_tokens=64, mixed_prefill_tokens=32)


def decoding(name, node="a", slack=3):
    return Candidate(name, node, 1, slack)


def prefilling(name, pending, node="a", slack=0):
    return Candidate(name, node, pending, slack)


@pytest.mark.parametrize(
    "candidates, unused, shares",
    [
        pytest.param([], {}, [], id="nothing to do"),
        pytest.param([decoding("s")], {"a": 0}, [Share("s", 1)], id="slack needs no credit"),
        pytest.param([decoding("s", slack=0)], {"a": 0}, [], id="no slack and no credit: waits"),
        pytest.param([decoding("s", slack=0)], {"a": 1}, [Share("s", 1)], id="credit buys a block"),
        pytest.param([prefilling("p", 200)], {"a": 99}, [Share("p", 64)], id="a chunk"),
        pytest.param(
            [prefilling("p", 200), decoding("s")],
            {"a": 99},
            [Share("s", 1), Share("p", 32)],
            id="decodes first, a smaller chunk beside them",
        ),
        pytest.param([prefilling("p", 200)], {"a": 2}, [Share("p", 32)], id="cut where the credit ends"),
        pytest.param(
            [prefilling("p", 200, slack=5)], {"a": 1}, [Share("p", 21)], id="slack and credit add up"
        ),
        pytest.param(
            [decoding("s", slack=0), decoding("t", slack=0)],
            {"a": 1},
            [Share("s", 1)],
            id="one block is not given twice",
        ),
        pytest.param(
            [prefilling("p", 40), prefilling("q", 40)],
            {"a": 99},
            [Share("p", 40), Share("q", 24)],
            id="prefill in order of arrival",
        ),
        pytest.param(
            [decoding(name) for name in "stuvw"],
            {"a": 9},
            [Share(name, 1) for name in "stuv"],
            id="no more sequences than fit a step",
        ),
    ],
)
def test_schedule(candidates, unused, shares):
    assert schedule(candidates, unused, 16, LIMITS) == shares


candidates = st.lists(
    st.builds(
        Candidate,
        sequence=st.uuids().map(str),
        node=st.sampled_from("ab"),
        pending_tokens=st.one_of(st.just(1), st.integers(1, 300)),
        slack_tokens=st.integers(0, 15),
    ),
    max_size=12,
    unique_by=lambda candidate: candidate.sequence,
)


@given(candidates, st.integers(0, 12), st.integers(0, 12))
def test_a_step_stays_within_its_limits_and_its_credit(some, unused_a, unused_b):
    shares = schedule(some, {"a": unused_a, "b": unused_b}, 16, LIMITS)
    by_name = {candidate.sequence: candidate for candidate in some}
    assert len(shares) <= LIMITS.max_sequences
    assert sum(share.tokens for share in shares) <= LIMITS.max_tokens
    assert len({share.sequence for share in shares}) == len(shares)
    for node, unused in (("a", unused_a), ("b", unused_b)):
        taken = sum(
            max(0, -(-(share.tokens - by_name[share.sequence].slack_tokens) // 16))
            for share in shares
            if by_name[share.sequence].node == node
        )
        assert taken <= unused
    assert all(1 <= share.tokens <= by_name[share.sequence].pending_tokens for share in shares)


@given(candidates)
def test_with_credit_enough_the_first_in_line_always_moves(some):
    shares = schedule(some, {"a": 1000, "b": 1000}, 16, LIMITS)
    assert bool(shares) == bool(some)


def test_needed_blocks_counts_what_slack_does_not_cover():
    some = [prefilling("p", 33, slack=1), decoding("s", slack=0), decoding("t", node="b", slack=2)]
    assert needed_blocks(some, 16) == {"a": 3, "b": 0}


def test_admission_leaves_every_running_sequence_a_block_to_grow():
    assert admits(31, available_blocks=5, running=3, block_tokens=16)
    assert not admits(32, available_blocks=5, running=3, block_tokens=16)
