"""Settings: the schema, what a reader takes from what is written, and writing with a history."""

import asyncio
import logging

import msgspec
import pytest
from flume_common.config_resolve import resolve
from flume_common.config_schema import (
    SETTINGS,
    Contradiction,
    InvalidValue,
    Path,
    Scope,
    UnknownSetting,
    Values,
    format_value,
    parse,
    path_of,
)
from flume_common.config_store import KEPT, PATHS, history, read, set_values
from flume_common.config_watch import watch_config
from flume_common.store import StoreConfig, connect


def set_text(store, keys, **texts):
    """`weight__step_timeout_s="3"`"""
    wanted = {path_of(name.replace("__", "/")): text for name, text in texts.items()}
    return set_values(store, keys, wanted, by="ann@here", now_s=1000.0)


def by_name(entries):
    return {entry.name: entry for entry in entries}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.key)
def test_every_setting_describes_itself_and_takes_its_own_default(setting):
    path = Path(setting.scopes[0], setting.key)
    assert setting.description.endswith(".") and setting.readers
    assert parse(path, format_value(setting.default)) == setting.default
    assert path_of(setting.key) == path


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("weight/tail_margin_tokens", "256", 256),
        ("weight/tail_margin_tokens", " 256\n", 256),  # etcdctl and editors add a newline
        ("weight/step_timeout_s", "2.5", 2.5),
        ("cluster/log_level", "debug", "debug"),
        ("controller/watermark_ratio", "1", 1.0),
    ],
)
def test_text_becomes_a_value_of_the_setting_s_type(name, text, value):
    found = parse(path_of(name), text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("tail_margin_tokens", "0", "a whole number from 1 to 1000000 tokens"),
        ("tail_margin_tokens", "1.5", "a whole number from 1 to 1000000 tokens"),
        ("step_timeout_s", "nan", "a number from 0.1 to 600 s"),
        ("request_deadline_s", "inf", "a number from 1 to 86400 s"),
        ("log_level", "loud", "one of debug, info, warning, error"),
        ("microbatches", "3", "one of auto, 1, 2"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_with_what_would_be_right(name, text, expected):
    with pytest.raises(InvalidValue) as caught:
        parse(path_of(name), text)
    assert str(caught.value) == f"{path_of(name).name} must be {expected}, got {text!r}"


@pytest.mark.parametrize(
    "name", ["tpot_slo", "router/step_timeout_s", "cluster/step_timeout_s", "x/log_level"]
)
def test_a_setting_that_nobody_reads_there_is_unknown(name):
    with pytest.raises(UnknownSetting):
        path_of(name)


def test_a_service_s_own_scope_goes_before_the_cluster_s_and_flags_hold_where_nothing_is_set():
    texts = {"cluster/log_level": "error", "weight/log_level": "debug", "router/request_deadline_s": "9"}
    base = Values(step_timeout_s=3.0)
    weight = resolve(Scope.WEIGHT, texts, base).values
    assert (weight.log_level, weight.step_timeout_s, weight.request_deadline_s) == ("debug", 3.0, 600.0)
    assert resolve(Scope.ROUTER, texts, base).values.log_level == "error"


def test_a_bad_value_leaves_the_last_good_one_and_is_reported_until_it_is_mended():
    first = resolve(Scope.WEIGHT, {"weight/step_timeout_s": "4"}, Values())
    bad = resolve(Scope.WEIGHT, {"weight/step_timeout_s": "soon"}, Values(), first)
    assert bad.values.step_timeout_s == 4.0
    assert bad.errors.keys() == {"weight/step_timeout_s"}
    still_bad = resolve(Scope.WEIGHT, {"weight/step_timeout_s": "never"}, Values(), bad)
    assert still_bad.values.step_timeout_s == 4.0
    assert resolve(Scope.WEIGHT, {}, Values(), still_bad).values == Values(), "deleted, not bad"
    mended = resolve(Scope.WEIGHT, {"weight/step_timeout_s": "5"}, Values(), still_bad)
    assert (mended.values.step_timeout_s, mended.errors) == (5.0, {})


def test_a_bad_value_does_not_blind_a_reader_to_the_others_nor_concern_other_services():
    texts = {"weight/step_timeout_s": "x", "weight/tail_margin_tokens": "7", "router/request_deadline_s": "x"}
    weight = resolve(Scope.WEIGHT, texts, Values())
    assert weight.values.tail_margin_tokens == 7
    assert weight.errors.keys() == {"weight/step_timeout_s"}


def test_crossed_bounds_leave_both_as_they_were():
    first = resolve(
        Scope.CONTROLLER, {"controller/min_replicas": "2", "controller/max_replicas": "4"}, Values()
    )
    crossed = resolve(
        Scope.CONTROLLER, {"controller/min_replicas": "5", "controller/max_replicas": "4"}, Values(), first
    )
    assert (crossed.values.min_replicas, crossed.values.max_replicas) == (2, 4)
    assert crossed.errors.keys() == {"controller/min_replicas", "controller/max_replicas"}


async def test_what_is_set_is_read_back_with_who_set_it_and_what_it_was(store, keys):
    (change,) = await set_text(store, keys, weight__step_timeout_s="3.0")
    assert (change.before, change.after) == (None, "3")
    await set_values(store, keys, {path_of("step_timeout_s"): "4"}, by="bob@there", now_s=2000.0)
    entry = by_name(await read(store, keys))["weight/step_timeout_s"]
    assert (entry.text, entry.error, entry.last.set_by) == ("4", "", "bob@there")
    assert [
        (item.value, item.previous, item.set_by, item.set_at_s)
        for item in await history(store, keys, path_of("step_timeout_s"))
    ] == [("3", None, "ann@here", 1000.0), ("4", "3", "bob@there", 2000.0)]


async def test_unsetting_is_a_change_of_its_own_and_setting_the_same_is_none(store, keys):
    await set_text(store, keys, weight__step_timeout_s="3")
    assert await set_text(store, keys, weight__step_timeout_s="3.00") == []
    await set_text(store, keys, weight__step_timeout_s=None)
    assert by_name(await read(store, keys))["weight/step_timeout_s"].text is None
    records = await history(store, keys, path_of("step_timeout_s"))
    assert [record.value for record in records] == ["3", None]


async def test_a_refused_value_changes_nothing_not_even_the_others_of_its_call(store, keys):
    before = (await store.range(keys.root)).items
    with pytest.raises(InvalidValue):
        await set_text(store, keys, weight__step_timeout_s="3", weight__tail_margin_tokens="-1")
    with pytest.raises(Contradiction):
        await set_text(store, keys, min_replicas="5", max_replicas="4")
    assert (await store.range(keys.root)).items == before
    await set_text(store, keys, max_replicas="4")
    with pytest.raises(Contradiction):
        await set_text(store, keys, min_replicas="5")
    await set_text(store, keys, min_replicas="5", max_replicas="6")


async def test_a_dry_run_checks_and_writes_nothing(store, keys):
    wanted = {path_of("step_timeout_s"): "3"}
    (change,) = await set_values(store, keys, wanted, by="ann", now_s=1.0, dry_run=True)
    assert change.after == "3"
    assert not (await store.range(keys.root)).items


async def test_the_history_keeps_the_last_ones(store, keys):
    for number in range(1, KEPT + 6):
        await set_text(store, keys, tail_margin_tokens=str(number))
    records = await history(store, keys, path_of("tail_margin_tokens"))
    assert [record.value for record in records] == [str(number) for number in range(6, KEPT + 6)]


async def test_changes_made_at_once_all_count_and_none_is_lost_from_the_history(store, keys):
    await asyncio.gather(*(set_text(store, keys, tail_margin_tokens=str(n)) for n in (10, 20, 30)))
    records = await history(store, keys, path_of("tail_margin_tokens"))
    assert sorted(record.value for record in records) == ["10", "20", "30"]
    assert [record.previous for record in records[1:]] == [record.value for record in records[:-1]]


class Interrupted:
    """A store in which somebody else is quicker, once."""

    def __init__(self, store, quicker):
        self._store, self._quicker = store, quicker

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def txn(self, *args):
        if (quicker := self._quicker) is not None:
            self._quicker = None
            await quicker()
        return await self._store.txn(*args)


async def test_two_changes_that_contradict_each_other_never_both_succeed(store, keys):
    async def quicker():
        await set_text(store, keys, max_replicas="4")

    with pytest.raises(Contradiction):
        await set_text(Interrupted(store, quicker), keys, min_replicas="5")


async def test_a_value_written_by_hand_meanwhile_is_what_the_record_calls_previous(store, keys):
    async def quicker():
        await store.put(keys.setting("weight", "step_timeout_s"), b"7")

    await set_text(Interrupted(store, quicker), keys, step_timeout_s="3")
    (record,) = await history(store, keys, path_of("step_timeout_s"))
    assert (record.previous, record.value) == ("7", "3")


async def test_a_value_written_by_hand_is_shown_as_wrong_and_as_nobody_s(store, keys):
    await set_text(store, keys, step_timeout_s="3")
    await store.put(keys.setting("weight", "step_timeout_s"), b"soon")
    await store.put(keys.setting("weight", "colour"), b"blue")
    entries = by_name(await read(store, keys))
    assert (
        entries["weight/step_timeout_s"].text == "soon"
        and "must be a number" in entries["weight/step_timeout_s"].error
    )
    assert entries["weight/step_timeout_s"].last is None
    assert entries["weight/colour"].setting is None and "no setting" in entries["weight/colour"].error
    await set_text(store, keys, step_timeout_s="5")
    assert (await history(store, keys, path_of("step_timeout_s")))[-1].previous == "soon"


async def test_a_history_that_cannot_be_read_is_begun_anew(store, keys):
    await store.put(keys.setting_history("weight", "step_timeout_s"), b"{")
    await set_text(store, keys, step_timeout_s="5")
    assert [record.value for record in await history(store, keys, path_of("step_timeout_s"))] == ["5"]


async def test_every_setting_is_listed_once_where_it_would_be_set(store, keys):
    names = [entry.name for entry in await read(store, keys)]
    assert sorted(names) == sorted(path_of(key).name for key in SETTINGS)
    assert len(PATHS) > len(names)


async def test_a_live_view_follows_keeps_the_last_good_value_and_says_so(etcd_endpoint, keys, caplog):
    caplog.set_level(logging.INFO)
    async with (
        connect(StoreConfig((etcd_endpoint,))) as store,
        watch_config(store, keys, Scope.WEIGHT, Values(tail_margin_tokens=64)) as config,
    ):
        assert config.current == Values(tail_margin_tokens=64)
        version = config.version
        await set_text(store, keys, step_timeout_s="3")
        version = await asyncio.wait_for(config.wait_newer(version), 5)
        assert config.current.step_timeout_s == 3.0 and not config.errors
        await store.put(keys.setting("weight", "step_timeout_s"), b"soon")
        version = await asyncio.wait_for(config.wait_newer(version), 5)
        assert config.current.step_timeout_s == 3.0
        assert "must be a number" in config.errors["weight/step_timeout_s"]
        await set_text(store, keys, step_timeout_s="7")
        await asyncio.wait_for(config.wait_newer(version), 5)
        assert (config.current.step_timeout_s, config.errors) == (7.0, {})


async def test_the_log_level_takes_effect_at_once(store, keys):
    root, before = logging.getLogger(), logging.getLogger().level
    try:
        async with watch_config(store, keys, Scope.ROUTER, Values(log_level="info")) as config:
            await set_text(store, keys, log_level="error", router__log_level="debug")
            async with asyncio.timeout(5):
                while root.level != logging.DEBUG:  # noqa: ASYNC110 # a logger tells nobody
                    await asyncio.sleep(0.01)
            assert config.current.log_level == "debug"
    finally:
        root.setLevel(before)


def test_values_are_the_schema():
    assert tuple(SETTINGS) == Values.__struct_fields__
    assert msgspec.to_builtins(Values()) == {key: setting.default for key, setting in SETTINGS.items()}
