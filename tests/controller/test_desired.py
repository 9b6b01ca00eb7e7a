import asyncio

import pytest
from flume_controller import desired
from flume_controller.desired import InvalidSpec, NotCurrent, OutOfBounds, RevisionChanged
from flume_controller.spec import Actor, AttentionSpec, Autoscale, Deadline, decode_spec, encode
from flume_controller.spec_admin import drained, undrained


async def set_to(store, keys, replicas, **options):
    options = {"actor": Actor.USER, "current": None, "now_s": 5.0, **options}
    return (await desired.set_desired(store, keys, replicas, **options))[1]


async def write(store, keys, spec):
    await store.put(keys.spec_attention, encode(spec))
    return spec


async def test_a_change_counts_up_the_generation_and_says_who(store, keys):
    await write(store, keys, AttentionSpec(desired=1))
    spec = await set_to(store, keys, 3, actor=Actor.AUTOSCALER)
    assert (spec.desired, spec.generation, spec.set_by, spec.updated_at_s) == (3, 2, "autoscaler", 5.0)
    assert (await desired.read(store, keys))[0] == spec


async def test_asking_for_what_is_wanted_already_changes_nothing(store, keys):
    before = await write(store, keys, AttentionSpec(desired=1))
    _, revision = await desired.read(store, keys)
    assert await set_to(store, keys, 1) == before
    assert (await desired.read(store, keys))[1] == revision


async def test_a_deadline_is_a_wish_of_its_own_and_gone_with_the_next_count(store, keys):
    await write(store, keys, AttentionSpec(desired=2))
    assert (await set_to(store, keys, 1)).scale_deadline is None
    spec = await set_to(store, keys, 1, deadline_s=30.0)
    assert (spec.generation, spec.scale_deadline) == (3, Deadline(within_s=30.0, by_s=35.0))
    assert (await set_to(store, keys, 1)).generation == 3, "asking for the same count changes nothing"
    assert (await set_to(store, keys, 2)).scale_deadline is None


def test_of_two_drains_of_a_node_the_last_counts():
    spec = AttentionSpec(desired=2)
    spec = drained(spec, "a", deadline_s=30.0, now_s=5.0)
    spec = drained(spec, "b", deadline_s=9.0, now_s=5.0)
    assert spec.drain_deadlines == {
        "a": Deadline(within_s=30.0, by_s=35.0), "b": Deadline(within_s=9.0, by_s=14.0)
    }  # fmt: skip
    spec = drained(spec, "a", now_s=6.0)
    assert (spec.drained, list(spec.drain_deadlines), spec.generation) == (("a", "b"), ["b"], 4)
    assert drained(spec, "a", now_s=7.0) is spec
    many = spec
    for number in range(300):
        many = drained(many, f"n{number}", deadline_s=9.0, now_s=7.0)
    assert len(many.drained) == len(many.drain_deadlines) == 256 and many.drained[-1] == "n299"
    spec = undrained(spec, "b", now_s=8.0)
    assert (spec.drained, spec.drain_deadlines) == (("a",), {})
    assert decode_spec(encode(spec)) == spec


async def test_bounds_are_kept_and_named(store, keys):
    await write(store, keys, AttentionSpec(desired=2, min=1, max=4))
    for replicas in (0, 5):
        with pytest.raises(OutOfBounds, match=f"replicas must be 1 to 4, got {replicas}"):
            await set_to(store, keys, replicas)


async def test_the_precondition_is_checked_even_when_nothing_would_change(store, keys):
    await write(store, keys, AttentionSpec(desired=2))
    with pytest.raises(NotCurrent, match="expected 3 current replicas, the desired number is 2"):
        await set_to(store, keys, 2, current=3)
    assert (await set_to(store, keys, 4, current=2)).desired == 4


