"""The autoscaler's policy: a few loads by hand, and what must hold for all of them."""

import itertools
import math
from dataclasses import replace

import pytest
from flume_common.autoscale import FleetLoad, NodeLoad, Settings, budget_tokens, decide, demand_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

CAPACITY = 1000
POLICY = Settings(min=1, max=8, watermark=0.8, shrink_ratio=0.6, cooldown_s=60, cooldown_up_s=2, prepare_s=5)


def load(used, nodes=1, tails=0, step_s=0.1, changed_at_s=-1e9, **fields):
    """`used` tokens spread over `nodes`, `tails` of them growing."""
    each = [NodeLoad(CAPACITY, used // nodes, tails if index == 0 else 0) for index in range(nodes)]
    fields.setdefault("desired", nodes)
    return FleetLoad(each, changed_at_s=changed_at_s, step_s=step_s, **fields)


def wanted(*args, low_since_s=None, now_s=0.0, policy=POLICY, **fields):
    return decide(policy, load(*args, **fields), low_since_s, now_s).desired


def test_memory_binds_where_there_is_no_slo_and_latency_where_it_is_shorter():
    node = NodeLoad(360_000, 0, bytes_per_token=131_072)
    assert budget_tokens(Settings(), node) == 360_000
    a6000 = Settings(tpot_slo_s=0.080, rest_s=0.010, bandwidth_bytes_per_s=768e9)
    assert budget_tokens(a6000, node) == 360_000, "47 GB at 768 GB/s take 61 of 70 ms: memory binds"
    tight = Settings(tpot_slo_s=0.050, rest_s=0.010, bandwidth_bytes_per_s=768e9)
    assert budget_tokens(tight, node) == pytest.approx(0.040 * 768e9 / 131_072)


def test_what_was_measured_limits_where_nothing_is_set():
    node = NodeLoad(360_000, 0, bytes_per_token=131_072, bandwidth_bytes_per_s=768e9)
    slo = Settings(tpot_slo_s=0.050)
    assert budget_tokens(slo, node, rest_s=0.010) == pytest.approx(0.040 * 768e9 / 131_072)
    both = Settings(tpot_slo_s=0.050, rest_s=0.020, bandwidth_bytes_per_s=384e9)
    assert budget_tokens(both, node, rest_s=0.010) == pytest.approx(0.030 * 384e9 / 131_072)
    full = [replace(node, used_tokens=200_000)]
    slow = FleetLoad(full, desired=1, changed_at_s=-100.0, rest_s=0.010)
    decision = decide(slo, slow, None, 0.0)
    assert decision.desired == 2, "half of its memory, most of its time"
    assert "234375 tokens each, which the SLO allows" in decision.reason
    assert decide(Settings(), slow, None, 0.0).desired == 1


def test_an_slo_that_the_rest_of_a_step_breaks_is_no_limit():
    node = NodeLoad(1000, 0, bytes_per_token=10)
    assert budget_tokens(Settings(tpot_slo_s=0.01, rest_s=0.02, bandwidth_bytes_per_s=1.0), node) == 1000


def test_demand_is_what_is_held_waits_and_grows_while_a_node_prepares():
    growing = load(500, tails=4, step_s=0.1, waiting_tokens=30)
    assert demand_tokens(POLICY, growing) == 500 + 30 + 4 / 0.1 * 5
    assert demand_tokens(POLICY, load(500, tails=4, step_s=0.1, prepare_s=0.5)) == 500 + 20
    assert demand_tokens(POLICY, load(500, tails=4, step_s=0.0)) == 500, "nothing is being generated"


def test_a_node_is_started_when_it_would_be_full_before_another_could_be_ready():
    assert wanted(590, tails=4, step_s=0.1) == 1, "790 of 800 by the time it would be ready"
    assert wanted(610, tails=4, step_s=0.1) == 2
    assert wanted(610, tails=4, step_s=0.1, prepare_s=1.0) == 1, "a quick start can wait"


def test_as_many_are_started_at_once_as_are_needed_and_no_more_than_may_be():
    assert wanted(900, waiting_tokens=3000) == math.ceil(3900 / 800)
    assert wanted(900, waiting_tokens=99_000) == 8


def test_those_that_still_prepare_are_counted():
    assert wanted(900, nodes=1, desired=2) == 2


def test_after_a_change_the_next_node_more_waits_a_little():
    assert wanted(900, changed_at_s=-1.9) == 1
    assert wanted(900, changed_at_s=-2.0) == 2


def test_after_a_scale_that_could_not_complete_it_waits_the_whole_cooldown():
    assert wanted(900, changed_at_s=-59, gave_up=True) == 1
    assert wanted(900, changed_at_s=-60, gave_up=True) == 2


def test_a_node_goes_when_the_load_was_low_for_the_whole_cooldown():
    first = decide(POLICY, load(400, nodes=3), None, 100.0)
    assert (first.desired, first.low_since_s) == (3, 100.0)
    assert decide(POLICY, load(400, nodes=3), 100.0, 159.9).low_since_s == 100.0
    assert decide(POLICY, load(400, nodes=3), 100.0, 160.0).desired == 2, "one at a time"
    assert wanted(400, nodes=3, low_since_s=-60, changed_at_s=-59) == 3


def test_a_moment_of_load_begins_the_cooldown_anew():
    assert decide(POLICY, load(1200, nodes=3), 100.0, 160.0).low_since_s is None


def test_between_the_marks_nothing_changes():
    # Two nodes would be below the watermark (1600), and not below the lower mark (960).
    assert wanted(1100, nodes=3, low_since_s=-1e6) == 3


def test_bounds_are_kept_at_once():
    assert wanted(0, nodes=1, desired=0, changed_at_s=0) == 1
    assert wanted(9000, nodes=9, desired=9, changed_at_s=0) == 8


def test_a_fleet_of_which_nothing_is_known_is_left_alone():
    assert decide(POLICY, FleetLoad([], desired=3, changed_at_s=0), None, 1e6).desired == 3


@pytest.mark.parametrize(
    "wrong", [{"min": 0}, {"min": 3, "max": 2}, {"watermark": 0}, {"watermark": 1.1}, {"shrink_ratio": 1}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError):
        Settings(**wrong)


POLICIES = st.builds(
    lambda least, more, mark, shrink, up: Settings(
        min=least, max=least + more, watermark=mark, shrink_ratio=shrink, cooldown_s=60, cooldown_up_s=up
    ),
    st.integers(1, 5), st.integers(0, 8), st.floats(0.3, 1), st.floats(0.2, 0.95),
    st.sampled_from([0, 2, 10]),
)  # fmt: skip
PHASES = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 12_000), st.integers(0, 20)), min_size=1, max_size=12
)


