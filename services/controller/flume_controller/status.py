"""What the controller reports about the attention nodes. Pure: observation in, status out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flume_common.reasons import Reason, sentence

from flume_controller.plan import NodeView, Phase
from flume_controller.progress import Progress
from flume_controller.spec import AttentionSpec, AttentionStatus, Condition, ConditionStatus, Unready

INVALID_SPEC = "InvalidSpec"
"""Reason of `Degraded`."""
NO_WEIGHT_NODE = "NoWeightNode"
"""Reason of `Available`."""
NODE_CRASHED = "NodeCrashed"
"""Reason of `Degraded`."""
DISK_FULL = "DiskFull"
"""Reason of `Degraded`."""
DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
"""Reason of `Progressing`."""
_LANE_REASONS = (Reason.NO_LANE, Reason.ONLY_DRAINING)


@dataclass(frozen=True, slots=True)
class Crash:
    """A node's process that ended without being told to."""

    node: str
    exit_code: int | None  # None: unknown, as it was not this controller's child
    log: str = ""  # where its output is
    times: int = 1

    def __str__(self) -> str:
        how = "ended" if self.exit_code is None else f"exited with {self.exit_code}"
        often = f", {self.times} times so far" if self.times > 1 else ""
        return f"{self.node} {how}{often}" + (f" (log: {self.log})" if self.log else "")


@dataclass(frozen=True, slots=True)
class WeightView:
    """A registered weight node: `reason` as in Member, empty while it serves."""

    node: str
    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """What else serving takes."""

    weights: Sequence[WeightView] = ()
    failed_canaries: Mapping[str, str] = field(default_factory=dict)
    """What routers saw, by id; empty while one of them sees none fail."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition before it is known whether it is news."""

    type: str
    status: bool
    reason: str
    message: str


def report(
    spec: AttentionSpec,
    nodes: Sequence[NodeView],
    crashes: Sequence[Crash],
    failures: Sequence[str],
    state: Progress,
    previous: AttentionStatus | None,
    now_s: float,
    *,
    service: Service | None = None,
    invalid: str = "",
    disk_full: str = "",
) -> AttentionStatus:
    """The status after a pass that acted on `spec`.

    `crashes` are those not made good yet, `failures` the actions of this pass that failed. `service` is
    None where nothing but attention nodes matters. `invalid`: why `spec` is not the one in etcd.
    `disk_full`: which disk, empty while there is room.
    """
    count = Counts.of(nodes)
    findings = (
        _available(spec, count, service),
        _progressing(spec, count, state),
        _degraded(count, crashes, failures, invalid, disk_full),
    )
    return AttentionStatus(
        observed_generation=spec.generation,
        desired=spec.desired,
        ready=count.ready,
        preparing=count.preparing,
        draining=count.draining,
        conditions=_dated(findings, previous.conditions if previous else (), spec.generation, now_s),
        last_good=state.last_good,
        progressed_at_s=state.at_s,
        gave_up=state.gave_up,
        unready={node.id: unready for node in nodes if (unready := _unready(node)) is not None},
    )


def _unready(node: NodeView) -> Unready | None:
    if node.reached or node.phase not in (Phase.PREPARING, Phase.UNREACHABLE):
        return None
    return Unready(node.phase, Reason.NO_LANE)


@dataclass(frozen=True, slots=True)
class Counts:
    ready: int
    preparing: int
    draining: int
    unregistered: tuple[str, ...]
    unreachable: tuple[str, ...]
    joining: tuple[str, ...]

    @classmethod
    def of(cls, nodes: Iterable[NodeView]) -> Counts:
        by_phase: dict[Phase, list[str]] = {phase: [] for phase in Phase}
        joining = []
        for node in nodes:
            by_phase[node.phase].append(node.id)
            if node.phase is Phase.PREPARING and not node.reached:
                joining.append(node.id)
        return cls(
            ready=len(by_phase[Phase.READY]),
            preparing=len(by_phase[Phase.STARTING]) + len(by_phase[Phase.PREPARING]),
            draining=len(by_phase[Phase.DRAINING]) + len(by_phase[Phase.STOPPING]),
            unregistered=tuple(by_phase[Phase.LOST] + by_phase[Phase.STUCK]),
            unreachable=tuple(by_phase[Phase.UNREACHABLE]),
            joining=tuple(joining),
        )


