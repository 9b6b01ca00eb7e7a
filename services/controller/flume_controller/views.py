"""Live views of the spec and the status in etcd; for those who only want to know."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flume_common.keys import Keys
from flume_common.store import KeyValue, Store, View, live

from flume_controller.spec import AttentionSpec, AttentionStatus, decode_spec, decode_status


class Wish(View[str, AttentionSpec]):
    """`spec/attention`."""

    @property
    def spec(self) -> AttentionSpec | None:
        """None when there is none yet, or only one that can't be read."""
        return self.current.get("attention")


class Report(View[str, AttentionStatus]):
    """`status/attention`."""

    @property
    def status(self) -> AttentionStatus | None:
        return self.current.get("attention")


@asynccontextmanager
async def watch_spec(store: Store, keys: Keys) -> AsyncIterator[Wish]:
    """Entering waits for the first state, for as long as etcd is away."""
    wish = Wish(store, lambda kv: (_name(kv), decode_spec(kv.value)))
    async with live(wish, store, _prefix(keys.spec_attention)):
        yield wish


@asynccontextmanager
async def watch_status(store: Store, keys: Keys) -> AsyncIterator[Report]:
    """Entering waits for the first state, for as long as etcd is away."""
    report = Report(store, lambda kv: (_name(kv), decode_status(kv.value)))
    async with live(report, store, _prefix(keys.status_attention)):
        yield report


def _prefix(key: str) -> str:
    return key[: key.rindex("/") + 1]


def _name(kv: KeyValue) -> str:
    return kv.key[kv.key.rindex("/") + 1 :]
