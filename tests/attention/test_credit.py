from flume_attention.credit import Demand, grants
from hypothesis import given
from hypothesis import strategies as st

small = st.integers(0, 60)
demands = st.lists(st.builds(Demand, small, small), max_size=6)


def test_each_lane_is_raised_to_what_it_wants_while_there_is_room():
    assert grants(100, [Demand(2, 8), Demand(0, 5), Demand(9, 4)], draining=False) == [6, 5, 0]


def test_when_memory_is_short_the_lanes_end_up_level():
    assert grants(10, [Demand(4, 50), Demand(0, 50)], draining=False) == [3, 7]


def test_a_greedy_lane_does_not_keep_a_modest_one_short():
    assert grants(10, [Demand(0, 1000), Demand(0, 3)], draining=False) == [7, 3]


def test_a_draining_node_grants_nothing():
    assert grants(100, [Demand(0, 8)], draining=True) == [0]


def test_nothing_free_means_nothing_granted():
    assert grants(0, [Demand(0, 8)], draining=False) == [0]


@given(free=small, lanes=demands)
def test_never_more_than_is_free_nor_than_is_wanted(free, lanes):
    given_blocks = grants(free, lanes, draining=False)
    assert sum(given_blocks) <= free
    for demand, blocks in zip(lanes, given_blocks, strict=True):
        assert 0 <= blocks <= max(0, demand.want_blocks - demand.unused_blocks)


@given(free=small, lanes=demands)
def test_nothing_is_left_over_while_someone_wants_it(free, lanes):
    given_blocks = grants(free, lanes, draining=False)
    wanting = [d.want_blocks - d.unused_blocks - g for d, g in zip(lanes, given_blocks, strict=True)]
    assert sum(given_blocks) == free or all(missing <= 0 for missing in wanting)


@given(free=small, lanes=demands)
def test_a_lane_left_short_is_at_most_one_block_below_any_lane_that_was_given_something(free, lanes):
    after = [
        (d.unused_blocks + g, g, d.want_blocks)
        for d, g in zip(lanes, grants(free, lanes, draining=False), strict=True)
    ]
    richest = max((level for level, g, _ in after if g), default=0)
    assert all(level >= richest - 1 for level, _, want in after if level < want)
