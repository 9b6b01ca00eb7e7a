"""Events of what nodes say went wrong inside them: engines that died, models whose output is invalid.

Level-triggered: members count, and what they count more of than at the last look is told. Many failures of
one node's model are one event now and then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

from flume_common.membership import Member, Members

from flume_controller.events import EventType, Happening

MODEL_EVERY_S = 30.0
"""Between two events of one node's model."""
RECENT_S = 60.0
"""A death this long before a leader's first look at a node is told; an older one its predecessor has told."""
REMEMBERED = 1024  # processes

Process = tuple[str, str, int, float]


@dataclass(slots=True)
class _Seen:
    engine_deaths: int
    model_failures: int
    model_told_s: float = 0.0


@dataclass(slots=True)
class NodeFailures:
    """What has been told of each process of a node."""

    _seen: dict[Process, _Seen] = field(default_factory=dict)

    def look(self, members: Iterable[Member], now_s: float) -> list[Happening]:
        """Find what has happened since the last look. `now_s`: Unix time."""
        found: list[Happening] = []
        for member in members:
            process = (member.role, member.id, member.pid, member.started_at_s)
            seen = self._seen.get(process)
            if seen is None:
                recent = now_s - member.last_engine_death_s <= RECENT_S
                seen = _Seen(member.engine_deaths - (recent and member.engine_deaths > 0), 0)
                self._seen[process] = seen
            if member.engine_deaths > seen.engine_deaths:
                found.append(_engine_died(member, member.engine_deaths - seen.engine_deaths))
                seen.engine_deaths = member.engine_deaths
            if member.model_failures > seen.model_failures and now_s - seen.model_told_s >= MODEL_EVERY_S:
                found.append(_model_failed(member, member.model_failures - seen.model_failures))
                seen.model_failures, seen.model_told_s = member.model_failures, now_s
        while len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return found


def _engine_died(member: Member, deaths: int) -> Happening:
    times = f"{deaths} engines died, the last one" if deaths > 1 else "its engine died"
    message = f"{times}: {member.last_engine_error}; {member.engine_deaths} since the node started"
    return Happening(f"{member.role}/{member.id}", EventType.WARNING, "EngineDied", message)


def _model_failed(member: Member, failures: int) -> Happening:
    message = (
        f"{failures} request{'s'[: failures != 1]} ended because the output of "
        f"{member.model or 'the model'} was invalid; the last, {member.last_model_failure}"
    )
    return Happening(f"{member.role}/{member.id}", EventType.WARNING, "ModelOutputInvalid", message)


async def tell_node_failures(members: Members, tell: Callable[..., None]) -> NoReturn:
    """Tell of them for as long as this controller leads."""
    failures = NodeFailures()
    while True:
        tell(*failures.look(members.current.values(), time.time()))
        with suppress(TimeoutError):
            async with asyncio.timeout(MODEL_EVERY_S):
                await members.changed()
