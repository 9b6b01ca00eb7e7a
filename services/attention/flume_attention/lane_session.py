"""One lane, seen from its attention node: a state machine that never waits.

`advance` does one thing that can be done, an answer to one layer at most, so that the steps of several
weight nodes interleave. What comes too early (kinds may overtake one another) stays where it is until
its PLAN is in; what comes too late (its step was refused or abandoned) is dropped by its step number.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flume_common.lanes import Frame, Lane, Receiver
from flume_common.wire import Credit, Header, Kind, LaneShape, Op, Plan, Refusal
from flume_kernels.partial_attention import KvRun, attend_runs
from torch import Tensor

from flume_attention.errors import ProtocolError, StepRefused
from flume_attention.frame_tensors import FrameTensors
from flume_attention.holdings import Holdings, Part, Step
from flume_attention.kv_pool import KvPool
from flume_attention.node import Node

# Below this many queries a second thread costs more than it brings (waking it: 15 us).
MANY_QUERIES = 32


class LaneSession:
    """Raises ProtocolError or LaneDown from `advance`; the engine then drops the lane."""

    def __init__(
        self,
        node: Node,
        weight_node: str,
        epoch: int,
        lane: Lane[LaneShape],
        holdings: Holdings,
        *,
        engine: bytes = b"",
        node_epoch: int = 0,
        use_threads: Callable[[bool], None] = lambda many: None,
        on_refused: Callable[[int, StepRefused], None] = lambda step, error: None,
    ) -> None:
        self.weight_node = weight_node
        self.epoch = epoch  # the lowest that its messages may carry; ours is on what we send
        # Under which the weight node is known to be registered. No message of the lane changes it: only
        # what was verified does.
        self.registered_epoch = epoch
        self.engine = engine  # the weight node's, as `port_of` names it
        self.lane = lane
        self.holdings = holdings
        self.credit_due = True  # the weight node should hear of its credit at once
        self.changed = True  # what is held or granted differs from what was last reported
        self.held_back = False  # no further step begins for now
        self.region = b""  # of a direct lane: its RegionHandle
        self.no_region = ""  # why there is none, if one was asked for
        self.direct = False  # steps have been asked about there: the weight node has mapped it
        self._node = node
        self._node_epoch = node_epoch
        self._plans = lane.receiver(Kind.PLAN)
        self._queries = _Head(lane.receiver(Kind.QUERY))
        self._appends = _Head(lane.receiver(Kind.KV))
        self._partials = lane.sender(Kind.PARTIAL)
        self._credits = lane.sender(Kind.CREDIT)
        self._next_plan: Plan | None = None
        self._plans_taken = 0
        self._last_step = 0  # number of the newest step that was begun or refused
        self._committed_step = 0
        self._refused = (0, Refusal.NONE)
        self._last_credit: Credit | None = None
        self._past: dict[int, list[list[tuple[KvRun, ...]]]] = {}  # by microbatch: per asking row, per layer
        self._attended_s = 0.0  # in the step under way
        self._tensors = FrameTensors(holdings.shape.layout)
        self._use_threads = use_threads
        self._on_refused = on_refused

    @property
    def busy(self) -> bool:
        """Whether a step is under way that goes on only if somebody looks: the engine must not sleep."""
        return False

    @property
    def under_way(self) -> bool:
        """Whether a device works for this lane, or waits for its other end."""
        return self.busy

    def close(self) -> None:
        """Leave nothing behind that uses the lane's memory: before the lane is closed."""

    def advance(self) -> bool:
        """Do one thing; False when there is nothing to do. Queries first: the weight node awaits them."""
        return (
            self._answer() or self._append() or self._take_plan() or (self.credit_due and self.send_credit())
        )

    # PLAN

    def _take_plan(self) -> bool:
        plan = None if self.held_back else self._next_plan or self._poll_plan()
        if plan is None:
            return False
        self._next_plan = plan
        step = self.holdings.step
        # Sent whole, so it will arrive: the PLAN has overtaken it.
        if step is not None and step.awaits_kv and step.number <= plan.kv_sent_step:
            return False
        self._next_plan = None
        self._run_plan(plan)
        return True

    def _poll_plan(self) -> Plan | None:
        frame = self._plans.poll()
        if frame is None:
            return None
        plan = Plan.decode(frame.header, frame.words)
        self._plans.give_back(frame)
        return plan

    def _run_plan(self, plan: Plan) -> None:
        if plan.step < self._last_step:
            raise ProtocolError(f"PLAN {plan.step} came after step {self._last_step}")
        self._plans_taken += 1
        self.holdings.abandon()
        self._past, self._attended_s = {}, 0.0
        self.changed = True
        if len(plan.rows):
            self._last_step = plan.step
        try:
            self._require_epoch(plan)
            self.holdings.set_credit(plan.want_blocks, plan.returned_blocks)
            for op, slot, argument, key in plan.ops.tolist():
                self.holdings.apply(op, slot, argument, key)
                # The weight node has counted them against credit it is yet to hear of.
                self.credit_due = self.credit_due or op in (Op.ADOPT, Op.TAKE)
            if len(plan.rows):
                self.holdings.begin(plan.step, plan.rows, plan.second_rows)
        except StepRefused as error:
            self._refused = (plan.step, error.refusal)
            self.credit_due = True
            self._on_refused(plan.step, error)

    def _require_epoch(self, plan: Plan) -> None:
        if plan.epoch < self.epoch:
            self._node.epoch_rejected += 1
            raise StepRefused(Refusal.STALE_EPOCH, f"epoch {plan.epoch} is older than {self.epoch}")

    # QUERY -> PARTIAL

    def _answer(self) -> bool:
        frame = self._queries.peek()
        if frame is None:
            return False
        step = self._step_of(frame, self._queries)
        if step is None:
            return False
        answer = self._partials.frame()
        if answer is None:
            return False
        layer, part = self._require_query(step, frame)
        q = self._tensors.queries(frame, part.query_tokens)
        o, lse = self._tensors.partial(answer, part.query_tokens)
        began_s = time.perf_counter()
        self._attend(part, layer, q, o, lse)
        self._attended_s += time.perf_counter() - began_s
        step.asked += 1
        self._send_partial(step, answer)
        self._queries.drop()
        return True

    def _send_partial(self, step: Step, answer: Frame) -> None:
        """The next one of this step."""
        layer, at = step.turn(step.answered)
        part, header = step.parts[at], answer.header
        header[Header.STEP], header[Header.LAYER] = step.number, layer
        header[Header.EPOCH], header[Header.MICROBATCH] = self._node_epoch, part.microbatch
        self._partials.send(answer, self._tensors.partial_bytes(part.query_tokens))
        step.answered += 1
        if step.answered == len(step.parts) * self.holdings.shape.layout.num_layers:
            self._note_reads(step)

    def _note_reads(self, step: Step) -> None:
        if step.query_tokens < MANY_QUERIES:
            tokens = sum(run.tokens for row in step.asking for run in row.past)
            self._node.reads.add(tokens * self.holdings.shape.layout.token_bytes, self._attended_s)

    def _require_query(self, step: Step, frame: Frame) -> tuple[int, Part]:
        """The layer and the part that the frame asks about, which must be those whose turn it is."""
        if not step.parts or step.asked == len(step.parts) * self.holdings.shape.layout.num_layers:
            raise ProtocolError(f"step {step.number}: a QUERY beyond the step's")
        layer, at = step.turn(step.asked)
        part, header = step.parts[at], frame.header
        wanted = (layer, part.microbatch, self._tensors.query_bytes(part.query_tokens))
        got = tuple(int(header[word]) for word in (Header.LAYER, Header.MICROBATCH, Header.BODY_BYTES))
        if got != wanted:
            raise ProtocolError(
                f"step {step.number}: QUERY of layer {got[0]}, microbatch {got[1]} and {got[2]} bytes, "
                f"expected layer {wanted[0]}, microbatch {wanted[1]} and {wanted[2]} bytes"
            )
        return layer, part

    def _attend(self, part: Part, layer: int, q: Tensor, o: Tensor, lse: Tensor) -> None:
        scale = self.holdings.shape.layout.head_dim**-0.5
        past = self._past.get(part.microbatch) or self._open_past(part)
        self._use_threads(part.query_tokens >= MANY_QUERIES)
        if len(past) == 1:
            attend_runs(q, past[0][layer], scale, o, lse)
            return
        at = 0
        for row, layers in zip(part.asking, past, strict=True):
            end = at + row.queries
            attend_runs(q[at:end], layers[layer], scale, o[at:end], lse[at:end])
            at = end

    def _open_past(self, part: Part) -> list[list[tuple[KvRun, ...]]]:
        assert isinstance(self._node.pool, KvPool)
        past = self._past[part.microbatch] = [self._node.pool.layers_of(row.past) for row in part.asking]
        return past

    # KV

    def _append(self) -> bool:
        frame = self._appends.peek()
        if frame is None:
            return False
        step = self._step_of(frame, self._appends)
        if step is None:
            return False
        first, end = int(frame.header[Header.LAYER]), int(frame.header[Header.LAYER_END])
        self._require_append(step, first, end, int(frame.header[Header.BODY_BYTES]))
        assert self._node.pool is not None
        kv = self._tensors.appended(frame, end - first, step.append_tokens)
        self._node.pool.write(first, kv, [run for row in step.rows for run in row.target])
        self._appends.drop()
        step.layers_appended = end
        if end == self.holdings.shape.layout.num_layers:
            self.holdings.commit()
            self._committed_step = step.number
            self.changed = True
        return True

    def _require_append(self, step: Step, first: int, end: int, size: int) -> None:
        layout = self.holdings.shape.layout
        wanted = (end - first) * step.append_tokens * layout.layer_token_bytes
        in_order = first == step.layers_appended and first < end <= layout.num_layers
        if not in_order or size != wanted or not step.awaits_kv:
            raise ProtocolError(
                f"step {step.number}: KV of layers [{first}, {end}) with {size} bytes, expected {wanted} "
                f"bytes from layer {step.layers_appended} for {step.append_tokens} tokens"
            )

    def _step_of(self, frame: Frame, head: _Head) -> Step | None:
        """The step under way if the frame is part of it; otherwise the frame is dropped or left for later."""
        number = int(frame.header[Header.STEP])
        step = self.holdings.step
        if frame.header[Header.EPOCH] < self.epoch:
            self._node.epoch_rejected += 1
            self.changed = True
            head.drop()
            return None
        if step is not None and number == step.number:
            return step
        if number <= self._last_step:
            head.drop()
        return None

    # CREDIT

    def send_credit(self) -> bool:
        """Tell the weight node how things stand; False while every CREDIT frame is in flight."""
        frame = self._credits.frame()
        if frame is None:
            return False
        credit = self._credit()
        frame.header[Header.STEP], frame.header[Header.EPOCH] = credit.committed_step, self._node_epoch
        self._credits.send(frame, credit.encode(frame.words))
        self.credit_due = False
        self._refused = (0, Refusal.NONE)  # said once
        self._last_credit = self._credit()
        return True

    @property
    def credit_stale(self) -> bool:
        """Whether the weight node's picture is out of date, urgently or not."""
        return self._credit() != self._last_credit

    def _credit(self) -> Credit:
        return Credit(
            granted_blocks=self.holdings.granted,
            capacity_blocks=self._node.capacity_blocks,
            free_blocks=self._node.free_blocks,
            draining=self._node.draining,
            committed_step=self._committed_step,
            refused_step=self._refused[0],
            refusal=self._refused[1],
            plans_taken=self._plans_taken,
        )


class _Head:
    """The oldest message of one kind, looked at for as long as it takes."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._frame: Frame | None = None

    def peek(self) -> Frame | None:
        if self._frame is None:
            self._frame = self._receiver.poll()
        return self._frame

    def drop(self) -> None:
        assert self._frame is not None
        frame, self._frame = self._frame, None
        self._receiver.give_back(frame)
