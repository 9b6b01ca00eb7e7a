import pytest
from flume_weight.placement import Balance, NodeView, TailView, fits_empty, place, relieve
from hypothesis import given
from hypothesis import strategies as st


def view(node, available, *, capacity=100, tails=0, draining=False):
    return NodeView(node, capacity, available, tails, draining)


@pytest.mark.parametrize(
    "nodes, need, chosen",
    [
        pytest.param([], 1, None, id="nobody there"),
        pytest.param([view("a", 5), view("b", 9)], 1, "b", id="most room wins"),
        pytest.param([view("a", 9, tails=2), view("b", 9, tails=1)], 1, "b", id="then fewer tails"),
        pytest.param([view("b", 9), view("a", 9)], 1, "a", id="then the name"),
        pytest.param([view("a", 5), view("b", 9, draining=True)], 1, "a", id="never a draining node"),
        pytest.param([view("a", 5)], 6, None, id="not enough room"),
        pytest.param([view("a", 0)], 0, None, id="a full node takes no tail, however small"),
    ],
)
def test_place(nodes, need, chosen):
    assert place(nodes, need) == chosen


BALANCE = Balance(margin_tokens=32, share_of_sequence=4)


@pytest.mark.parametrize(
    "tail, nodes, moves",
    [
        pytest.param(
            TailView("s", "a", 64, 64),
            [view("a", 60), view("b", 100)],
            {"s": "b"},
            id="relieves the fuller node",
        ),
        pytest.param(
            TailView("s", "a", 64, 64), [view("a", 99), view("b", 100)], {}, id="nearly even: stays"
        ),
        pytest.param(TailView("s", "a", 16, 64), [view("a", 60), view("b", 100)], {}, id="range too short"),
        pytest.param(
            TailView("s", "a", 64, 1000),
            [view("a", 60), view("b", 100)],
            {},
            id="too short for so long a sequence",
        ),
        pytest.param(
            TailView("s", "a", 0, 0),
            [view("a", 100, draining=True), view("b", 1)],
            {"s": "b"},
            id="a draining node is left at once",
        ),
        pytest.param(
            TailView("s", "a", 64, 64),
            [view("a", 100, draining=True)],
            {},
            id="nowhere to go: stays and goes on",
        ),
        pytest.param(
            TailView("s", "a", 64, 64),
            [view("a", 50), view("b", 100, draining=True)],
            {},
            id="never onto a draining node",
        ),
    ],
)
def test_relieve(tail, nodes, moves):
    assert relieve([tail], nodes, block_tokens=16, balance=BALANCE) == moves


nodes = st.lists(
    st.builds(
        NodeView,
        node=st.sampled_from("abcdef"),
        capacity_blocks=st.just(100),
        available_blocks=st.integers(0, 100),
        tails=st.integers(0, 5),
        draining=st.booleans(),
    ),
    unique_by=lambda view: view.node,
)


@given(nodes, st.integers(0, 500), st.integers(0, 500))
def test_no_tail_is_moved_to_where_it_is_or_where_it_cannot_stay(fleet, range_tokens, earlier_tokens):
    tails = [TailView(view.node, view.node, range_tokens, range_tokens + earlier_tokens) for view in fleet]
    by_name = {view.node: view for view in fleet}
    for sequence, node in relieve(tails, fleet, 16, Balance()).items():
        assert node != sequence
        assert by_name[node].available_blocks > 0 and not by_name[node].draining


@given(st.integers(0, 2000), st.integers(16, 512))
def test_moving_to_and_fro_opens_few_ranges(start_tokens, margin):
    """Two nodes that are always uneven: ranges grow with the sequence, so their number stays small."""
    length, opened_at, ranges, here = start_tokens, start_tokens, 1, "a"
    while length < 16384:
        other = "b" if here == "a" else "a"
        fleet = [view(here, 10), view(other, 100)]
        tail = TailView("s", here, length - opened_at, length)
        if relieve([tail], fleet, 16, Balance(margin_tokens=margin)):
            here, opened_at, ranges = other, length, ranges + 1
        length += 1
    assert ranges < 16384 / margin + 2
    assert ranges <= 64 or margin < 128


def test_every_node_but_one_may_end_in_a_block_that_is_not_full():
    assert fits_empty([10, 10], 16) == 304
    assert fits_empty([10], 16) == 160
    assert fits_empty([], 16) == 0
