"""All pulls of one engine, at either end: lanes between attention nodes, made for one pull and gone after it.

`advance` moves each of them by a chunk at most, so that queries never wait longer than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flume_common.engine_link import EngineLink
from flume_common.lanes import Lane, LaneDown, Port, Side
from flume_common.layout import KvLayout, LayoutMismatch
from flume_common.pull_wire import CHUNK_BYTES, PullShape
from flume_common.wire import sequence_key

from flume_attention import messages as m
from flume_attention.errors import AttachRefused, ProtocolError
from flume_attention.lender import LendSession
from flume_attention.node import MAX_FRAME_BYTES, Node
from flume_attention.puller import PullSession, Wanted
from flume_attention.step_budget import IDLE_S, StepBudget


@dataclass(frozen=True, slots=True)
class _Pull:
    request: int
    session: PullSession


class Pulls:
    """Requests come from the supervisor and are answered on its link; Refused names the field to blame."""

    def __init__(
        self,
        node: Node,
        port: Port,
        link: EngineLink[m.ToEngine],
        next_lane: Callable[[], int],
        tokens_per_step: int,
    ) -> None:
        self.changed = False  # memory moved since somebody last looked
        self._node = node
        self._port = port
        self._link = link
        self._next_lane = next_lane
        self._tokens_per_step = tokens_per_step
        self._lends: list[LendSession] = []
        self._pulls: list[_Pull] = []
        self._prepared: dict[int, int] = {}  # lanes of pulls to come, by the request that prepared them

    @property
    def active(self) -> bool:
        return bool(self._lends or self._pulls)

    def next_look_s(self) -> float | None:
        """How soon a chunk that the present step does not allow may go even if no step follows."""
        waits = any(session.waits for session in self._lends) or any(p.session.waits for p in self._pulls)
        return IDLE_S if waits else None

    def advance(self) -> bool:
        """One chunk of each. Whether any moved."""
        steps = sum(lane.steps for lane in self._node.holdings.values())
        moved = False
        for lend in list(self._lends):
            moved |= self._advance_lend(lend, steps)
        for pull in list(self._pulls):
            moved |= self._advance_pull(pull, steps)
        return moved

    # Lending

    def lend(self, request: m.Lend) -> None:
        """Open the lending end of a lane."""
        try:
            layout = self._require_layout()
            layout.require_same(request.layout)
            shape = PullShape(layout, _chunk_bytes(request.chunk_bytes))
            number = self._next_lane()
            address = self._port.berth(number)
            lane = self._connect(
                request.puller, request.worker_address, shape, Side.LENDER, request.lane, number
            )
        except LayoutMismatch as error:
            self._refuse(request.request, AttachRefused(f"layout.{error.field}", str(error)))
            return
        except AttachRefused as error:
            self._refuse(request.request, error)
            return
        budget = StepBudget(self._tokens_per_step, layout.num_layers)
        session = LendSession(
            self._node, request.puller, request.epoch, lane, budget, node_epoch=request.node_epoch
        )
        self._lends.append(session)
        self._link.send(m.Lent(request=request.request, worker_address=address, lane=number))

    def _advance_lend(self, session: LendSession, steps: int) -> bool:
        try:
            moved = session.advance(steps)
        except (LaneDown, ProtocolError):
            # Whoever pulled sees to it: what it had not finished is still here.
            self._end_lend(session)
            return True
        if session.ended is not None:
            self._end_lend(session)
        return moved

    def _end_lend(self, session: LendSession) -> None:
        self._lends.remove(session)
        session.lane.close()

    # Pulling

    def prepare(self, request: m.PreparePull) -> None:
        """Say what a lender must know of us."""
        try:
            layout = self._require_layout()
            if self._node.draining:
                raise AttachRefused("state", "this node drains and takes nothing in")
        except AttachRefused as error:
            self._refuse(request.request, error)
            return
        lane = self._prepared[request.request] = self._next_lane()
        self._link.send(
            m.Prepared(
                request=request.request,
                worker_address=self._port.berth(lane),
                lane=lane,
                layout=layout,
                chunk_bytes=CHUNK_BYTES,
            )
        )

    def pull(self, request: m.Pull) -> None:
        """Open the pulling end of a lane and begin to read."""
        self._prepared = {number: lane for number, lane in self._prepared.items() if lane != request.lane}
        try:
            self._node.require_epoch(request.weight_node, request.epoch)
            layout = self._require_layout()
            shape = PullShape(layout)
            lane = self._connect(
                request.lender, request.lender_worker_address, shape, Side.PULLER,
                request.lender_lane, request.lane,
            )  # fmt: skip
        except AttachRefused as error:
            self._port.leave(request.lane)
            self._refuse(request.request, error)
            return
        session = PullSession(
            self._node, request.weight_node, lane,
            [Wanted(sequence_key(name), start, tokens) for name, start, tokens in request.ranges],
            StepBudget(self._tokens_per_step, layout.num_layers),
            node_epoch=request.node_epoch, lender_epoch=request.lender_epoch,
        )  # fmt: skip
        self._pulls.append(_Pull(request.request, session))

    def end(self, request: int) -> None:
        """This pull takes too long, or it will not come to one that was prepared.

        What it had finished is answered, and kept for a while.
        """
        if (lane := self._prepared.pop(request, None)) is not None:
            self._port.leave(lane)
        for pull in self._pulls:
            if pull.request == request:
                try:
                    pull.session.abort()
                except LaneDown:
                    pull.session.close()
                self._end_pull(pull, "it was ended before all was read")
                return

    def _advance_pull(self, pull: _Pull, steps: int) -> bool:
        try:
            moved = pull.session.advance(steps)
        except (LaneDown, ProtocolError) as error:
            self._end_pull(pull, str(error))
            return True
        if moved:
            self._link.progress.move()
        if pull.session.done:
            self._end_pull(pull, "")
        return moved

    def _end_pull(self, pull: _Pull, reason: str) -> None:
        self._pulls.remove(pull)
        pull.session.close()
        self.changed = True
        pulled = [(item.start, item.key) for item in pull.session.pulled]
        self._link.send(m.Pulled(request=pull.request, ranges=pulled, reason=reason))

    # Both

    def _require_layout(self) -> KvLayout:
        if self._node.pool is None:
            raise AttachRefused("layout", "this node holds no KV yet: no weight node is attached")
        return self._node.pool.layout

    def _connect(
        self, peer: str, address: bytes, shape: PullShape, side: Side, send_lane: int, receive_lane: int
    ) -> Lane[PullShape]:
        try:
            return self._port.connect(
                peer, address, shape, side, send_lane=send_lane, receive_lane=receive_lane
            )
        except ValueError as error:
            raise AttachRefused("worker_address", f"worker_address: {error}") from error

    def _refuse(self, request: int, error: AttachRefused) -> None:
        self._link.send(m.Refused(request=request, field=error.field, detail=error.detail))


def _chunk_bytes(wanted: int) -> int:
    """Raises AttachRefused."""
    if not 0 < wanted <= MAX_FRAME_BYTES:
        raise AttachRefused("chunk_bytes", f"chunk_bytes must be 1 to {MAX_FRAME_BYTES}, got {wanted}")
    return wanted
