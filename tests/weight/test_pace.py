"""Chunks sized from measured speed, on machines that are a formula and a seed."""

import math
import random

import pytest
from flume_weight.pace import START_TOKENS, Pace, PaceEstimate
from flume_weight.scheduler import Candidate, StepLimits, TimeBudget, schedule
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 16
LIMITS = StepLimits()


class Machine:
    """Runs prompts chunk by chunk; what a step takes is its real pace with some noise."""

    def __init__(self, pace, target_s=0.3, *, noise=0.1, seed=1, decoding=0):
        self.pace, self.target_s, self.decoding = pace, target_s, decoding
        self.estimate = PaceEstimate()
        self.steps = []  # (tokens, seconds)
        self._noise, self._random = noise, random.Random(seed)

    def budget(self):
        estimate = self.estimate
        return TimeBudget(estimate.pace, self.target_s, estimate.most_tokens, probe=estimate.probes)

    def prefill(self, prompt_tokens, position=0):
        end = position + prompt_tokens
        while position < end:
            decoding = [Candidate(f"d{n}", "n", 1, BLOCK, 500) for n in range(self.decoding)]
            prompt = Candidate("p", "n", end - position, 0, position)
            shares = schedule([*decoding, prompt], {"n": 10**6}, BLOCK, LIMITS, self.budget())
            position += self._run({share.sequence: share.tokens for share in shares}["p"], position)

    def _run(self, tokens, position):
        rows = tokens + self.decoding
        attended = tokens * (position + tokens / 2) + 500 * self.decoding
        seconds = self.pace.seconds(rows, attended) * self._random.lognormvariate(0, self._noise)
        self.estimate.note(rows, attended, seconds)
        self.steps.append((tokens, seconds))
        return tokens

    @property
    def tokens(self):
        return [tokens for tokens, _ in self.steps]

    @property
    def times_s(self):
        return [seconds for _, seconds in self.steps]


SMALL = Pace(0.02, 0.0016, 1e-7)  # 135M on two cores
LARGE = Pace(0.2, 0.009, 3e-7)  # 1B
FAST = Pace(0.004, 5e-5, 1e-9)  # a GPU


