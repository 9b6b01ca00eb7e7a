"""etcd comes back as another one under load: empty, as it was once, or another cluster's. No hand helps."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from flume_common.incarnation import Record
from flume_common.keys import Keys
from flume_common.membership import Member, Role, State
from flume_common.routes import Route
from flume_common.store import StoreConfig, connect
from flume_controller.spec import AttentionSpec, encode

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import oracle
from clusters import Cluster, running
from etcd_backup import ReplaceableEtcd, replaceable_etcd
from metrics_lint import values
from streams import Stream

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
KEYS = Keys("default")
LONG, SHORT = (oracle.PLAIN["a question"], 150), (oracle.PLAIN["five tokens"], 6)
SERVED_WITHIN_S = 15.0


class Loop:
    """An event loop of its own, for what is asynchronous in a test that is not."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=60)


@pytest.fixture(scope="module")
def loop() -> Loop:
    return Loop()


@contextmanager
def etcd_in(loop: Loop, folder: Path) -> Iterator[ReplaceableEtcd]:
    scope = replaceable_etcd(folder)
    etcd = loop.run(scope.__aenter__())
    try:
        yield etcd
    finally:
        loop.run(scope.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def etcd(loop, tmp_path_factory) -> Iterator[ReplaceableEtcd]:
    with etcd_in(loop, tmp_path_factory.mktemp("etcd") / "ours") as made:
        yield made


@pytest.fixture(scope="module")
def cluster(etcd, tmp_path_factory) -> Iterator[Cluster]:
    flags = ("--dtype", "float32", "--attention", "2", "--etcd", etcd.endpoint)
    with running(tmp_path_factory.mktemp("cluster"), *flags) as made:
        made.flumectl("config", "set", "weight/step_timeout_s=11")
        yield made


@pytest.fixture(scope="module")
def undisturbed(cluster) -> dict[str, list[int]]:
    """The tokens of an undisturbed run."""
    return {prompt: ask(cluster, prompt, tokens) for prompt, tokens in (LONG, SHORT)}


def ask(cluster: Cluster, prompt: str, tokens: int) -> list[int]:
    return Stream(cluster.router(), prompt, tokens).result()


class Asking(threading.Thread):
    """Asks again and again, and notes when each answer was there, and whether it was the right one."""

    def __init__(self, cluster: Cluster, undisturbed: dict[str, list[int]]) -> None:
        super().__init__(daemon=True)
        self.answered_s: list[float] = []
        self.wrong: list[list[int]] = []
        self.failed: list[Exception] = []
        self._router, self._truth = cluster.router(), undisturbed
        self._done = threading.Event()

    def __enter__(self) -> Asking:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.is_set():
            began_s = time.monotonic()
            try:
                tokens = Stream(self._router, *SHORT, timeout_s=30).result()
            except Exception as error:
                self.failed.append(error)
                continue
            self.answered_s.append(began_s)
            if tokens != self._truth[SHORT[0]]:
                self.wrong.append(tokens)
            time.sleep(0.2)


def counters(cluster: Cluster, name: str) -> dict[str, float]:
    """Of every process that answers, by node, summed over labels."""
    found = {}
    for node in cluster.get("nodes"):
        try:
            page = values(httpx.get(f"http://{node['metrics_address']}/metrics").text)
        except httpx.HTTPError:
            continue  # it leaves, or another cluster's record is still there
        found[node["id"]] = sum(value for key, value in page.items() if key.startswith(name))
    return found


def a_stranger(loop: Loop, folder: Path, path: Path) -> None:
    """A snapshot of another cluster of the same name: one node is wanted, and one route came from a crash."""

    async def fill(endpoint: str) -> None:
        async with connect(StoreConfig((endpoint,))) as store:
            lease = (await store.grant(10)).id
            record = Record(id="0123456789abcdef", created_at_s=1.0)
            await store.put(KEYS.incarnation, msgspec.json.encode(record))
            await store.put(KEYS.spec_attention, encode(AttentionSpec(desired=1, generation=40)))
            route = Route.start("of-a-stranger", "weight-1", 5, "attention-9")
            await store.put(KEYS.route("of-a-stranger"), msgspec.json.encode(route), lease)
            for role, name in ((Role.ATTENTION, "attention-1"), (Role.WEIGHT, "weight-1")):
                member = Member(
                    id=name, role=role, state=State.READY, address="127.0.0.1:1", host="h", pid=1,
                    version="0", protocol_version=1, started_at_s=1.0, model="smollm2-135m",
                )  # fmt: skip
                await store.put(KEYS.member(role, name), member.encode(), lease)
            for _ in range(2000):  # further on than ours
                await store.put(f"{KEYS.root}filler", b"")

    with etcd_in(loop, folder) as other:
        loop.run(fill(other.endpoint))
        loop.run(other.save(path))


@pytest.mark.parametrize("how", ["wiped", "restored", "restored with another id", "replaced"])
def test_streams_go_on_and_new_requests_are_served(loop, etcd, cluster, undisturbed, tmp_path, how):
    desired = 1 if how == "replaced" else 2
    snapshot = tmp_path / "snapshot"
    if how == "replaced":
        a_stranger(loop, tmp_path / "stranger", snapshot)
    elif how != "wiped":
        loop.run(etcd.save(snapshot))
    before = {node["id"]: (node["pid"], node["epoch"]) for node in cluster.get("nodes")}
    changes = counters(cluster, "flume_store_incarnations_total")
    recomputed = sum(counters(cluster, "flume_kv_recomputed_tokens_total").values())
    router = cluster.router()  # which is not listed for a moment
    with Asking(cluster, undisturbed) as asking:
        streams = [Stream(router, *LONG) for _ in range(2)]
        for stream in streams:
            stream.wait_for(40)
        if how == "wiped":
            loop.run(etcd.wipe(away_s=2))
        else:
            token = "etcd-cluster" if how == "restored" else "another"
            loop.run(etcd.restore(snapshot, token=token, away_s=2))
        back_s = time.monotonic()
        late = Stream(router, *SHORT, timeout_s=SERVED_WITHIN_S)
        assert late.result() == undisturbed[SHORT[0]]
        served_s = time.monotonic() - back_s
        cluster.until(
            lambda: (
                all(
                    count > changes.get(node, 0)
                    for node, count in counters(cluster, "flume_store_incarnations_total").items()
                )
                and len(counters(cluster, "flume_store_incarnations_total")) >= desired + 3
            ),
            SERVED_WITHIN_S,
            "all have seen that etcd is another one, and registered again",
        )
        listed_s = time.monotonic() - back_s
        assert [stream.result() for stream in streams] == [undisturbed[LONG[0]]] * 2
    gaps_s = [stream.longest_gap_s for stream in streams]
    print(
        f"{how}: served {served_s:.1f} s after etcd was back, all registered after {listed_s:.1f} s; "
        f"longest gap of a stream {max(gaps_s):.2f} s; {len(asking.answered_s)} requests, "
        f"{len(asking.failed)} failed, {len(asking.wrong)} wrong"
    )
    assert asking.failed == asking.wrong == []
    assert sum(counters(cluster, "flume_kv_recomputed_tokens_total").values()) == recomputed, "no lane broke"
    cluster.until(lambda: cluster.settled() and cluster.status().desired == desired, 30, "as desired")
    cluster.until(lambda: not cluster.routes(), 20, "no route left")
    after = {node["id"]: (node["pid"], node["epoch"]) for node in cluster.get("nodes")}
    assert all(after[node][0] == before[node][0] for node in after), "nobody was restarted"
    if how == "wiped":
        assert "11" in cluster.flumectl("config", "get", "weight/step_timeout_s").stdout
    assert "StoreReplaced" in cluster.flumectl("events").stdout
    assert cluster.status().incarnation.id in cluster.flumectl("status", "-o", "json").stdout
    assert ask(cluster, *SHORT) == undisturbed[SHORT[0]]
    if desired == 1:
        cluster.scale(2)
        cluster.until(cluster.settled, 30, "two again")
