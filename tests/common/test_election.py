"""Elections on real etcd. Its shortest lease is 2 s."""

import asyncio
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
from flume_common.election import Candidate, Deposed, Fenced, Place, Timing, place
from flume_common.store import KeyValue, Put, StoreConfig, absent, connect, mod_revision

QUICK = Timing(lease_s=3.0, renew_deadline_s=1.0, retry_s=0.3)


class Player:
    """A candidate, and what it did in office."""

    def __init__(self, store, keys, id, timing=QUICK):
        self.candidate = Candidate(store, keys.election, id, timing)
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended_at_s = 0.0
        self.term = None

    async def lead(self, term):
        self.term = term
        self.ended.clear()
        self.began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.began.clear()
            self.ended_at_s = time.monotonic()
            self.ended.set()


@asynccontextmanager
async def running(player):
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(player.candidate.campaign(player.lead))
        try:
            yield task
        finally:
            task.cancel()


async def within(timeout_s, awaitable):
    async with asyncio.timeout(timeout_s):
        return await awaitable


@pytest.mark.parametrize(
    "lease_s, renew_deadline_s, retry_s, complaint",
    [
        (10, 10, 2, "the lease duration .10 s. must be longer than the renew deadline"),
        (15, 2.4, 2, "the renew deadline .2.4 s. must be longer than 1.2 times"),
        (15, 10, 0, "the retry period must be above 0"),
    ],
)
def test_timings_that_could_overlap_two_leaders_are_refused(lease_s, renew_deadline_s, retry_s, complaint):
    with pytest.raises(ValueError, match=complaint):
        Timing(lease_s, renew_deadline_s, retry_s)


def test_the_defaults_are_those_of_client_go():
    assert Timing() == Timing(15, 10, 2)


def key_value(epoch):
    return KeyValue(f"e/{epoch}", b"", epoch, epoch, 1, lease=epoch)


@pytest.mark.parametrize(
    "seen_at, epochs, expected",
    [
        (4, [3], Place.UNSEEN),
        (5, [3, 5], Place.WAITING),
        (6, [5, 6], Place.FIRST),
        (7, [3], Place.GONE),
        (7, [], Place.GONE),
    ],
)
def test_the_place_of_the_candidate_with_epoch_5(seen_at, epochs, expected):
    candidates = {item.key: item for item in map(key_value, epochs)}
    assert place(candidates, seen_at, "e/5", 5) is expected


def test_a_key_that_was_created_anew_is_not_ours():
    assert place({"e/5": key_value(8)}, 9, "e/5", 5) is Place.GONE


async def test_candidates_lead_one_at_a_time_in_the_order_of_their_coming(store, keys):
    players = [Player(store, keys, f"controller-{number}") for number in range(3)]
    async with asyncio.TaskGroup() as tasks:
        campaigns = []
        for count, player in enumerate(players, 1):
            campaigns.append(tasks.create_task(player.candidate.campaign(player.lead)))
            while len((await store.range(keys.election)).items) < count:  # noqa: ASYNC110 - etcd and processes are what is waited for
                await asyncio.sleep(0.01)
        for number, player in enumerate(players):
            # Well below the lease: a leader that is asked to go lets the next one begin at once.
            await within(1.5, player.began.wait())
            assert [p.candidate.leading for p in players].count(True) == 1
            assert player.candidate.leader == f"controller-{number}"
            campaigns[number].cancel()
    epochs = [player.term.epoch for player in players]
    assert epochs == sorted(set(epochs)), "each term has a higher epoch"
    assert (await store.range(keys.election)).items == {}


async def test_a_leader_that_cannot_renew_stops_in_time_and_stands_again(etcd_endpoint, keys, gate):
    async with gate(etcd_endpoint) as wire, connect(StoreConfig((wire.address,))) as store:
        player = Player(store, keys, "controller-1")
        async with running(player):
            await within(5, player.began.wait())
            first = player.term
            await asyncio.sleep(0.5)
            wire.stall()
            cut_at_s = time.monotonic()
            await within(2, player.ended.wait())
            assert 0.5 < player.ended_at_s - cut_at_s < 1.3, "by its own clock, well before the lease ends"
            assert not first.held and not player.candidate.leading
            with pytest.raises(Deposed):
                first.require()
            await wire.shut()
            await wire.open()
            await within(10, player.began.wait())
            assert player.term.epoch > first.epoch and player.candidate.terms == 2


async def test_a_leader_whose_key_is_gone_stops_and_the_next_one_leads(store, keys):
    first, second = Player(store, keys, "controller-1"), Player(store, keys, "controller-2")
    async with running(first):
        await within(5, first.began.wait())
        async with running(second):
            while len((await store.range(keys.election)).items) < 2:  # noqa: ASYNC110 - etcd and processes are what is waited for
                await asyncio.sleep(0.01)
            await store.delete(first.term.key)
            await within(2, first.ended.wait())
            await within(2, second.began.wait())


async def test_writes_of_a_term_that_is_over_are_refused_and_counted(store, keys):
    player = Player(store, keys, "controller-1")
    async with running(player):
        await within(5, player.began.wait())
        fenced = Fenced(store, player.candidate, player.term)
        await fenced.put(keys.spec_attention, b"1")
        taken = await fenced.txn([absent(keys.spec_attention)], [Put(keys.spec_attention, b"2")])
        assert not taken.succeeded and taken.results == ()
        await store.delete(player.term.key)
        written = (await store.get(keys.spec_attention)).mod_revision
        with pytest.raises(Deposed):
            await fenced.txn([mod_revision(keys.spec_attention, written)], [Put(keys.spec_attention, b"3")])
    assert (await store.get(keys.spec_attention)).value == b"1"
    assert player.candidate.epoch_rejected == 1


async def stand_in(store, keys, id, started_at_s):
    """A candidate that was killed: its key stays as long as its lease."""
    lease = (await store.grant(60)).id
    who = msgspec.json.encode({"id": id, "started_at_s": started_at_s})
    await store.put(f"{keys.election}{lease:x}", who, lease)


async def test_a_restarted_candidate_does_not_wait_for_its_own_old_lease(store, keys):
    await stand_in(store, keys, "controller-1", started_at_s=time.time() - 5)
    player = Player(store, keys, "controller-1")
    async with running(player):
        await within(2, player.began.wait())


@pytest.mark.parametrize(
    "id, age_s",
    [("controller-2", 5), ("controller-1", -5)],
    ids=["another one", "a younger namesake"],
)
async def test_it_waits_for_others(store, keys, id, age_s):
    await stand_in(store, keys, id, started_at_s=time.time() - age_s)
    player = Player(store, keys, "controller-1")
    async with running(player):
        with pytest.raises(TimeoutError):
            await within(0.7, player.began.wait())
        assert player.candidate.leader == id


async def test_a_term_that_its_own_work_finds_over_ends_and_other_errors_end_the_candidate(store, keys):
    candidate = Candidate(store, keys.election, "controller-1", QUICK)

    async def lead(term):
        if candidate.terms == 1:
            raise Deposed(term.epoch)
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await within(5, candidate.campaign(lead))
    assert candidate.terms == 2 and (await store.range(keys.election)).items == {}