def median(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("decoding", [0, 4])
@pytest.mark.parametrize("target_s", [0.15, 0.3, 1.0])
def test_steps_come_near_the_target_where_that_can_be(target_s, decoding):
    machine = Machine(SMALL, target_s, decoding=decoding)
    machine.prefill(8000)
    settled = machine.times_s[6:-1]
    most_s = min(target_s, SMALL.seconds(128 + decoding, 128 * 8000)) if decoding else target_s
    assert 0.6 * most_s < median(settled) < 1.3 * most_s
    assert max(settled) < 2.0 * target_s


def test_a_fast_machine_takes_what_a_step_may_have():
    machine = Machine(FAST)
    machine.prefill(10_000)
    assert machine.tokens[-2] == LIMITS.prefill_tokens


def test_where_the_fixed_part_is_most_of_a_step_it_is_shared_by_more_tokens():
    machine = Machine(LARGE)
    machine.prefill(6000)
    ideal_s = sum(LARGE.seconds(1024, 1024 * at) for at in range(0, 6000, 1024))
    assert sum(machine.times_s) < 1.5 * ideal_s
    assert median(machine.times_s) < 4 * 0.3 * 1.2


def test_a_step_that_always_takes_long_is_not_made_many():
    """Where a minute passes whatever the chunk, as with a node that answers slowly, chunks grow."""
    machine = Machine(Pace(60.0, 0.001, 0.0))
    machine.prefill(4000)
    assert len(machine.steps) < 20


def test_a_machine_that_becomes_slow_is_followed_within_a_few_steps():
    machine = Machine(SMALL)
    machine.prefill(2000)
    machine.pace = Pace(*(6 * cost for cost in (SMALL.fixed_s, SMALL.token_s, SMALL.context_s)))
    at = len(machine.steps)
    machine.prefill(4000)
    assert median(machine.times_s[at + 4 :]) < 1.2
    machine.pace = SMALL
    at = len(machine.steps)
    machine.prefill(8000)
    assert 0.15 < median(machine.times_s[at + 8 :]) < 0.5


def test_one_step_that_stood_still_for_a_minute_is_forgotten_soon():
    machine = Machine(SMALL)
    machine.prefill(2000)
    machine.estimate.note(160, 160 * 2000, 60.0)
    machine.prefill(4000, 2000)
    assert all(seconds < 0.6 for seconds in machine.times_s)
    assert median(machine.tokens[-10:-1]) >= 80


def test_the_first_chunk_is_small_and_the_next_at_most_twice_as_large():
    machine = Machine(FAST, noise=0)
    machine.prefill(4000)
    assert machine.tokens[0] == START_TOKENS
    assert all(after <= 2 * before for before, after in zip(machine.tokens, machine.tokens[1:], strict=False))


paces = st.builds(
    Pace, st.floats(0, 100), st.floats(1e-6, 1), st.one_of(st.just(0.0), st.floats(1e-12, 1e-4))
)


@given(paces, st.floats(1e-3, 100), st.integers(0, 100_000))
def test_a_chunk_takes_the_time_it_was_cut_for(pace, seconds, context_tokens):
    tokens = pace.tokens_within(seconds, context_tokens)
    attended = tokens * (context_tokens + tokens / 2)
    assert math.isclose(pace.chunk_s(tokens, attended), seconds, rel_tol=1e-6)
    assert pace.tokens_within(2 * seconds, context_tokens) >= tokens
    assert pace.tokens_within(seconds, context_tokens + 1000) <= tokens


notes = st.lists(
    st.tuples(st.integers(1, 4096), st.floats(0, 1e9), st.floats(1e-6, 1e4)), min_size=1, max_size=30
)


@given(notes)
@settings(max_examples=200)
def test_costs_are_never_negative_whatever_was_measured(noted):
    estimate = PaceEstimate()
    for tokens, attended, seconds in noted:
        estimate.note(tokens, attended, seconds)
    pace = estimate.pace
    assert all(0 <= cost < math.inf for cost in (pace.fixed_s, pace.token_s, pace.context_s))
    assert pace.seconds(100, 1000) > 0


candidates = st.lists(
    st.builds(
        Candidate,
        sequence=st.uuids().map(str),
        node=st.sampled_from("ab"),
        pending_tokens=st.one_of(st.just(1), st.integers(1, 3000)),
        slack_tokens=st.integers(0, 15),
        context_tokens=st.integers(0, 30_000),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda candidate: candidate.sequence,
)
budgets = st.builds(TimeBudget, paces, st.floats(1e-3, 60), st.integers(64, 4096), probe=st.booleans())


@given(candidates, budgets)
def test_whatever_the_budget_the_oldest_prompt_moves_and_a_step_stays_within_its_tokens(some, budget):
    shares = {
        share.sequence: share.tokens
        for share in schedule(some, {"a": 9999, "b": 9999}, BLOCK, LIMITS, budget)
    }
    decoding = [candidate for candidate in some if candidate.pending_tokens == 1]
    prompts = [candidate for candidate in some if candidate.pending_tokens > 1]
    assert all(candidate.sequence in shares for candidate in decoding)
    granted = sum(shares.get(prompt.sequence, 0) for prompt in prompts)
    assert granted <= min(LIMITS.prefill(bool(decoding)), budget.most_tokens)
    if prompts:
        oldest = prompts[0]
        assert shares[oldest.sequence] >= min(oldest.pending_tokens, BLOCK)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(2, 4000)), min_size=1, max_size=12),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=50)
def test_no_prompt_starves_however_many_shorter_ones_come(arrivals, seed):
    """Each is done after at most twice the steps that all before it, and it, would take alone."""
    machine = Machine(SMALL, seed=seed)
    coming = sorted(arrivals)
    left, order, done, step = {}, [], {}, 0
    while coming or left:
        while coming and coming[0][0] <= step:
            name = f"s{len(order)}"
            left[name] = coming.pop(0)[1]
            order.append((name, left[name], step))
        some = [
            Candidate(name, "n", left[name], 0, size - left[name]) for name, size, _ in order if name in left
        ]
        some = [candidate for candidate in some if candidate.pending_tokens > 1]
        for share in schedule(some, {"n": 10**6}, BLOCK, LIMITS, machine.budget()):
            left[share.sequence] -= share.tokens
        machine.estimate.note(160, 0, SMALL.seconds(160, 0))
        for name in [name for name, tokens in left.items() if tokens <= 1]:
            del left[name]
            done[name] = step
        step += 1
        assert step < 5000
    before = 0
    for name, size, arrived in order:
        before += size
        assert done[name] - arrived <= 2 * (before / 64 + len(order)) + 2


def test_a_short_prompt_behind_two_long_ones_is_done_in_a_step_or_two():
    machine = Machine(SMALL, noise=0)
    machine.prefill(3000)  # the pace is known
    some = [Candidate(f"long-{n}", "n", 5600, 0, 0) for n in range(2)] + [Candidate("short", "n", 60, 0, 0)]
    shares = {
        share.sequence: share.tokens for share in schedule(some, {"n": 9999}, BLOCK, LIMITS, machine.budget())
    }
    assert shares["short"] == 60
    assert shares["long-0"] > 64
