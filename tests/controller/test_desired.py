import asyncio

import pytest
from flume_controller import desired
from flume_controller.desired import InvalidSpec, NotCurrent, OutOfBounds
from flume_controller.spec import Actor, AttentionSpec, encode


async def set_to(store, keys, replicas, **options):
    options = {"actor": Actor.USER, "current": None, "now_s": 5.0, **options}
    return (await desired.set_desired(store, keys, replicas, **options))[1]


async def test_the_first_controller_creates_the_spec_and_the_next_finds_it(store, keys):
    first = await desired.ensure(store, keys, AttentionSpec(desired=2))
    again = await desired.ensure(store, keys, AttentionSpec(desired=9))
    assert first == again == AttentionSpec(desired=2)


async def test_a_change_counts_up_the_generation_and_says_who(store, keys):
    await desired.ensure(store, keys, AttentionSpec(desired=1))
    spec = await set_to(store, keys, 3, actor=Actor.AUTOSCALER)
    assert (spec.desired, spec.generation, spec.set_by, spec.updated_at_s) == (3, 2, "autoscaler", 5.0)
    assert (await desired.read(store, keys))[0] == spec


async def test_asking_for_what_is_wanted_already_changes_nothing(store, keys):
    before = await desired.ensure(store, keys, AttentionSpec(desired=1))
    _, revision = await desired.read(store, keys)
    assert await set_to(store, keys, 1) == before
    assert (await desired.read(store, keys))[1] == revision


async def test_bounds_are_kept_and_named(store, keys):
    await desired.ensure(store, keys, AttentionSpec(desired=2, min=1, max=4))
    for replicas in (0, 5):
        with pytest.raises(OutOfBounds, match=f"replicas must be 1 to 4, got {replicas}"):
            await set_to(store, keys, replicas)


async def test_the_precondition_is_checked_even_when_nothing_would_change(store, keys):
    await desired.ensure(store, keys, AttentionSpec(desired=2))
    with pytest.raises(NotCurrent, match="expected 3 current replicas, the desired number is 2"):
        await set_to(store, keys, 2, current=3)
    assert (await set_to(store, keys, 4, current=2)).desired == 4


async def test_of_two_with_the_same_precondition_one_wins(store, keys):
    await desired.ensure(store, keys, AttentionSpec(desired=2))
    results = await asyncio.gather(
        *(set_to(store, keys, replicas, current=2) for replicas in (3, 4, 5)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, AttentionSpec)]
    assert len(won) == 1 and won[0].generation == 2
    assert all(isinstance(result, AttentionSpec | NotCurrent) for result in results)


async def test_changes_at_the_same_time_are_all_counted(store, keys):
    await desired.ensure(store, keys, AttentionSpec(desired=1))
    await asyncio.gather(*(set_to(store, keys, replicas) for replicas in (2, 3, 4)))
    assert (await desired.read(store, keys))[0].generation == 4


@pytest.mark.parametrize(
    "value", [b"three", b'{"desired": -1}', b'{"desired": 9, "max": 4}', b"{}"], ids=repr
)
async def test_a_spec_written_by_hand_that_makes_no_sense_is_refused(store, keys, value):
    await store.put(keys.spec_attention, value)
    with pytest.raises(InvalidSpec, match="spec/attention is not a valid spec"):
        await desired.read(store, keys)


async def test_a_spec_of_a_newer_version_can_be_read(store, keys):
    value = encode(AttentionSpec(desired=3)).replace(b"{", b'{"later": true,', 1)
    await store.put(keys.spec_attention, value)
    assert (await desired.read(store, keys))[0].desired == 3