class Simulation:
    """A fleet that follows its desired count at once, looked at every 5 s."""

    def __init__(self, policy, start):
        self.policy, self.desired = policy, start
        self.now_s, self.changed_at_s, self.low_since_s = 0.0, -1e9, None
        self.changes = []  # (when, by how many)

    def look(self, used, tails):
        fleet = load(
            used, nodes=max(self.desired, 1), tails=tails, desired=self.desired,
            changed_at_s=self.changed_at_s,
        )  # fmt: skip
        decision = decide(self.policy, fleet, self.low_since_s, self.now_s)
        self.low_since_s = decision.low_since_s
        if decision.desired != self.desired:
            self.changes.append((self.now_s, decision.desired - self.desired))
            self.desired, self.changed_at_s = decision.desired, self.now_s
        self.now_s += 5.0


@settings(max_examples=150, deadline=None)
@given(policy=POLICIES, start=st.integers(0, 14), phases=PHASES)
def test_the_count_stays_within_bounds_and_never_flaps_within_the_cooldown(policy, start, phases):
    simulation = Simulation(policy, start)
    for looks, used, tails in phases:
        for _ in range(looks):
            simulation.look(used, tails)
            assert policy.min <= simulation.desired <= policy.max
    # The first change may only be the return into the bounds.
    changes = simulation.changes[1:] if not policy.min <= start <= policy.max else simulation.changes
    for (before_s, _), (after_s, by) in itertools.pairwise(changes):
        assert after_s - before_s >= (policy.cooldown_up_s if by > 0 else policy.cooldown_s)
    assert all(by >= -1 for _, by in changes), "nodes go one at a time"


@settings(max_examples=150, deadline=None)
@given(policy=POLICIES, start=st.integers(1, 14), used=st.integers(0, 12_000), tails=st.integers(0, 20))
def test_under_a_constant_load_the_count_settles_and_is_enough(policy, start, used, tails):
    simulation = Simulation(policy, start)
    for _ in range(14 * 14):  # each node fewer takes 60 s
        simulation.look(used, tails)
    settled = simulation.desired
    changes = len(simulation.changes)
    for _ in range(100):
        simulation.look(used, tails)
    assert (simulation.desired, len(simulation.changes)) == (settled, changes), "it has come to rest"
    demand = used // settled * settled + tails / 0.1 * policy.prepare_s
    assert settled == policy.max or demand <= policy.watermark * CAPACITY * settled
    ups = [by > 0 for _, by in simulation.changes]
    assert ups == sorted(ups, reverse=True) or ups == sorted(ups), "it never turns back"
