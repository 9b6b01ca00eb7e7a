"""The engine process: owns the KV memory and the UCX port, and answers steps in a plain loop.

    python -m flume_attention.engine --link-fd N --kv-bytes N [--dtype D] [--device D] [--threads N] ...

Started by the supervisor (`flume_common.engine_link.run_engine`), never by hand; it ends when the
supervisor closes the link. The loop sleeps until a message or the supervisor wakes it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

import torch
from flume_common.direct_region import HOPS
from flume_common.engine_link import EngineLink, LinkClosed
from flume_common.engine_progress import Activity
from flume_common.epochs import revision_of
from flume_common.lanes import Lane, LaneDown, Port, Side, port_of
from flume_common.lanes.processes import on_this_host
from flume_common.layout import DTYPE_BYTES
from flume_common.wire import LaneShape, sequence_key

from flume_attention.backend import Backend, CpuBackend, Threads
from flume_attention.errors import AttachRefused, ConfigRefused, DeviceStuck, ProtocolError, StepRefused
from flume_attention.lane_session import LaneSession
from flume_attention.messages import (
    Adopt,
    Ask,
    Attach,
    Attached,
    CannotRun,
    Detach,
    Detached,
    EndPull,
    Kept,
    LaneClosed,
    LaneReport,
    Lend,
    PreparePull,
    Preparing,
    Pull,
    Refused,
    Renew,
    Renewed,
    Report,
    SetDraining,
    Started,
    StepNotTaken,
    ToEngine,
)
from flume_attention.node import Node
from flume_attention.orphans import Orphans
from flume_attention.pulls import Pulls
from flume_attention.startup import Phases

# How soon others hear of changes that nobody waits for.
REPORT_INTERVAL_S = 0.2
QUIET_CREDIT_S = 0.1
# How long a busy engine may leave the supervisor's messages lying.
LINK_INTERVAL_S = 0.002
# A lane that died while nothing moves on it is noticed at the latest after this.
IDLE_LOOK_S = 0.5
# Work for one lane that takes longer is shown to the others.
LONG_WORK_S = 0.5
# How long a new lane waits for steps of others to end.
STEP_END_S = 2.0
# SmolLM2-135M in float32: 2.9 MB, 1 ms of a step at each end.
PULL_TOKENS_PER_STEP = 64
DEVICE_STUCK = 3  # exit code


class Engine:
    """Everything of one attention node that touches its memory. One thread."""

    def __init__(self, node: Node, port: Port, link: EngineLink[ToEngine], backend: Backend,
        *, pull_tokens_per_step: int = PULL_TOKENS_PER_STEP, hop: str = "auto",
    ) -> None:  # fmt: skip
        self._node = node
        self._port = port
        self._link = link
        self._backend = backend
        self._hop = hop
        self._sessions: dict[str, LaneSession] = {}  # by weight node
        self._last_lane = 0  # numbers are never used twice
        self._pulls = Pulls(node, port, link, self._next_lane, pull_tokens_per_step)
        self._changed = False  # since the last unasked report
        self._credit_moved_at: float | None = None  # the first change since the last round of CREDIT
        self._reported_at = 0.0

    def run(self) -> None:
        """Until the supervisor closes the link."""
        fds = (self._link.fileno(),)
        while True:
            wait_s = self._housekeep()
            self._port.wait(self._work, 0.0 if self._busy else wait_s, fds)
            self._keep_working()
            for message in self._link.receive():
                self._handle(message)

    def leave(self) -> None:
        """Nobody waits for an answer any more: no device may be left with a step that waits for us."""
        for session in self._sessions.values():
            session.close()

    def _keep_working(self) -> None:
        until = time.monotonic() + LINK_INTERVAL_S
        while time.monotonic() < until:
            self._port.progress()
            if not self._work() and not self._busy:
                return

    @property
    def _busy(self) -> bool:
        return any(session.busy for session in self._sessions.values())

    def _work(self) -> bool:
        """One thing for each lane that has something to do."""
        worked = False
        for session in list(self._sessions.values()):
            try:
                began_s = time.monotonic()
                if session.advance():
                    worked = True
                    self._link.progress.beat()
                    if time.monotonic() - began_s > LONG_WORK_S:
                        self._show_others(session)
                    if session.changed:
                        session.changed = False
                        self._note_change()
            except LaneDown as error:
                self._orphan(session, str(error))
            except ProtocolError as error:
                self._drop(session, str(error))
        if self._pulls.active:
            worked |= self._pulls.advance()
            self._link.progress.beat()
            if self._pulls.changed:
                self._pulls.changed = False
                self._note_change()
        return worked

    def _show_others(self, worked_for: LaneSession) -> None:
        """Tell weight nodes whose turn comes later that this node works: they would take it for lost."""
        for session in list(self._sessions.values()):
            if session is worked_for:
                continue
            try:
                session.send_credit()
            except LaneDown as error:
                self._orphan(session, str(error))

    def _note_change(self) -> None:
        """Memory or credit moved: give out what can be given, and tell others of the rest in time."""
        self._changed = True
        self._credit_moved_at = self._credit_moved_at or time.monotonic()
        self._spread_credit()

    def _spread_credit(self) -> None:
        for name in self._node.grant():
            self._sessions[name].credit_due = True

    def _tell_everyone(self) -> None:
        for session in self._sessions.values():
            session.credit_due = True

    def _housekeep(self) -> float:
        """Say what changed and nobody waits for, not too often. Returns how long to sleep at most."""
        now = time.monotonic()
        waits_s = [self._pulls.next_look_s() or IDLE_LOOK_S]
        if self._node.orphans.expire(now) | self._node.arrivals.expire(now):
            self._note_change()
        if self._changed:
            if now - self._reported_at >= REPORT_INTERVAL_S:
                self._report(0)
            else:
                waits_s.append(self._reported_at + REPORT_INTERVAL_S - now)
        if self._credit_moved_at is not None:
            if now - self._credit_moved_at >= QUIET_CREDIT_S:
                self._credit_moved_at = None
                for session in self._sessions.values():
                    session.credit_due = session.credit_due or session.credit_stale
                return 0.0
            waits_s.append(self._credit_moved_at + QUIET_CREDIT_S - now)
        return min(waits_s)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Attach():
                self._attach(message)
            case Renew():
                self._renew(message)
            case Detach():
                self._detach(message)
            case Adopt():
                self._adopt(message)
            case SetDraining():
                self._node.draining = message.draining
                self._spread_credit()
                self._tell_everyone()
                self._report(message.request)
            case Ask():
                self._report(message.request)
            case Lend():
                self._pulls.lend(message)
            case PreparePull():
                self._pulls.prepare(message)
            case Pull():
                self._pulls.pull(message)
            case EndPull():
                self._pulls.end(message.request)

    def _attach(self, request: Attach) -> None:
        if self._backend.compiles:
            self._link.send(Preparing(for_request=request.request))
        self._let_steps_end()
        against = self._against_region(request)
        lane = self._next_lane()
        address = self._port.berth(lane)
        try:
            session = self._join(request, lane, direct=request.direct and not against)
        except AttachRefused as error:
            self._port.leave(lane)
            self._link.send(Refused(request=request.request, field=error.field, detail=error.detail))
            return
        self._sessions[request.weight_node] = session
        self._note_change()
        self._link.send(
            Attached(
                request=request.request,
                worker_address=address,
                lane=lane,
                capacity_blocks=self._node.capacity_blocks,
                direct_region=session.region,
                no_region=session.no_region or against,
            )
        )

    def _against_region(self, request: Attach) -> str:
        """Why the lane should have none although it is asked for."""
        if not request.direct:
            return ""
        if self._hop != "auto":
            return f"--hop {self._hop}"
        return "" if on_this_host(request.worker_address) else "the weight node is on another host"

    def _join(self, request: Attach, number: int, *, direct: bool) -> LaneSession:
        """Raises AttachRefused. From the moment it is clear that the lane can be, the old one is gone."""
        name = request.weight_node
        shape = self._node.admit(request)
        if name in self._sessions:
            self._replace(self._sessions[name], request)
        # An engine that set up its lane again wants nothing of what it had before.
        engine = port_of(request.worker_address)
        self._node.orphans.free(name, engine)
        holdings = self._node.add(name, shape)
        try:
            lane = self._connect(request, shape, number)
        except AttachRefused:
            self._node.remove(name)
            raise
        try:
            session = self._backend.session(
                self._node, name, revision_of(request.epoch), lane, holdings,
                direct=direct, engine=engine, node_epoch=request.node_epoch,
                on_refused=lambda step, error: self._tell_refused(name, step, error),
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            lane.close()
            self._node.remove(name)
            raise AttachRefused("max_step_sequences", f"no memory for a lane's steps: {error}") from error
        session.registered_epoch = request.epoch
        return session

    def _connect(self, request: Attach, shape: LaneShape, number: int) -> Lane[LaneShape]:
        try:
            return self._port.connect(
                request.weight_node, request.worker_address, shape, Side.ATTENTION,
                send_lane=request.lane, receive_lane=number,
                allocate=self._backend.allocate, rings=self._backend.rings,
            )  # fmt: skip
        except ValueError as error:
            raise AttachRefused("worker_address", f"worker_address: {error}") from error

    def _let_steps_end(self) -> None:
        """Until nothing is under way: what makes memory may wait for a whole device, and a step on it for
        us. The step of a weight node that does not go on is given up."""
        until = time.monotonic() + STEP_END_S
        self._hold_back(True)
        while self._under_way() and time.monotonic() < until:
            self._port.progress()
            self._work()
        for session in self._under_way():
            self._orphan(session, f"its step did not go on within {STEP_END_S:g} s")
        self._hold_back(False)

    def _under_way(self) -> list[LaneSession]:
        return [session for session in self._sessions.values() if session.under_way]

    def _hold_back(self, held_back: bool) -> None:
        for session in self._sessions.values():
            session.held_back = held_back

    def _next_lane(self) -> int:
        self._last_lane += 1
        return self._last_lane

    def _refused_for_epoch(self, request: Renew | Detach | Adopt) -> bool:
        """True, and the request is answered, if its weight node's epoch is over."""
        try:
            self._node.require_epoch(request.weight_node, request.epoch)
        except AttachRefused as error:
            self._link.send(Refused(request=request.request, field=error.field, detail=error.detail))
            return True
        return False

    def _renew(self, request: Renew) -> None:
        if self._refused_for_epoch(request):
            return
        session = self._sessions.get(request.weight_node)
        if session is not None:
            session.registered_epoch = request.epoch
        self._link.send(Renewed(request=request.request, attached=session is not None))

    def _detach(self, request: Detach) -> None:
        if self._refused_for_epoch(request):
            return
        session = self._sessions.get(request.weight_node)
        if session is not None:
            self._drop(session, "detached")
        if self._node.orphans.free(request.weight_node) | self._node.arrivals.free(request.weight_node):
            self._note_change()
        self._link.send(Detached(request=request.request))

    def _adopt(self, request: Adopt) -> None:
        if self._refused_for_epoch(request):
            return
        if request.lost_node and request.lost_node != request.weight_node:
            self._fence(request.lost_node, request.lost_below)
        key = sequence_key(request.sequence)
        slot = self._node.orphans.claim(key, request.weight_node, time.monotonic())
        ranges = [(item.start, item.length) for item in slot.ranges] if slot else []
        in_use = not ranges and self._node.has(key)
        self._link.send(Kept(request=request.request, ranges=ranges, in_use=in_use))

    def _fence(self, weight_node: str, below: int) -> None:
        """End its lane if its epoch is over, whatever its process thinks: others take what it held."""
        self._node.fence(weight_node, below)
        session = self._sessions.get(weight_node)
        if session is not None and session.registered_epoch < below:
            epoch = revision_of(session.registered_epoch)
            self._orphan(session, f"epoch {epoch} is over: it is below {revision_of(below)}")

    def _replace(self, session: LaneSession, request: Attach) -> None:
        reason = "replaced by a new attach"
        if session.engine == port_of(request.worker_address):
            self._drop(session, reason)
        else:
            self._orphan(session, reason)

    def _tell_refused(self, weight_node: str, step: int, error: StepRefused) -> None:
        self._link.send(
            StepNotTaken(weight_node=weight_node, step=step, refusal=error.refusal.name, detail=error.detail)
        )

    def _drop(self, session: LaneSession, reason: str) -> None:
        """End a lane and free what it held at once."""
        self._node.remove(session.weight_node)
        self._close(session, reason)

    def _orphan(self, session: LaneSession, reason: str) -> None:
        """End the lane of a weight node that is gone; what it held waits for another one."""
        self._node.orphan(session.weight_node, session.engine, time.monotonic())
        self._close(session, reason)

    def _close(self, session: LaneSession, reason: str) -> None:
        del self._sessions[session.weight_node]
        session.close()
        session.lane.close()
        self._note_change()
        self._link.send(
            LaneClosed(
                weight_node=session.weight_node, epoch=revision_of(session.registered_epoch), reason=reason
            )
        )

    def _report(self, request: int) -> None:
        node = self._node
        block_tokens = node.pool.layout.block_tokens if node.pool else 0
        self._changed = self._changed and request != 0
        self._reported_at = self._reported_at if request else time.monotonic()
        lanes = [_lane_report(session) for session in self._sessions.values()]
        self._link.send(
            Report(
                request=request,
                draining=node.draining,
                capacity_tokens=node.capacity_blocks * block_tokens,
                used_tokens=node.used_tokens,
                capacity_blocks=node.capacity_blocks,
                used_blocks=node.used_blocks,
                epoch_rejected=node.epoch_rejected,
                orphan_tokens=node.orphans.held_tokens,
                pulled_tokens=node.pulled_tokens,
                pulls_refused=node.pulls_refused,
                reads=node.reads,
                lanes=lanes,
            )
        )


