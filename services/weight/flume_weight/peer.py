"""An attention node as the weight engine sees it: a lane, a credit ledger, slots and waiting ops."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import numpy as np
from flume_common.lanes import Frame, Lane, LaneDown
from flume_common.wire import (
    MAX_OPS,
    OP_WORDS,
    ROW_WORDS,
    Credit,
    Header,
    Kind,
    LaneShape,
    Op,
    Plan,
    Refusal,
    Words,
)

from flume_weight.credit import CreditLedger
from flume_weight.errors import PeerLost, StepRefused
from flume_weight.mapped_region import MappedRegion
from flume_weight.unanswered import Unanswered

PATIENCE_S = 1.0
"""How long others wait for a node. Longer each time that it was in vain, as it may only be slow."""
_NO_ROWS = np.zeros((0, ROW_WORDS), dtype=np.int64)


class Peer:
    """Ops gather here and leave with the next PLAN, in order, so the node sees one history."""

    def __init__(self, node: str, lane: Lane[LaneShape], capacity_blocks: int, epoch: int = 0) -> None:
        self.node = node
        self.epoch = epoch  # of the node when the lane was set up
        self.epoch_rejected = 0  # messages of an older one, which were ignored
        self.lane = lane
        self.region: MappedRegion | None = None  # where devices meet; None: only frames can be exchanged
        self.ledger = CreditLedger(capacity_blocks)
        self.leaving = False  # the node is draining, by its own word or the control plane's
        self.evacuating = False  # its closed ranges are to go to other nodes, too
        self.silent_since_s: float | None = None  # it left a step waiting and has said nothing since
        self.patience_s = PATIENCE_S
        self.want_blocks = 0  # unused credit we would like to have
        self._unanswered = Unanswered(time.monotonic())
        self.kv_sent_step = 0  # the last step whose KV went out whole
        self._ops: list[tuple[int, int, int, int]] = []
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._plans = lane.sender(Kind.PLAN)
        self._credits = lane.receiver(Kind.CREDIT)
        self._partials = lane.receiver(Kind.PARTIAL)
        self._told: tuple[int, int] | None = (0, 0)  # want and returned of the last PLAN

    @property
    def draining(self) -> bool:
        return self.leaving or self.ledger.draining

    @property
    def owes_since_s(self) -> float | None:
        """Since when it has not answered a step or a PLAN; None if it owes us nothing (monotonic)."""
        since_s = (self.silent_since_s, self._unanswered.since_s)
        return min((at_s for at_s in since_s if at_s is not None), default=None)

    def take_slot(self) -> int:
        """A slot number that is free, counting ops not yet sent: ops keep their order."""
        if self._free_slots:
            return self._free_slots.pop()
        self._num_slots += 1
        return self._num_slots - 1

    def open(self, slot: int, start: int, key: int) -> None:
        self._ops.append((Op.OPEN, slot, start, key))

    def close(self, slot: int, start: int, tokens: int) -> None:
        self._ops.append((Op.CLOSE, slot, start, tokens))

    def adopt(self, slot: int, position: int, key: int) -> None:
        self._ops.append((Op.ADOPT, slot, position, key))

    def take(self, slot: int, start: int, key: int) -> None:
        self._ops.append((Op.TAKE, slot, start, key))

    def drop(self, slot: int, start: int, tokens: int) -> None:
        self._ops.append((Op.DROP, slot, start, tokens))

    def release(self, slot: int) -> None:
        self._ops.append((Op.RELEASE, slot, 0, 0))
        self._free_slots.append(slot)

    def hear(self) -> bool:
        """Take in CREDIT messages; whether there were any. Raises PeerLost or StepRefused.

        A silent node is heard by whatever it says, and is silent no more.
        """
        heard = False
        try:
            if self.silent_since_s is not None:
                heard = self._hear_late_partials()
            while (frame := self._credits.poll()) is not None:
                if not self.accepts(frame):
                    self._credits.give_back(frame)
                    continue
                credit = Credit.decode(frame.words)
                self._credits.give_back(frame)
                self.ledger.hear(credit)
                self._unanswered.answered(credit.plans_taken)
                heard = True
                if credit.refusal is not Refusal.NONE:
                    raise StepRefused(self.node, credit.refusal)
        except LaneDown as error:
            raise PeerLost(self.node, str(error)) from error
        if heard:
            self.silent_since_s = None
        return heard

    def _hear_late_partials(self) -> bool:
        """Of the step that was abandoned."""
        heard = False
        while (frame := self._partials.poll()) is not None:
            self._partials.give_back(frame)
            heard = True
        return heard

    def fall_silent(self, since_s: float) -> None:
        """Nothing is asked of it before it speaks; its sequences wait."""
        self.silent_since_s = since_s
        self.patience_s *= 2

    def accepts(self, frame: Frame) -> bool:
        """Whether the frame is from the node as we know it; one of an older epoch is counted."""
        fresh = int(frame.header[Header.EPOCH]) >= self.epoch
        self.epoch_rejected += not fresh
        return fresh

    @property
    def has_news(self) -> bool:
        """Whether the node should hear from us although no step goes there."""
        if self._told is None:
            return True
        want = max(self.want_blocks, 0)
        told_want, told_returned = self._told
        asks = want != told_want and (want > self.ledger.unused_blocks or told_want > want)
        return bool(self._ops) or asks or told_returned != self.ledger.returned_blocks

    def tell_anew(self) -> None:
        """What it was told is out of date, if only in our epoch."""
        self._told = None

    def plan_frame(self) -> Frame | None:
        """A free PLAN frame, or None while all are in flight. Raises PeerLost."""
        try:
            return self._plans.frame()
        except LaneDown as error:
            raise PeerLost(self.node, str(error)) from error

    def send_plan(
        self,
        frame: Frame,
        step: int,
        epoch: int,
        rows: Seq[Seq[int]],
        layers_per_kv: int,
        second_rows: int = 0,
        direct: bool = False,
    ) -> bool:
        """Send waiting ops and the step's rows. False: ops are left over and no row was sent; call again."""
        ops, self._ops = self._ops[:MAX_OPS], self._ops[MAX_OPS:]
        whole = not self._ops
        plan = Plan(
            step=step,
            epoch=epoch,
            ops=_words(ops, OP_WORDS),
            rows=_words(rows, ROW_WORDS) if whole else _NO_ROWS,
            layers_per_kv=layers_per_kv if whole else 0,
            want_blocks=self.want_blocks,
            returned_blocks=self.ledger.returned_blocks,
            kv_sent_step=self.kv_sent_step,
            second_rows=second_rows if whole else 0,
            direct=direct and whole,
        )
        self._told = (self.want_blocks, self.ledger.returned_blocks)
        try:
            self._plans.send(frame, plan.encode(frame.header, frame.words))
        except LaneDown as error:
            raise PeerLost(self.node, str(error)) from error
        self._unanswered.asked(time.monotonic())
        return whole


def _words(rows: Seq[Seq[int]], width: int) -> Words:
    return np.array(rows, dtype=np.int64).reshape(len(rows), width)
