"""The block pool, against a model that only counts."""

import numpy as np
import pytest
from flume_attention.blocks import Block, BlockPool, OutOfBlocks, StaleBlock, largest_gap
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


def numbers(blocks):
    return [block.number for block in blocks]


def test_blocks_continue_right_behind_the_last_one():
    pool = BlockPool(10)
    first = pool.allocate(3)
    assert numbers(pool.allocate(2, after=first[-1])) == [3, 4]


def test_a_new_run_leaves_room_for_the_one_before_it():
    pool = BlockPool(100)
    first = pool.allocate(1)
    second = pool.allocate(1)
    for _ in range(20):
        first += pool.allocate(1, after=first[-1])
        second += pool.allocate(1, after=second[-1])
    for blocks in (first, second):
        start = blocks[0].number
        assert numbers(blocks) == list(range(start, start + 21))


def test_what_does_not_fit_behind_the_last_one_goes_on_in_another_gap():
    pool = BlockPool(8)
    first = pool.allocate(2)
    pool.release([pool.allocate(1, after=first[-1])[0]])
    wall = pool.allocate(1)
    got = pool.allocate(5, after=first[-1])
    assert len(set(numbers(got))) == 5 and wall[0].number not in numbers(got) and got[0].number == 2


def test_more_than_is_free_takes_nothing():
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks) as error:
        pool.allocate(3)
    assert (error.value.wanted, error.value.free, pool.free) == (3, 2, 2)


def test_a_block_is_free_only_when_nobody_holds_it():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.retain(blocks)
    pool.release(blocks)
    assert pool.free == 0
    pool.release(blocks)
    assert pool.free == 2


def test_a_reference_from_before_the_free_is_refused_after_the_block_was_given_again():
    pool = BlockPool(1)
    old = pool.allocate(1)
    pool.release(old)
    new = pool.allocate(1)
    assert new[0].number == old[0].number and new[0].generation != old[0].generation
    for use in (pool.release, pool.retain):
        with pytest.raises(StaleBlock):
            use(old)
    assert pool.references(new[0]) == 1 and pool.references(old[0]) == 0


def test_releasing_twice_is_refused():
    pool = BlockPool(1)
    block = pool.allocate(1)
    pool.release(block)
    with pytest.raises(StaleBlock):
        pool.release(block)


@pytest.mark.parametrize(
    "free, want",
    [("", (0, 0)), ("..", (0, 0)), ("##", (0, 2)), ("#.##.#", (2, 2)), (".#", (1, 1)), ("##.##", (0, 2))],
)
def test_the_largest_gap(free, want):
    assert largest_gap(np.array([char == "#" for char in free], dtype=bool)) == want


class PoolMachine(RuleBasedStateMachine):
    @initialize(size=st.integers(1, 40))
    def start(self, size):
        self.pool = BlockPool(size)
        self.held: list[list[Block]] = []

    @rule(count=st.integers(0, 12), data=st.data())
    def allocate(self, count, data):
        choices = [blocks[-1] for blocks in self.held if blocks]
        after = data.draw(st.sampled_from([None, *choices]))
        if count > self.pool.free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count, after)
        else:
            got = self.pool.allocate(count, after)
            assert len(got) == count
            self.held.append(got)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.retain(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_reference_is_counted_and_no_memory_is_given_twice(self):
        uses = [block for blocks in self.held for block in blocks]
        for block in uses:
            assert self.pool.references(block) == uses.count(block)
        assert len({block.number for block in uses}) == len(set(uses)) == self.pool.held
        assert self.pool.held + self.pool.free == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