def _lane_report(session: LaneSession) -> LaneReport:
    holdings = session.holdings
    return LaneReport(
        weight_node=session.weight_node,
        epoch=revision_of(session.registered_epoch),
        granted_blocks=holdings.unused + holdings.held_blocks,
        held_blocks=holdings.held_blocks,
        sequences=len(holdings.slots),
        ranges=holdings.num_ranges,
        steps=holdings.steps,
        direct=session.direct,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flume_attention.engine", description=__doc__)
    parser.add_argument("--link-fd", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPE_BYTES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prefill-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--orphan-grace-s", type=float, default=30.0)
    parser.add_argument("--spin-us", type=float, default=50.0)
    parser.add_argument("--hop", choices=HOPS, default="auto")
    parser.add_argument("--lanes-host", default="")
    parser.add_argument("--pull-tokens-per-step", type=int, default=PULL_TOKENS_PER_STEP)
    return parser.parse_args(argv)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the supervisor, too, and it closes the link
    args = parse()
    phases = Phases()
    link: EngineLink[ToEngine] = EngineLink(args.link_fd, ToEngine)
    link.progress.begin(Activity.PREPARING)
    try:
        backend = open_backend(args, phases)
    except ConfigRefused as refused:
        link.send(CannotRun(reason=str(refused)))
        return
    node = Node(args.kv_bytes, dtype=args.dtype, make_pool=backend.pool, orphans=Orphans(args.orphan_grace_s))
    with phases.phase("port"):
        opened = _open_port(link, args)
    if opened is None:
        return
    with torch.inference_mode(), opened as port:
        engine = Engine(
            node, port, link, backend, pull_tokens_per_step=args.pull_tokens_per_step, hop=args.hop
        )
        try:
            link.send(Started(main_at_s=phases.began_s, phases_ms=phases.took_ms))
            with suppress(LinkClosed):
                engine.run()
            engine.leave()
        except Exception as error:
            # At once: to free memory that a device uses would wait for it.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(DEVICE_STUCK if isinstance(error, DeviceStuck) else 1)


def _open_port(link: EngineLink[ToEngine], args: argparse.Namespace) -> Port | None:
    """None, with the reason said, when no network card of this machine has the address of --lanes-host."""
    try:
        return Port(spin_s=args.spin_us * 1e-6, host=args.lanes_host)
    except ValueError as error:
        link.send(CannotRun(reason=f"--lanes-host: {error}"))
        return None


def open_backend(args: argparse.Namespace, phases: Phases) -> Backend:
    """Raises ConfigRefused for a device that cannot be used, or has not so much memory."""
    if args.device == "cpu":
        return CpuBackend(Threads(args.threads, args.prefill_threads))
    from flume_attention.cuda import backend

    torch.set_num_threads(1)
    with phases.phase("device"):
        gpu = backend.open_gpu()
    with phases.phase("kv_memory"):
        gpu.reserve(args.kv_bytes)
    with phases.phase("first_kernel"):
        gpu.warm_up()
    return gpu


if __name__ == "__main__":
    main()
