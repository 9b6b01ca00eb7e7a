"""What operators wrote survives an etcd that lost it, and does not override one that has its own."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from flume_common import config_store
from flume_common.config_schema import path_of
from flume_common.election import Deposed
from flume_common.incarnation import Record, follow_incarnation
from flume_common.keys import Keys
from flume_common.store import StoreConfig, connect
from flume_controller import desired
from flume_controller.fleet import AttentionFleet
from flume_controller.last_known import follow_last_known
from flume_controller.spec import Actor, AttentionSpec

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from etcd_backup import replaceable_etcd
from fleet_fakes import FakeNodes, FakeProvider
from office import Office

KEYS = Keys("c")
STEP = path_of("weight/step_timeout_s")


class Controller:
    """What one controller process has of this, and a fleet in each term."""

    def __init__(self, store, incarnation, last_known):
        self.store, self.incarnation, self.last_known = store, incarnation, last_known
        self.told = []

    async def lead(self, office=None):
        """One pass, of a new term where none is given."""
        office = office or await Office.take(self.store, KEYS)
        fleet = AttentionFleet(
            self.store, KEYS, office.fenced, FakeProvider(time.time), FakeNodes(), AttentionSpec(desired=1),
            tell=lambda *happenings: self.told.extend(happenings), last_known=self.last_known,
        )  # fmt: skip
        await fleet.reconcile()

    @property
    def news(self):
        return [item.message for item in self.told if item.reason == "StoreReplaced"]

    async def scale(self, replicas):
        await desired.set_desired(
            self.store, KEYS, replicas, actor=Actor.USER, current=None, now_s=time.time()
        )
        await self.seen()

    async def set(self, text):
        await config_store.set_values(self.store, KEYS, {STEP: text}, by="test", now_s=time.time())
        await self.seen()

    async def setting(self):
        found = await self.store.get(KEYS.setting(STEP.scope, STEP.key))
        return found.value.decode() if found else None

    async def desired(self):
        spec, _ = await desired.read(self.store, KEYS)
        return spec.desired if spec else None

    async def seen(self):
        """Until its views have what was written."""
        await asyncio.sleep(0.2)


@asynccontextmanager
async def controller(endpoint):
    async with (
        connect(StoreConfig((endpoint,), timeout_s=1.0)) as store,
        follow_incarnation(store, KEYS) as incarnation,
        follow_last_known(store, KEYS, incarnation) as last_known,
    ):
        yield Controller(store, incarnation, last_known)


@pytest.fixture
async def etcd(tmp_path):
    async with replaceable_etcd(tmp_path / "etcd") as made:
        yield made


async def another_incarnation(*controllers, after=0):
    async with asyncio.timeout(10):
        for one in controllers:
            await one.incarnation.wait_newer(after)
            await one.seen()


async def test_a_spec_and_settings_that_etcd_lost_are_written_again_by_whoever_leads(etcd):
    async with controller(etcd.endpoint) as first, controller(etcd.endpoint) as second:
        await first.lead()
        await first.scale(3)
        await first.set("7")
        await etcd.wipe()
        await another_incarnation(first, second)
        await second.lead()  # it never did before
        assert (await second.desired(), await second.setting()) == (3, "7")
        assert "set_by" in (await second.store.get(KEYS.setting_history(STEP.scope, STEP.key))).value.decode()
        assert len(second.news) == 1 and "3 attention nodes" in second.news[0] and "again" in second.news[0]
        spec, _ = await desired.read(second.store, KEYS)
        assert spec.generation > 2 and spec.set_by is Actor.USER
        await second.lead()
        assert len(second.news) == 1, "told once"

        await etcd.wipe()
        await another_incarnation(first, second, after=1)
        await second.lead()
        assert (await second.desired(), await second.setting()) == (3, "7"), "as often as it takes"


async def test_an_etcd_with_a_spec_of_its_own_says_what_is_wanted(etcd, tmp_path):
    async with controller(etcd.endpoint) as one:
        await one.lead()
        await one.scale(2)
        await etcd.save(tmp_path / "snapshot")
        await one.scale(4)
        await one.set("7")
        await etcd.restore(tmp_path / "snapshot")
        await another_incarnation(one)
        await one.lead()
        assert (await one.desired(), await one.setting()) == (2, None)
        assert len(one.news) == 1 and "2 attention nodes" in one.news[0] and "found there" in one.news[0]


async def test_another_clusters_etcd_is_news_however_old_its_incarnation_is(etcd):
    async with controller(etcd.endpoint) as one:
        await one.lead()
        await one.scale(2)
        foreign = Record(id="foreign", created_at_s=1.0)
        await one.store.put(KEYS.incarnation, msgspec.json.encode(foreign))
        await another_incarnation(one)
        await one.lead()
        assert one.incarnation.id == "foreign"
        assert len(one.news) == 1 and "another one" in one.news[0]


async def test_a_term_that_is_over_leaves_the_telling_to_the_next_one(etcd, tmp_path):
    """Events are written under the term's key, which is not in the other etcd."""
    async with controller(etcd.endpoint) as one:
        await one.lead()
        await etcd.save(tmp_path / "snapshot")
        office = await Office.take(one.store, KEYS)
        await one.lead(office)
        await etcd.restore(tmp_path / "snapshot")
        await another_incarnation(one)
        with pytest.raises(Deposed):
            await one.lead(office)
        assert one.news == []
        await one.lead()
        assert len(one.news) == 1


async def test_a_setting_that_an_operator_took_back_stays_away(etcd):
    async with controller(etcd.endpoint) as one:
        await one.lead()
        await one.scale(2)
        await one.set("7")
        await one.set(None)
        assert await one.last_known.lost_settings() == [] and one.incarnation.changes == 0
        await etcd.wipe()
        await another_incarnation(one)
        await one.lead()
        assert (await one.desired(), await one.setting()) == (2, None)


async def test_what_is_set_in_the_new_etcd_before_the_rest_is_back_stays(etcd):
    async with controller(etcd.endpoint) as one:
        await one.lead()
        await one.scale(2)
        await one.set("7")
        await etcd.wipe()
        await another_incarnation(one)
        await one.set("9")
        await one.lead()
        assert (await one.desired(), await one.setting()) == (2, "9")


async def test_a_spec_deleted_by_hand_is_written_again_without_any_fuss(etcd):
    async with controller(etcd.endpoint) as one:
        await one.lead()
        await one.scale(2)
        await one.store.delete(KEYS.spec_attention)
        await one.seen()
        await one.lead()
        assert await one.desired() == 2 and one.news == [] and one.incarnation.changes == 0


async def test_where_nothing_is_known_the_first_spec_is_the_default(etcd):
    async with controller(etcd.endpoint) as one:
        await one.lead()
        assert await one.desired() == 1 and one.news == []
