import pytest
from flume_common.routes import Route, TokenRange
from hypothesis import given
from hypothesis import strategies as st

NODES = st.sampled_from(["a0", "a1", "a2", "a3"])
MOVES = st.lists(st.tuples(st.integers(0, 50), NODES), max_size=30)


def follow(first: str, moves: list[tuple[int, str]]) -> tuple[Route, list[str]]:
    """The route after moving the tail by each (growth, node), and who held each token, token by token."""
    route, length, holders = Route.start("s", "w0", 7, first), 0, []
    for growth, node in moves:
        holders += [route.tail.node] * growth
        length += growth
        route = route.move_tail(length, node)
    return route, holders


def holder_of(route: Route, token: int) -> str:
    found = [r.node for r in route.ranges if r.start <= token and (r.end is None or token < r.end)]
    assert len(found) == 1, f"token {token} is held {len(found)} times"
    return found[0]


@given(NODES, MOVES)
def test_however_the_tail_moves_every_token_has_the_one_holder_it_was_given_to(first, moves):
    route, holders = follow(first, moves)
    assert [holder_of(route, token) for token in range(len(holders))] == holders


@given(NODES, MOVES)
def test_ranges_stay_contiguous_never_empty_and_end_in_one_open_tail(first, moves):
    route, holders = follow(first, moves)
    assert route.ranges[0].start == 0
    for left, right in zip(route.ranges, route.ranges[1:], strict=False):
        assert left.end == right.start
        assert left.end > left.start
    assert route.tail.end is None
    assert route.tail.start <= len(holders)
    if moves:
        assert route.tail.node == moves[-1][1]


@given(NODES, MOVES)
def test_closed_ranges_are_never_altered(first, moves):
    before, _ = follow(first, moves[:-1])
    after, _ = follow(first, moves)
    closed = before.ranges[:-1]
    assert after.ranges[: len(closed)] == closed


@given(NODES, MOVES)
def test_a_route_survives_the_wire(first, moves):
    route, _ = follow(first, moves)
    assert Route.from_proto(route.to_proto()) == route


def test_a_tail_that_holds_nothing_is_replaced():
    route = Route.start("s", "w0", 1, "a0").move_tail(0, "a1")
    assert route.ranges == (TokenRange(0, None, "a1"),)


def test_moving_onto_the_same_node_changes_nothing():
    route = Route.start("s", "w0", 1, "a0")
    assert route.move_tail(10, "a0") is route


def test_moving_leaves_the_old_route_as_it_was():
    route = Route.start("s", "w0", 1, "a0")
    moved = route.move_tail(10, "a1")
    assert route.ranges == (TokenRange(0, None, "a0"),)
    assert moved.nodes == {"a0", "a1"}
    assert (moved.sequence, moved.weight_node, moved.epoch) == ("s", "w0", 1)


def test_a_tail_cannot_be_closed_before_it_starts():
    route = Route.start("s", "w0", 1, "a0").move_tail(10, "a1")
    with pytest.raises(ValueError, match="starts at 10"):
        route.move_tail(9, "a2")


@given(NODES, MOVES, st.integers(0, 400), st.integers(1, 400), NODES)
def test_replacing_the_holder_of_closed_tokens_moves_those_and_no_others(first, moves, start, length, node):
    route, holders = follow(first, moves)
    end = start + length
    if not any(item.start <= start and item.end is not None and end <= item.end for item in route.ranges):
        with pytest.raises(ValueError, match="not part of one closed range"):
            route.replace_holder(start, end, node)
        return
    replaced = route.replace_holder(start, end, node)
    holders[start:end] = [node] * length
    assert [holder_of(replaced, token) for token in range(len(holders))] == holders
    assert replaced.tail == route.tail


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [TokenRange(1, None, "a")],
        [TokenRange(0, 5, "a")],
        [TokenRange(0, None, "a"), TokenRange(5, None, "b")],
        [TokenRange(0, 5, "a"), TokenRange(6, None, "b")],
        [TokenRange(0, 5, "a"), TokenRange(4, None, "b")],
        [TokenRange(0, 0, "a"), TokenRange(0, None, "b")],
        [TokenRange(0, 5, "a"), TokenRange(5, 9, "b")],
    ],
    ids=["none", "not from 0", "no tail", "two tails", "gap", "overlap", "empty range", "closed at the end"],
)
def test_a_route_that_breaks_the_rules_cannot_be_made(ranges):
    with pytest.raises(ValueError, match="route of s"):
        Route("s", "w0", 1, tuple(ranges))
