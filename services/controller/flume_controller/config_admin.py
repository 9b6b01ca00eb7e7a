"""Settings in the admin API: decode, ask `flume_common.config_store`, encode."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import grpc
from flume_common import config_store
from flume_common.config_schema import (
    SETTINGS,
    ConfigError,
    Path,
    Scope,
    UnknownSetting,
    format_value,
    path_of,
)
from flume_common.config_store import Change, ConfigConflict, Entry, Record
from flume_common.serving import status_errors
from flume_protos.v1 import admin_pb2 as pb

from flume_controller.admin_sources import STORE_STATUS_OF, Context, Sources

STATUS_OF: dict[type[Exception], grpc.StatusCode] = {
    UnknownSetting: grpc.StatusCode.NOT_FOUND,
    ConfigConflict: grpc.StatusCode.ABORTED,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    **STORE_STATUS_OF,
}


class ConfigRpcs:
    """See admin.proto: GetConfig, SetConfig, DiffConfig, ConfigHistory."""

    def __init__(self, sources: Sources) -> None:
        self._from = sources

    async def GetConfig(self, request: pb.GetConfigRequest, context: Context) -> pb.GetConfigReply:
        async with status_errors(context, STATUS_OF):
            entries = await config_store.read(self._from.store, self._from.keys)
            return pb.GetConfigReply(settings=map(setting_message, named(entries, request.name)))

    async def SetConfig(self, request: pb.SetConfigRequest, context: Context) -> pb.SetConfigReply:
        strays = stray_names(request.assignments)
        known = [item for item in request.assignments if item.name not in strays]
        async with status_errors(context, STATUS_OF):
            await self._set(known, request.actor, dry_run=True)  # all of it is checked before any is written
            removed = await config_store.remove_strays(
                self._from.store, self._from.keys, strays, dry_run=request.dry_run
            )
            changes = await self._set(known, request.actor, dry_run=request.dry_run)
        return pb.SetConfigReply(
            changes=[
                *map(change_message, changes),
                *(pb.SettingChange(name=name, before=before) for name, before in removed.items()),
            ]
        )

    async def DiffConfig(self, request: pb.DiffConfigRequest, context: Context) -> pb.SetConfigReply:
        async with status_errors(context, STATUS_OF):
            if request.assignments:
                changes = await self._set(request.assignments, "", dry_run=True)
            else:
                entries = await config_store.read(self._from.store, self._from.keys)
                changes = from_defaults(entries)
        return pb.SetConfigReply(changes=map(change_message, changes))

    async def ConfigHistory(
        self, request: pb.ConfigHistoryRequest, context: Context
    ) -> pb.ConfigHistoryReply:
        async with status_errors(context, STATUS_OF):
            path = path_of(request.name)
            records = await config_store.history(self._from.store, self._from.keys, path)
        return pb.ConfigHistoryReply(name=path.name, records=map(record_message, records))

    async def _set(self, assignments: Iterable[pb.Assignment], by: str, *, dry_run: bool) -> list[Change]:
        return await config_store.set_values(
            self._from.store,
            self._from.keys,
            wanted(assignments),
            by=by or "unknown",
            now_s=time.time(),
            dry_run=dry_run,
        )


def stray_names(assignments: Iterable[pb.Assignment]) -> list[str]:
    """Names to unset that are no settings: what somebody wrote there by hand is to go."""
    found = []
    for item in assignments:
        try:
            path_of(item.name)
        except UnknownSetting:
            if not item.HasField("value"):
                found.append(item.name)
    return list(dict.fromkeys(found))


def wanted(assignments: Iterable[pb.Assignment]) -> Mapping[Path, str | None]:
    """Raises UnknownSetting, and ConfigError for a setting named twice."""
    found: dict[Path, str | None] = {}
    for item in assignments:
        path = path_of(item.name)
        if path in found:
            raise ConfigError(f"{path.name} is given twice")
        found[path] = item.value if item.HasField("value") else None
    return found


def named(entries: Sequence[Entry], name: str) -> list[Entry]:
    """Those that `name` means: a place, a key wherever it is set, a scope, or empty for all."""
    if not name or name in (str(scope) for scope in Scope):
        return [entry for entry in entries if entry.name.startswith(f"{name}/" if name else "")]
    found = [entry for entry in entries if name in (entry.name, entry.name.rpartition("/")[2])]
    if found:
        return found
    path = path_of(name)  # known, and not set there
    return [Entry(path.name, SETTINGS[path.key])]


def from_defaults(entries: Iterable[Entry]) -> list[Change]:
    """What is set, and counts, and is not the default: the default is `before`."""
    changes = []
    for entry in entries:
        if entry.setting is None or entry.text is None or entry.error:
            continue
        default = format_value(entry.setting.default)
        if entry.text.strip() != default:
            changes.append(Change(path_of(entry.name), default, entry.text.strip()))
    return changes


def setting_message(entry: Entry) -> pb.Setting:
    message = pb.Setting(name=entry.name, value=entry.text, error=entry.error, revision=entry.revision)
    if entry.last is not None:
        message.set_by, message.set_at_s = entry.last.set_by, entry.last.set_at_s
    if (setting := entry.setting) is not None:
        message.default = format_value(setting.default)
        message.type, message.range, message.unit = setting.type.__name__, setting.range, setting.unit
        message.description = setting.description
        message.readers.extend(setting.readers)
        message.scopes.extend(setting.scopes)
    return message


def change_message(change: Change) -> pb.SettingChange:
    return pb.SettingChange(name=change.path.name, before=change.before, after=change.after)


def record_message(record: Record) -> pb.ConfigRecord:
    return pb.ConfigRecord(
        value=record.value, previous=record.previous, set_by=record.set_by, set_at_s=record.set_at_s
    )
