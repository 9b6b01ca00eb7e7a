"""Settings in etcd: read, checked before they are written, and who changed them when.

Each value is plain text at `config/<scope>/<key>`, so that a person can read and write it with etcdctl,
too; its last `KEPT` changes lie beside it at `config-history/<scope>/<key>`. Both are written in one
transaction that compares the revisions they were decided at. What is written by hand leaves no record:
the next change names it as what was there before.

* ConfigError (config_schema.py)
  + ConfigConflict   others kept changing settings at the same time
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from flume_common.config_resolve import chosen
from flume_common.config_schema import (
    SETTINGS,
    ConfigError,
    Path,
    Scope,
    Setting,
    UnknownSetting,
    Value,
    Values,
    contradiction,
    format_value,
    parse,
    path_of,
)
from flume_common.keys import Keys
from flume_common.store import Compare, Delete, KeyValue, Op, Put, Snapshot, Store, mod_revision

log = structlog.get_logger(__name__)

KEPT = 20
"""Changes remembered of each setting."""
_ATTEMPTS = 5

PATHS: Sequence[Path] = tuple(
    Path(scope, setting.key) for setting in SETTINGS.values() for scope in setting.scopes
)
"""Every place where a setting may be set."""


class ConfigConflict(ConfigError):
    def __init__(self) -> None:
        super().__init__(f"settings changed {_ATTEMPTS} times while they were being set; try again")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one setting. `None` stands for not set."""

    value: str | None
    previous: str | None
    set_by: str
    set_at_s: float  # Unix time


@dataclass(frozen=True, slots=True)
class Change:
    """What a setting was, and what it is or would be now; None: not set."""

    path: Path
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One place as it is written."""

    name: str  # <scope>/<key>
    setting: Setting | None  # None: there is no such setting there
    text: str | None = None  # None: not set
    error: str = ""  # why `text` does not count
    revision: int = 0
    last: Record | None = None  # the change that wrote `text`; None when it was written by hand


async def read(store: Store, keys: Keys) -> list[Entry]:
    """Every setting: where it is written, or where it would be. Raises StoreError."""
    written = _by_name(await store.range(keys.config), keys.config)
    histories = await store.range(keys.config_history)
    records = {name: _records(kv) for name, kv in _by_name(histories, keys.config_history).items()}
    names = {path.name for path in PATHS if path.scope is SETTINGS[path.key].scopes[0]}
    return [
        _entry(name, written.get(name), records.get(name, ())) for name in _sorted(names | written.keys())
    ]


async def history(store: Store, keys: Keys, path: Path) -> list[Record]:
    """The last changes, oldest first. Raises StoreError."""
    found = await store.get(keys.setting_history(path.scope, path.key))
    return list(_records(found)) if found else []


async def set_values(
    store: Store,
    keys: Keys,
    wanted: Mapping[Path, str | None],
    *,
    by: str,
    now_s: float,
    dry_run: bool = False,
) -> list[Change]:
    """Set all of `wanted` at once, or unset where it is None; the changes made, or that would be.

    Raises InvalidValue, Contradiction, ConfigConflict, StoreError.
    """
    texts = {path: _canonical(path, text) for path, text in wanted.items()}
    for _ in range(_ATTEMPTS):
        snapshot = await store.range(keys.config)
        written = _by_name(snapshot, keys.config)
        changes = differences(
            texts, {name: kv.value.decode(errors="replace") for name, kv in written.items()}
        )
        _require_consistent(written, changes)
        if dry_run or not changes:
            return changes
        compares: list[Compare] = [
            mod_revision(keys.setting(path.scope, path.key), _revision(written.get(path.name)))
            for path in PATHS
        ]
        ops: list[Op] = []
        for change in changes:
            kept = await store.get(keys.setting_history(change.path.scope, change.path.key))
            compares.append(
                mod_revision(keys.setting_history(change.path.scope, change.path.key), _revision(kept))
            )
            ops += _writes(keys, change, _records(kept) if kept else (), by, now_s)
        if (await store.txn(compares, ops)).succeeded:
            return changes
    raise ConfigConflict


async def remove_strays(
    store: Store, keys: Keys, names: Collection[str], *, dry_run: bool = False
) -> dict[str, str]:
    """Delete values that are no settings, written past `set_values`; what each was, by name.

    Raises UnknownSetting for a name at which nothing is written, and then deletes nothing. Raises StoreError.
    """
    written = _by_name(await store.range(keys.config), keys.config)
    for name in names:
        if name not in written:
            raise UnknownSetting(name, tuple(path.name for path in PATHS))
    if not dry_run:
        for name in names:
            await store.txn([], [Delete(keys.config + name)])
    return {name: written[name].value.decode(errors="replace") for name in names}


def differences(wanted: Mapping[Path, str | None], texts: Mapping[str, str]) -> list[Change]:
    """What of `wanted` is not written as `texts` yet. Pure."""
    changes = (Change(path, texts.get(path.name), text) for path, text in wanted.items())
    return [change for change in changes if change.before != change.after]


def _canonical(path: Path, text: str | None) -> str | None:
    return None if text is None else format_value(parse(path, text))


def _require_consistent(written: Mapping[str, KeyValue], changes: Sequence[Change]) -> None:
    good: dict[Path, Value] = {}
    for path in PATHS:
        if path.name in written:
            try:
                good[path] = parse(path, written[path.name].value.decode(errors="replace"))
            except ConfigError:
                continue  # counts for nobody
    for change in changes:
        good.pop(change.path, None)
        if change.after is not None:
            good[change.path] = parse(change.path, change.after)
    touched = {change.path.key for change in changes}
    for scope in Scope:
        refused = contradiction(chosen(scope, good, Values()))
        if refused is not None and refused.keys & touched:
            raise refused


def _writes(keys: Keys, change: Change, kept: Sequence[Record], by: str, now_s: float) -> list[Op]:
    path = change.path
    record = Record(value=change.after, previous=change.before, set_by=by, set_at_s=now_s)
    key = keys.setting(path.scope, path.key)
    return [
        Delete(key) if change.after is None else Put(key, change.after.encode()),
        Put(keys.setting_history(path.scope, path.key), msgspec.json.encode([*kept, record][-KEPT:])),
    ]


def _entry(name: str, kv: KeyValue | None, records: Sequence[Record]) -> Entry:
    setting, error = SETTINGS.get(name.rpartition("/")[2]), ""
    text = kv.value.decode(errors="replace") if kv else None
    try:
        path = path_of(name)
        if text is not None:
            parse(path, text)
    except ConfigError as problem:
        error = str(problem)
    last = records[-1] if records and records[-1].value == text else None
    return Entry(name, setting, text, error, _revision(kv), last)


def _records(kv: KeyValue) -> Sequence[Record]:
    try:
        return msgspec.json.decode(kv.value, type=tuple[Record, ...])
    except msgspec.DecodeError as error:
        log.warning("setting_history_unreadable", key=kv.key, detail=str(error))
        return ()


def _by_name(snapshot: Snapshot, prefix: str) -> dict[str, KeyValue]:
    return {key.removeprefix(prefix): kv for key, kv in snapshot.items.items()}


def _revision(kv: KeyValue | None) -> int:
    return kv.mod_revision if kv else 0


def _sorted(names: set[str]) -> list[str]:
    scopes = [str(scope) for scope in Scope]

    def order(name: str) -> tuple[int, str]:
        scope = name.partition("/")[0]
        return (scopes.index(scope) if scope in scopes else len(scopes), name)

    return sorted(names, key=order)