def _available(spec: AttentionSpec, count: Counts, service: Service | None) -> Finding:
    least = max(spec.min, 1)
    message = f"{count.ready} ready, at least {least} needed"
    if spec.desired == 0:
        return Finding("Available", False, "ScaledToZero", "no attention node is wanted")
    if service is not None and not service.weights:
        return Finding("Available", False, NO_WEIGHT_NODE, "no weight node is registered")
    if count.ready < least and not count.unreachable and not count.joining:
        return Finding("Available", False, "TooFewNodes", message)
    if service is not None and not any(weight.ready for weight in service.weights):
        lacks_lane = all(weight.reason in _LANE_REASONS for weight in service.weights)
        why = "; ".join(sentence(weight.node, weight.reason) for weight in service.weights)
        return Finding("Available", False, Reason.NO_LANE if lacks_lane else NO_WEIGHT_NODE, why)
    if count.ready < least:
        cut_off = ", ".join(count.unreachable + count.joining)
        return Finding("Available", False, Reason.NO_LANE, f"{message}; no lane leads to {cut_off}")
    if service is not None and service.failed_canaries:
        why = "; ".join(f"{router}: {what}" for router, what in sorted(service.failed_canaries.items()))
        return Finding("Available", False, "CanaryFailed", why)
    return Finding("Available", True, "EnoughNodes", message)


def _progressing(spec: AttentionSpec, count: Counts, state: Progress) -> Finding:
    if state.gave_up is not None:
        message = (
            f"{state.gave_up.wanted} were wanted (generation {state.gave_up.generation}) and not ready in "
            f"time, returned to {state.gave_up.returned_to}; {count.ready} ready"
        )
        return Finding("Progressing", False, DEADLINE_EXCEEDED, message)
    if state.overdue:
        message = f"{count.ready} of {spec.desired} ready, and no progress within the deadline"
        return Finding("Progressing", False, DEADLINE_EXCEEDED, message)
    if count.ready != spec.desired:
        message = f"{count.ready} of {spec.desired} ready, {count.preparing} preparing"
        return Finding("Progressing", True, "Scaling", message)
    if count.draining:
        message = f"{count.draining} draining, waiting for the sequences they hold"
        return Finding("Progressing", True, "Draining", message)
    return Finding("Progressing", False, "AsDesired", f"{count.ready} of {spec.desired} ready")


def _degraded(
    count: Counts, crashes: Sequence[Crash], failures: Sequence[str], invalid: str, disk_full: str
) -> Finding:
    if invalid:
        return Finding("Degraded", True, INVALID_SPEC, invalid)
    if disk_full:
        return Finding("Degraded", True, DISK_FULL, disk_full)
    if failures:
        return Finding("Degraded", True, "ActionFailed", "; ".join(failures))
    if crashes:
        return Finding("Degraded", True, NODE_CRASHED, "; ".join(map(str, crashes)))
    if count.unregistered or count.unreachable:
        parts = (
            ("running but not registered", count.unregistered),
            ("registered, but no weight node has a lane there", count.unreachable),
        )
        message = "; ".join(f"{what}: {', '.join(nodes)}" for what, nodes in parts if nodes)
        return Finding("Degraded", True, "NodeUnreachable", message)
    return Finding("Degraded", False, "AsExpected", "")


def _dated(
    findings: Iterable[Finding], previous: Iterable[Condition], generation: int, now_s: float
) -> tuple[Condition, ...]:
    before = {condition.type: condition for condition in previous}
    return tuple(_date(finding, before.get(finding.type), generation, now_s) for finding in findings)


def _date(finding: Finding, before: Condition | None, generation: int, now_s: float) -> Condition:
    status = ConditionStatus.TRUE if finding.status else ConditionStatus.FALSE
    same = before is not None and before.status is status
    return Condition(
        type=finding.type,
        status=status,
        reason=finding.reason,
        message=finding.message,
        last_transition_time_s=before.last_transition_time_s if before and same else now_s,
        observed_generation=generation,
    )
