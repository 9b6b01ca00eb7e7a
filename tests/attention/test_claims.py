"""Who a weight node says it is, against a real etcd: nobody is believed, and what works needs no etcd."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from flume_attention import claims as claims_module
from flume_attention.claims import Claim, Claims, Look, against
from flume_attention.errors import ClaimRefused, ClaimUnverified
from flume_common.epochs import epoch_of
from flume_common.incarnation import follow_incarnation
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State, digest_of, register
from flume_common.store import StoreConfig, connect

sys.path.insert(0, str(Path(__file__).parent.parent))
from etcd_backup import replaceable_etcd

SECRET = b"only w1 knows"
DIGEST = digest_of(SECRET)
HUGE = 2**40


def member(name="w1", secret=SECRET, **changes):
    return Member(
        id=name, role=Role.WEIGHT, state=State.READY, address="127.0.0.1:1", host="h", pid=1, version="0",
        protocol_version=1, started_at_s=time.time(), **changes,
        secret_digest=digest_of(secret) if secret else "",
    )  # fmt: skip


@pytest_asyncio.fixture
async def claims(store, keys):
    async with follow_incarnation(store, keys) as incarnation:
        yield Claims(store, keys, incarnation)


@asynccontextmanager
async def registered(store, keys, claims, **of):
    async with register(store, keys, member(**of), ttl_s=5, incarnation=claims._incarnation) as registration:
        yield registration


def claim_of(registration, secret=SECRET, **changes):
    life = registration.life
    fields = {
        "weight_node": registration.member.id, "epoch": life.epoch, "incarnation": life.incarnation,
        "secret": secret,
    }  # fmt: skip
    return Claim(**(fields | changes))


async def refused(claims, claim, reason):
    before = claims.refused[reason]
    with pytest.raises(ClaimRefused) as error:
        await claims.require(claim, timeout_s=5)
    assert claims.refused[reason] == before + 1, claims.refused
    return str(error.value)


async def test_a_registered_weight_node_is_confirmed_once_and_then_known(store, keys, claims, monkeypatch):
    async with registered(store, keys, claims) as registration:
        claim = claim_of(registration)
        assert await claims.require(claim, timeout_s=5) == epoch_of(0, registration.epoch)

        async def away(*_):
            raise AssertionError("etcd was asked for what is known")

        monkeypatch.setattr(store, "txn", away)
        assert await claims.require(claim, timeout_s=0) == epoch_of(0, registration.epoch)


@pytest.mark.parametrize("epoch", [HUGE, (1 << 48) - 1])
async def test_an_epoch_that_was_never_given_out_is_refused_and_changes_nothing(store, keys, claims, epoch):
    async with registered(store, keys, claims) as registration:
        good = claim_of(registration)
        await claims.require(good, timeout_s=5)
        detail = await refused(claims, claim_of(registration, epoch=epoch), "ahead")
        assert str(epoch) in detail and "w1" in detail
        assert await claims.require(good, timeout_s=0) == epoch_of(0, registration.epoch)
        assert claims.stale == 1


async def test_an_epoch_that_can_be_none_and_a_name_that_can_be_none_are_errors_of_the_caller(claims):
    for claim in (
        Claim("w1", 2**62, "", b""), Claim("w1", -1, "", b""), Claim("w/1", 1, "", b""), Claim("", 1, "", b"")
    ):  # fmt: skip
        with pytest.raises(ValueError):
            await claims.require(claim, timeout_s=5)


async def test_the_right_epoch_without_the_secret_is_another_process(store, keys, claims):
    async with registered(store, keys, claims) as registration:
        for secret in (b"", b"guessed"):
            await refused(claims, claim_of(registration, secret=secret), "secret")
        await claims.require(claim_of(registration), timeout_s=5)
        await refused(claims, claim_of(registration, secret=b""), "secret")


async def test_an_old_epoch_and_a_node_that_is_not_registered_are_refused(store, keys, claims, monkeypatch):
    monkeypatch.setattr(claims_module, "REUSE_S", 0.0)
    await refused(claims, Claim("w1", 5, "", SECRET), "unregistered")
    async with registered(store, keys, claims) as registration:
        old = claim_of(registration)
        await claims.require(old, timeout_s=5)
    async with registered(store, keys, claims) as registration:
        assert await claims.require(old, timeout_s=5), "known, and the engine's fences say whether it is over"
        await claims.require(claim_of(registration), timeout_s=5)
        await refused(claims, old, "older")


async def test_a_refusal_is_read_again_soon_but_not_for_every_message(store, keys, claims, monkeypatch):
    reads = []
    real = store.txn

    async def counted(*args):
        reads.append(args)
        return await real(*args)

    monkeypatch.setattr(store, "txn", counted)
    monkeypatch.setattr(claims_module, "REUSE_S", 0.3)
    bad = [claims.require(Claim("w1", HUGE + n, "", b""), timeout_s=5) for n in range(200)]
    results = await asyncio.gather(*bad, return_exceptions=True)
    assert all(isinstance(result, ClaimRefused) for result in results) and len(reads) <= 3
    async with registered(store, keys, claims) as registration:
        await asyncio.sleep(0.3)
        assert await claims.require(claim_of(registration), timeout_s=5)


async def test_made_up_names_take_no_room(store, keys, claims):
    for number in range(300):
        with pytest.raises(ClaimRefused):
            await claims.require(Claim(f"made-up-{number}", 1, "", b""), timeout_s=5)
    kept = (claims._looks, claims._logged_s, claims._verified)
    assert all(len(items) <= claims_module.MOST_NAMES for items in kept)


async def test_the_end_of_an_epoch_is_believed_only_as_far_as_etcd_says_so(store, keys, claims):
    over = lambda below, incarnation="": claims.over_below("w1", below, incarnation, timeout_s=5)  # noqa: E731
    async with registered(store, keys, claims) as registration:
        epoch, id = registration.epoch, registration.life.incarnation
        assert await over(epoch) == epoch_of(0, epoch), "those before it are over, for sure"
        assert await over(epoch + 1) == 0, "it lives"
        assert await over(HUGE) == 0
        assert await over(epoch, "another") == 0
        assert claims.refused["not_over"] == 3
    gone_at = (await store.range(keys.members)).revision
    assert await over(epoch + 1, id) == epoch_of(0, epoch + 1), "it is gone"
    assert await over(gone_at + 1) == epoch_of(0, gone_at + 1)
    assert await over(HUGE) == 0, "nothing is over that is yet to come"
    assert await over(2**62) == 0


async def test_while_etcd_is_away_what_is_known_counts_and_what_is_new_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_module, "REUSE_S", 0.0)
    keys = Keys("c")
    async with (
        replaceable_etcd(tmp_path / "etcd") as etcd,
        connect(StoreConfig((etcd.endpoint,), timeout_s=1.0)) as store,
        follow_incarnation(store, keys) as incarnation,
    ):
        claims = Claims(store, keys, incarnation)
        async with registered(store, keys, claims) as registration:
            known = claim_of(registration)
            await claims.require(known, timeout_s=5)
            await etcd.kill()
            assert await claims.require(known, timeout_s=0.3)
            assert await claims.over_below("w1", registration.epoch, "", timeout_s=0.3), "says nothing new"
            began_s = time.monotonic()
            with pytest.raises(ClaimUnverified, match=rf"cannot verify epoch {HUGE} of w1: etcd"):
                await claims.require(claim_of(registration, epoch=HUGE), timeout_s=0.5)
            assert await claims.over_below("w1", HUGE, "", timeout_s=0.3) == 0
            assert time.monotonic() - began_s < 2
            assert claims.refused["unverified"] == 2
            waiting = asyncio.create_task(claims.require(claim_of(registration, epoch=HUGE), timeout_s=10))
            await asyncio.sleep(0.2)
            await etcd.start()
            with pytest.raises(ClaimRefused, match="never given out"):
                await waiting


@pytest.mark.parametrize("how", ["wiped", "restored"])
async def test_a_lower_epoch_of_a_new_incarnation_is_taken_and_the_old_ones_are_over(tmp_path, how):
    keys = Keys("c")
    async with (
        replaceable_etcd(tmp_path / "etcd") as etcd,
        connect(StoreConfig((etcd.endpoint,), timeout_s=1.0)) as store,
        follow_incarnation(store, keys) as incarnation,
    ):
        claims = Claims(store, keys, incarnation)
        await etcd.save(tmp_path / "snapshot")
        for number in range(30):
            await store.put(keys.root + f"events/{number}", b"")
        async with registered(store, keys, claims) as registration:
            old = claim_of(registration)
            before, life = await claims.require(old, timeout_s=5), registration.life
            await (etcd.wipe() if how == "wiped" else etcd.restore(tmp_path / "snapshot"))
            while life.ordinal == 0:
                life = await asyncio.wait_for(registration.wait_next(life), 10)
            assert life.epoch < old.epoch, "the test shows nothing"
            after = await claims.require(claim_of(registration), timeout_s=5)
            assert after == epoch_of(1, life.epoch) > before
            await asyncio.sleep(claims_module.REUSE_S)
            await refused(claims, old, "incarnation")


async def test_an_epoch_that_etcd_has_forgotten_is_the_sign_of_a_new_incarnation(store, keys, claims):
    """A node that starts after the restore has a lower epoch, and no memory of what was."""
    async with registered(store, keys, claims) as registration:
        claims._verified["w1"] = claims_module.Verified(
            0, registration.epoch + 50, digest_of(SECRET), store.history.life
        )
        before, life = claims._incarnation.id, registration.life
        with pytest.raises(ClaimRefused):  # of the incarnation that is over now
            await claims.require(claim_of(registration), timeout_s=5)
        assert claims._incarnation.id != before and claims._incarnation.changes == 1
        life = await asyncio.wait_for(registration.wait_next(life), 10)
        await asyncio.sleep(claims_module.REUSE_S)
        assert await claims.require(claim_of(registration), timeout_s=5) == epoch_of(1, life.epoch)


def look(epoch=7, digest=DIGEST, incarnation="i"):
    found = member(secret=b"")
    return Look(0.0, incarnation, msgspec.structs.replace(found, epoch=epoch, secret_digest=digest), 20)


@pytest.mark.parametrize(
    "claim, reason",
    [
        (Claim("w1", 7, "i", SECRET), None),
        (Claim("w1", 7, "", SECRET), None),
        (Claim("w1", 7, "j", SECRET), "incarnation"),
        (Claim("w1", 6, "i", SECRET), "older"),
        (Claim("w1", 8, "i", SECRET), "ahead"),
        (Claim("w1", 7, "i", b"no"), "secret"),
        (Claim("w1", 8, "i", b"no"), "ahead"),
    ],
)
def test_what_speaks_against_a_claim(claim, reason):
    found = against(claim, look())
    assert (found[0] if found else None) == reason


def test_a_member_without_a_digest_is_known_by_its_epoch_alone():
    assert against(Claim("w1", 7, "i", b"any"), look(digest="")) is None
