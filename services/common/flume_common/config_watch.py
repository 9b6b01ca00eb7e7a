"""A service's settings, live: followed in etcd while a block runs, bad values refused and logged.

    async with watch_config(store, keys, Scope.WEIGHT, Values(step_timeout_s=args.step_timeout_s)) as config:
        config.current.step_timeout_s

While etcd is away the last settings hold.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NoReturn

import structlog

from flume_common.config_resolve import Resolved, resolve
from flume_common.config_schema import Scope, Values
from flume_common.keys import Keys
from flume_common.store import KeyValue, Store, View, live
from flume_common.tasks import background
from flume_common.telemetry import set_level

log = structlog.get_logger(__name__)


class LiveConfig:
    """Level-triggered like View: read `current` whenever you like; `wait_newer` says that it is worth it."""

    def __init__(self, texts: View[str, str], scope: Scope, base: Values) -> None:
        self._texts = texts
        self._scope = scope
        self._base = base
        self._version = -1
        self._resolved = Resolved(base)
        self._look()

    @property
    def current(self) -> Values:
        """The settings now. Replaced, never altered."""
        self._look()
        return self._resolved.values

    @property
    def errors(self) -> Mapping[str, str]:
        """What is written for us and does not count, and why; by `<scope>/<key>`."""
        self._look()
        return self._resolved.errors

    @property
    def version(self) -> int:
        return self._texts.version

    async def wait_newer(self, version: int) -> int:
        """Waits until `version` is outdated; returns the present one."""
        return await self._texts.wait_newer(version)

    def _look(self) -> None:
        if self._texts.version == self._version:
            return
        self._version = self._texts.version
        before = self._resolved
        self._resolved = resolve(self._scope, self._texts.current, self._base, before)
        for name, error in self._resolved.errors.items():
            if before.errors.get(name) != error:
                log.error("setting_refused", setting=name, detail=error)
        changed = _changed(before.values, self._resolved.values)
        if changed:
            log.info("settings_changed", **changed)


def _changed(before: Values, after: Values) -> dict[str, object]:
    names = Values.__struct_fields__
    return {name: getattr(after, name) for name in names if getattr(before, name) != getattr(after, name)}


@asynccontextmanager
async def watch_config(
    store: Store, keys: Keys, scope: Scope, base: Values | None = None
) -> AsyncIterator[LiveConfig]:
    """The settings of a service of `scope`. `base`: what holds where nothing is set, e.g. its own flags.

    The log level is applied here. Entering waits for the first state, for as long as etcd is away.
    """

    def decode(kv: KeyValue) -> tuple[str, str]:
        return kv.key.removeprefix(keys.config), kv.value.decode(errors="replace")

    texts: View[str, str] = View(store, decode)
    async with live(texts, store, keys.config):
        config = LiveConfig(texts, scope, base or Values())
        async with background(log_level=_apply_log_level(config)):
            yield config


async def follow_log_level(store: Store, keys: Keys, scope: Scope, level: str) -> NoReturn:
    """For a service that has no other setting: a task beside its work. `level` is that of its flag."""
    base = Values(log_level=level)  # type: ignore[arg-type] # a choice of the command line
    async with watch_config(store, keys, scope, base) as config:
        version = config.version
        while True:
            version = await config.wait_newer(version)


async def _apply_log_level(config: LiveConfig) -> NoReturn:
    version = -1
    while True:
        version = await config.wait_newer(version)
        set_level(config.current.log_level)
