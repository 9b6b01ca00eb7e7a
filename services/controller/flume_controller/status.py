"""What the controller reports about the attention nodes. Pure: observation in, status out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flume_controller.plan import NodeView, Phase
from flume_controller.progress import Progress
from flume_controller.spec import AttentionSpec, AttentionStatus, Condition, ConditionStatus

NODE_CRASHED = "NodeCrashed"
"""Reason of `Degraded`."""
DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
"""Reason of `Progressing`."""


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
) -> AttentionStatus:
    """The status after a pass that acted on `spec`.

    `crashes` are those not made good yet, `failures` the actions of this pass that failed.
    """
    count = Counts.of(nodes)
    findings = (
        _available(spec, count),
        _progressing(spec, count, state),
        _degraded(count, crashes, failures),
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
    )


@dataclass(frozen=True, slots=True)
class Counts:
    ready: int
    preparing: int
    draining: int
    unreachable: tuple[str, ...]

    @classmethod
    def of(cls, nodes: Iterable[NodeView]) -> Counts:
        by_phase: dict[Phase, list[str]] = {phase: [] for phase in Phase}
        for node in nodes:
            by_phase[node.phase].append(node.id)
        return cls(
            ready=len(by_phase[Phase.READY]),
            preparing=len(by_phase[Phase.STARTING]) + len(by_phase[Phase.PREPARING]),
            draining=len(by_phase[Phase.DRAINING]) + len(by_phase[Phase.STOPPING]),
            unreachable=tuple(by_phase[Phase.LOST] + by_phase[Phase.STUCK]),
        )


def _available(spec: AttentionSpec, count: Counts) -> Finding:
    least = max(spec.min, 1)
    if spec.desired == 0:
        return Finding("Available", False, "ScaledToZero", "no attention node is wanted")
    if count.ready < least:
        return Finding("Available", False, "TooFewNodes", f"{count.ready} ready, at least {least} needed")
    return Finding("Available", True, "EnoughNodes", f"{count.ready} ready, at least {least} needed")


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


def _degraded(count: Counts, crashes: Sequence[Crash], failures: Sequence[str]) -> Finding:
    if failures:
        return Finding("Degraded", True, "ActionFailed", "; ".join(failures))
    if crashes:
        return Finding("Degraded", True, NODE_CRASHED, "; ".join(map(str, crashes)))
    if count.unreachable:
        message = f"running but not registered: {', '.join(count.unreachable)}"
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
