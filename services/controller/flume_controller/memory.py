"""What passes remember for the next ones: only enough to be patient. No I/O; the caller brings the clock.

A restarted controller begins with an empty memory and acts the same, but for waiting anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from flume_controller.plan import Phase
from flume_controller.providers.base import Instance
from flume_controller.reach import ReachMemory
from flume_controller.spec import AttentionSpec
from flume_controller.status import Crash

log = structlog.get_logger()

PREPARED_KEPT = 128
"""Beyond the largest fleet: a node that is still there must not be timed again."""


@dataclass(slots=True)
class StartBackoff:
    """The first crash is made good at once; each further one doubles the wait, up to `cap_s`.

    Ready nodes that last `stable_s` without a crash end the series.
    """

    first_s: float = 0.5
    cap_s: float = 30.0
    stable_s: float = 10.0
    crashes: int = 0
    last_crash_s: float = 0.0

    def crashed(self, now_s: float) -> None:
        self.crashes += 1
        self.last_crash_s = now_s

    def all_ready(self, now_s: float) -> None:
        if now_s - self.last_crash_s >= self.stable_s:
            self.crashes = 0

    def wait_s(self, now_s: float) -> float:
        """Seconds until a start is allowed, 0 when it is."""
        if self.crashes < 2:
            return 0.0
        pause_s = min(self.first_s * 2.0 ** min(self.crashes - 2, 30), self.cap_s)
        return max(0.0, self.last_crash_s + pause_s - now_s)


@dataclass(slots=True)
class Memory:
    """When nodes were last registered, and which of them crashed."""

    last_seen_s: dict[str, float] = field(default_factory=dict)  # Unix time, by node id
    backoff: StartBackoff = field(default_factory=StartBackoff)
    reach: ReachMemory = field(default_factory=ReachMemory)
    last_spec: AttentionSpec | None = None  # the last one that could be read
    prepare_s: float | None = None
    """The longest of the last few times from a node's start to READY."""
    _prepared_s: dict[tuple[str, int], float] = field(default_factory=dict)  # by node id and pid
    _phases: Mapping[str, Phase] | None = None  # of the last pass
    _crashes: dict[str, Crash] = field(default_factory=dict)  # by node id
    _counted: set[tuple[str, int]] = field(default_factory=set)  # id and pid of crashes still to be seen
    _first: bool = True

    @property
    def crashes(self) -> list[Crash]:
        """Those not made good yet."""
        return list(self._crashes.values())

    def note_processes(self, instances: Sequence[Instance], now_s: float) -> None:
        """What the provider has at the beginning of a pass."""
        crashed = {(i.id, i.pid): i for i in instances if not i.running and not i.stopping}
        for key in crashed.keys() - self._counted:
            self._note_crash(crashed[key], now_s)
        self._counted = set(crashed)
        if self._first:
            # Whether an adopted node had been registered is not known. Assume so: it may hold KV
            # and merely be waiting for etcd.
            self.last_seen_s = {instance.id: now_s for instance in instances}
        self._first = False

    def note_members(self, nodes: Iterable[str], now_s: float) -> None:
        """Who is registered now."""
        self.last_seen_s |= dict.fromkeys(nodes, now_s)

    def note_ready(self, nodes: Iterable[str], instances: Iterable[Instance], now_s: float) -> None:
        """Who is ready now. Those that the first pass finds ready became so some time before."""
        processes = {instance.id: instance for instance in instances}
        for process in (processes[node] for node in nodes if node in processes):
            took_s = now_s - process.started_at_s if self._phases is not None else 0.0
            self._prepared_s.setdefault((process.id, process.pid), took_s)
        while len(self._prepared_s) > PREPARED_KEPT:
            del self._prepared_s[next(iter(self._prepared_s))]
        self.prepare_s = max(self._prepared_s.values(), default=0.0) or None

    def exchange_phases(self, phases: Mapping[str, Phase]) -> Mapping[str, Phase] | None:
        """Remember the phases of this pass; those of the one before, None at the first."""
        before, self._phases = self._phases, phases
        return before

    def _note_crash(self, instance: Instance, now_s: float) -> None:
        before = self._crashes.get(instance.id)
        times = before.times + 1 if before else 1
        self._crashes[instance.id] = Crash(instance.id, instance.exit_code, instance.log, times)
        self.backoff.crashed(now_s)
        log.warning("node_crashed", node=instance.id, exit_code=instance.exit_code, times=times)

    def forget(self, node: str) -> None:
        """The id means a new node from now on."""
        self.last_seen_s.pop(node, None)

    def all_ready(self, now_s: float) -> None:
        """As many nodes are ready as are wanted: what crashed has been made good."""
        self.backoff.all_ready(now_s)
        self._crashes.clear()