async def test_a_change_decided_at_an_old_revision_is_refused(store, keys):
    await write(store, keys, AttentionSpec(desired=2))
    _, revision = await desired.read(store, keys)
    assert (await set_to(store, keys, 4, revision=revision)).desired == 4
    with pytest.raises(RevisionChanged, match=f"expected the spec at revision {revision}, it is at"):
        await set_to(store, keys, 5, revision=revision)
    with pytest.raises(RevisionChanged):
        await set_to(store, keys, 4, revision=revision)
    assert (await desired.read(store, keys))[0].desired == 4


async def test_the_autoscaler_is_turned_on_and_off_and_keeps_the_count(store, keys):
    await write(store, keys, AttentionSpec(desired=2, set_by=Actor.USER))
    on = Autoscale(enabled=True, min=1, max=5)
    _, spec = await desired.set_autoscale(store, keys, on, now_s=6.0)
    assert (spec.desired, spec.set_by, spec.generation, spec.autoscale) == (2, "user", 2, on)
    _, again = await desired.set_autoscale(store, keys, on, now_s=7.0)
    assert again == spec
    _, off = await desired.set_autoscale(store, keys, Autoscale(), now_s=8.0)
    assert not off.autoscale.enabled and off.generation == 3


@pytest.mark.parametrize("actor", [Actor.USER, Actor.KUBERNETES])
async def test_whoever_else_sets_the_count_pauses_the_autoscaler(store, keys, actor):
    await write(store, keys, AttentionSpec(desired=2, autoscale=Autoscale(enabled=True)))
    assert (await set_to(store, keys, 3, actor=Actor.AUTOSCALER)).autoscale.active
    spec = await set_to(store, keys, 3, actor=actor)
    assert spec.autoscale.enabled and spec.autoscale.paused


async def test_of_two_with_the_same_precondition_one_wins(store, keys):
    await write(store, keys, AttentionSpec(desired=2))
    results = await asyncio.gather(
        *(set_to(store, keys, replicas, current=2) for replicas in (3, 4, 5)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, AttentionSpec)]
    assert len(won) == 1 and won[0].generation == 2
    assert all(isinstance(result, AttentionSpec | NotCurrent) for result in results)


async def test_changes_at_the_same_time_are_all_counted(store, keys):
    await write(store, keys, AttentionSpec(desired=1))
    await asyncio.gather(*(set_to(store, keys, replicas) for replicas in (2, 3, 4)))
    assert (await desired.read(store, keys))[0].generation == 4


@pytest.mark.parametrize(
    "value", [b"three", b'{"desired": -1}', b'{"desired": 9, "max": 4}', b"{}"], ids=repr
)
async def test_a_spec_written_by_hand_that_makes_no_sense_is_refused(store, keys, value):
    await store.put(keys.spec_attention, value)
    with pytest.raises(InvalidSpec, match="spec/attention is not a valid spec"):
        await desired.read(store, keys)


async def test_a_scale_repairs_a_spec_that_cannot_be_read(store, keys):
    for value in (b"three", b"[" * 5000):
        await store.put(keys.spec_attention, value)

        def repair(error):
            assert error.value == value and "flumectl scale attention" in str(error)  # noqa: B023
            return AttentionSpec(desired=2, generation=7)

        def change(spec):
            return desired.changed(spec, 2, actor=Actor.USER, current=2, now_s=5.0)

        assert (await desired.edit(store, keys, change, repair=repair, dry_run=True))[1].desired == 2
        assert (await store.get(keys.spec_attention)).value == value
        await desired.edit(store, keys, change, repair=repair)
        assert (await desired.read(store, keys))[0] == AttentionSpec(desired=2, generation=8), (
            "although equal"
        )


async def test_a_spec_of_a_newer_version_can_be_read(store, keys):
    value = encode(AttentionSpec(desired=3)).replace(b"{", b'{"later": true,', 1)
    await store.put(keys.spec_attention, value)
    assert (await desired.read(store, keys))[0].desired == 3
