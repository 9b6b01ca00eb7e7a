from flume_attention.blocks import BlockPool
from flume_attention.ranges import Range, Run, Slot
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 4


def grown(pool, *appends):
    item = Range(pool, BLOCK, start=0)
    for tokens in appends:
        item.reserve(tokens)
        item.commit(tokens)
    return item


def positions(runs):
    return [run.first + i for run in runs for i in range(run.tokens)]


def test_an_empty_range_holds_no_block():
    item = grown(BlockPool(4))
    assert item.num_blocks == 0 and item.runs() == []


def test_a_range_grown_alone_is_one_run():
    assert grown(BlockPool(8), 3, 1, 9).runs() == [Run(0, 13)]


def test_reserved_tokens_go_where_the_committed_ones_end():
    item = grown(BlockPool(8), 6)
    assert item.reserve(5) == [Run(6, 5)] and item.runs() == [Run(0, 6)]


def test_a_block_is_reserved_only_when_its_first_token_comes():
    item = grown(BlockPool(8), 3)
    assert (item.new_blocks(1), item.new_blocks(2)) == (0, 1)


def test_dropping_what_was_reserved_gives_its_blocks_back_and_keeps_the_rest():
    pool = BlockPool(8)
    item = grown(pool, 6)
    item.reserve(9)
    assert pool.held == 4 and item.reserved_blocks == 2
    item.drop_reserved()
    assert pool.held == 2 and item.reserved_blocks == 0 and item.runs() == [Run(0, 6)]


def test_a_range_around_an_obstacle_is_two_runs():
    pool = BlockPool(6)
    first = grown(pool, 8)
    grown(pool, 4)  # in the middle of what is left: block 4
    first.reserve(4 * 3)
    first.commit(4 * 3)
    assert first.runs() == [Run(0, 16), Run(20, 4)]


def test_a_shared_range_lives_until_the_last_slot_lets_go():
    pool = BlockPool(4)
    item = grown(pool, 5)
    item.closed = True
    item.retain()
    item.release()
    assert pool.held == 2
    item.release()
    assert pool.held == 0


def test_ranges_of_a_slot_that_meet_in_memory_make_one_run():
    pool = BlockPool(4)
    first = grown(pool, 4)
    first.closed = True
    filler = pool.allocate(1)  # the next run starts in the middle of what is left
    second = Range(pool, BLOCK, start=4)
    second.reserve(4)
    second.commit(4)
    pool.release(filler)
    slot = Slot(key=1, ranges=[first, second], held=8)
    expected = positions(first.runs()) + positions(second.runs())
    assert positions(slot.runs(8)) == expected
    assert positions(slot.runs(4)) == positions(first.runs())
    assert slot.open_at(8) is second and slot.open_at(4) is None and slot.num_blocks == 2


@given(
    appends=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.booleans()), max_size=40),
)
def test_every_token_keeps_its_place_whatever_grows_beside_it(appends):
    pool = BlockPool(120)
    ranges = [Range(pool, BLOCK, start=0) for _ in range(3)]
    places = [[], [], []]
    for which, tokens, keep in appends:
        target = positions(ranges[which].reserve(tokens))
        assert len(target) == tokens
        if keep:
            ranges[which].commit(tokens)
            places[which] += target
        else:
            ranges[which].drop_reserved()
    for item, expected in zip(ranges, places, strict=True):
        assert positions(item.runs()) == expected
    used = [place for expected in places for place in expected]
    assert len(set(used)) == len(used)
    assert pool.held == sum(item.num_blocks for item in ranges)
