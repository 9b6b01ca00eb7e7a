"""Events in the admin API."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from flume_protos.v1 import admin_pb2 as pb

from flume_controller.admin_sources import Context, Sources
from flume_controller.events import Event


class EventRpcs:
    """See admin.proto: ListEvents, WatchEvents."""

    def __init__(self, sources: Sources) -> None:
        self._from = sources

    async def ListEvents(self, request: pb.ListEventsRequest, context: Context) -> pb.ListEventsReply:
        events = about(self._from.events.listed(), request.object)
        return pb.ListEventsReply(events=map(event_message, events))

    async def WatchEvents(self, request: pb.ListEventsRequest, context: Context) -> AsyncIterator[pb.Event]:
        told: dict[str, Event] = {}
        version = self._from.events.version
        while True:
            now = about(self._from.events.listed(), request.object)
            for event in now:
                if told.get(event.id) != event:
                    yield event_message(event)
            told = {event.id: event for event in now}
            version = await self._from.events.wait_newer(version)


def about(events: Iterable[Event], name: str) -> list[Event]:
    """Those about `<kind>/<name>`, or `<name>` of any kind; all for an empty one."""
    return [event for event in events if name in ("", event.object, event.object.rpartition("/")[2])]


def event_message(event: Event) -> pb.Event:
    return pb.Event(
        id=event.id,
        object=event.object,
        type=event.type,
        reason=event.reason,
        message=event.message,
        source=event.source,
        count=event.count,
        first_s=event.first_s,
        last_s=event.last_s,
    )
