"""A fake weight node: drives a real attention engine over real UCX lanes, with random values.

It keeps every token it appended in plain tensors, so that each partial can be compared with the
double-precision reference over exactly the tokens the node should hold.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from flume_attention.messages import Attach, Attached
from flume_common.lanes import Lane, Port, Side
from flume_common.layout import KvLayout
from flume_common.wire import (
    Credit,
    Header,
    Kind,
    LaneShape,
    Op,
    Plan,
    sequence_key,
)
from flume_kernels import reference

LAYOUT = KvLayout(
    num_layers=3, num_query_heads=4, num_kv_heads=2, head_dim=16, dtype="float32", block_tokens=4
)
_lane_numbers = itertools.count(1000)
_names = itertools.count(1)


@dataclass
class FakeSlot:
    """What the node should hold for a slot: K and V [layers, 2, tokens, kv_heads, head_dim]."""

    kv: torch.Tensor
    opened_at: int = 0  # where its newest range starts

    @property
    def held(self) -> int:
        return self.kv.shape[2]


@dataclass
class FakeWeightNode:
    """One lane to an engine. Steps are driven by hand, or whole with `step`."""

    port: Port
    shape: LaneShape = field(
        default_factory=lambda: LaneShape(
            LAYOUT, max_step_tokens=64, max_step_sequences=8, kv_frame_bytes=64 * LAYOUT.layer_token_bytes
        )
    )
    epoch: int = 1
    name: str = field(default_factory=lambda: f"weight-{next(_names)}")
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        self.receive_lane = next(_lane_numbers)
        self.lane: Lane
        self.number = 0
        self.last_epoch = 0  # of what was received last
        self.kv_sent = 0
        self.want = 16
        self.returned = 0
        self.taken = 0
        self.credit: Credit | None = None
        self.slots: dict[int, FakeSlot] = {}
        self.random = torch.Generator().manual_seed(sum(map(ord, self.name)))

    def attach_request(self, request: int = 1, **changes: object) -> Attach:
        fields = {
            "request": request,
            "weight_node": self.name,
            "epoch": self.epoch,
            "layout": self.shape.layout,
            "worker_address": self.port.address,
            "lane": self.receive_lane,
            "max_step_tokens": self.shape.max_step_tokens,
            "max_step_sequences": self.shape.max_step_sequences,
            "kv_frame_bytes": self.shape.kv_frame_bytes,
        }
        return Attach(**(fields | changes))

    def connect(self, attached: Attached) -> None:
        self.lane = self.port.connect(
            "attention", attached.worker_address, self.shape, Side.WEIGHT,
            send_lane=attached.lane, receive_lane=self.receive_lane,
        )  # fmt: skip

    # Single messages

    def plan(self, rows=(), ops=(), *, number=None, epoch=None, kv_sent=None, second=0) -> int:
        """Send a PLAN of rows (slot, queries, append, held[, position]) and ops (op, slot, argument, key).

        Returns its step. Slots here begin with their sequence, so that a row's position is what is held.
        """
        rows = [row if len(row) == 5 else (*row, row[3]) for row in rows]
        if number is None:
            self.number += 1
            number = self.number
        plan = Plan(
            step=number,
            epoch=self.epoch if epoch is None else epoch,
            ops=np.array(ops, dtype=np.int64).reshape(-1, 4),
            rows=np.array(rows, dtype=np.int64).reshape(-1, 5),
            layers_per_kv=1,
            want_blocks=self.want,
            returned_blocks=self.returned,
            kv_sent_step=self.kv_sent if kv_sent is None else kv_sent,
            direct=self.asks_directly(rows),
            second_rows=second,
        )
        frame = self._frame(Kind.PLAN)
        self.lane.sender(Kind.PLAN).send(frame, plan.encode(frame.header, frame.words))
        return number

    def asks_directly(self, rows) -> bool:
        return False

    def query(self, number: int, layer: int, q: torch.Tensor, microbatch: int = 0) -> None:
        self._send(Kind.QUERY, number, layer, layer + 1, q, microbatch)

    def append(self, number: int, first: int, kv: torch.Tensor) -> None:
        """kv [layers, 2, tokens, kv_heads, head_dim]"""
        self._send(Kind.KV, number, first, first + kv.shape[0], kv)

    def partial(
        self, number: int, layer: int, tokens: int, microbatch: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next partial of this step; those of older steps are dropped, as a weight node does."""
        frame = self._receive(Kind.PARTIAL)
        while frame.header[Header.STEP] < number:
            self.lane.receiver(Kind.PARTIAL).give_back(frame)
            frame = self._receive(Kind.PARTIAL)
        words = [frame.header[word] for word in (Header.STEP, Header.LAYER, Header.MICROBATCH)]
        assert words == [number, layer, microbatch]
        layout = self.shape.layout
        split = tokens * layout.num_query_heads * layout.head_dim * layout.itemsize
        size = split + 4 * tokens * layout.num_query_heads
        assert frame.header[Header.BODY_BYTES] == size
        body = torch.from_numpy(frame.body.copy())
        o = body[:split].view(getattr(torch, layout.dtype)).view(tokens, -1, layout.head_dim)
        lse = body[split:size].view(torch.float32).view(tokens, -1)
        self.lane.receiver(Kind.PARTIAL).give_back(frame)
        return o, lse

    def await_credit(self, satisfied) -> Credit:
        """The first credit, the last seen one included, that satisfies."""
        deadline = time.monotonic() + self.timeout_s
        while self.credit is None or not satisfied(self.credit):
            assert time.monotonic() < deadline, f"no such credit; the last was {self.credit}"
            frame = self._receive(Kind.CREDIT)
            self.credit = Credit.decode(frame.words)
            self.lane.receiver(Kind.CREDIT).give_back(frame)
        return self.credit

    def credits_waiting(self, for_s: float) -> int:
        """How many CREDIT messages arrive in this time."""
        count, until = 0, time.monotonic() + for_s
        receiver = self.lane.receiver(Kind.CREDIT)
        while time.monotonic() < until:
            self.port.progress()
            while (frame := receiver.poll()) is not None:
                self.credit = Credit.decode(frame.words)
                receiver.give_back(frame)
                count += 1
            time.sleep(0.005)
        return count

    # Whole steps

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(getattr(torch, self.shape.layout.dtype))

    def new_kv(self, tokens: int) -> torch.Tensor:
        layout = self.shape.layout
        return self.rand(layout.num_layers, 2, tokens, layout.num_kv_heads, layout.head_dim)

    def open(self, slot: int, sequence: str | None = None) -> tuple[int, int, int, int]:
        """The op that opens a range in a slot."""
        self.slots.setdefault(slot, FakeSlot(self.new_kv(0)))
        self.slots[slot].opened_at = self.slots[slot].held
        return (Op.OPEN, slot, self.slots[slot].held, sequence_key(sequence or f"{self.name}/{slot}"))

    def close(self, slot: int) -> tuple[int, int, int, int]:
        opened_at = self.slots[slot].opened_at
        return (Op.CLOSE, slot, opened_at, self.slots[slot].held - opened_at)

    def release(self, slot: int) -> tuple[int, int, int, int]:
        del self.slots[slot]
        return (Op.RELEASE, slot, 0, 0)

    def step(self, *rows: tuple[int, int, int], ops=(), kv_layers: int = 1, second: int = 0) -> None:
        """One step with rows (slot, queries, append): send it, check every partial, and commit. The last
        `second` rows are the second microbatch's."""
        self.finish(self.begin(*rows, ops=ops, second=second), kv_layers=kv_layers)

    def begin(self, *rows: tuple[int, int, int], ops=(), second: int = 0) -> RunningStep:
        number = self.plan([(s, n, a, self.slots[s].held) for s, n, a in rows], ops, second=second)
        return RunningStep(self, number, rows, second)

    def finish(self, running: RunningStep, kv_layers: int = 1) -> None:
        """A microbatch asks about its next layer when it has an answer, as a weight node does."""
        layers = self.shape.layout.num_layers
        running.ask(0)
        for layer in range(layers):
            for part in running.parts:
                running.check(layer, part)
                if layer + 1 < layers:
                    running.ask(layer + 1, part)
        running.send_kv(kv_layers)

    def _frame(self, kind: Kind):
        sender, got = self.lane.sender(kind), []
        assert self.port.wait(lambda: (f := sender.frame()) is not None and not got.append(f), self.timeout_s)
        return got[0]

    def _send(
        self, kind: Kind, number: int, first: int, end: int, values: torch.Tensor, microbatch: int = 0
    ) -> None:
        frame = self._frame(kind)
        frame.header[Header.STEP], frame.header[Header.EPOCH] = number, self.epoch
        frame.header[Header.LAYER], frame.header[Header.LAYER_END] = first, end
        frame.header[Header.MICROBATCH] = microbatch
        data = values.contiguous().flatten().view(torch.uint8).numpy()
        frame.body[: len(data)] = data
        self.lane.sender(kind).send(frame, len(data))

    def _receive(self, kind: Kind):
        receiver, got = self.lane.receiver(kind), []
        arrived = self.port.wait(
            lambda: (f := receiver.poll()) is not None and not got.append(f), self.timeout_s
        )
        assert arrived, f"{self.name}: no {kind.name} within {self.timeout_s} s"
        self.last_epoch = int(got[0].header[Header.EPOCH])
        return got[0]


@dataclass(frozen=True)
class Asked:
    """A microbatch's rows with queries, and which of the step's queries are theirs."""

    microbatch: int
    rows: list[tuple[int, int, int]]
    queries: slice


class RunningStep:
    """A step between its PLAN and its last KV."""

    def __init__(
        self, node: FakeWeightNode, number: int, rows: tuple[tuple[int, int, int], ...], second: int = 0
    ) -> None:
        self.node = node
        self.number = number
        self.rows = rows
        self.parts: list[Asked] = []
        self.queries = 0
        for microbatch, some in enumerate((rows[: len(rows) - second], rows[len(rows) - second :])):
            count = sum(n for _, n, _ in some)
            if count:
                self.parts.append(Asked(microbatch, some, slice(self.queries, self.queries + count)))
            self.queries += count
        layout = node.shape.layout
        self.q = node.rand(layout.num_layers, self.queries, layout.num_query_heads, layout.head_dim)
        self.past = {slot: node.slots[slot].kv for slot, _, _ in rows}
        self.kv = {slot: node.new_kv(append) for slot, _, append in rows}

    def ask(self, layer: int, only: Asked | None = None) -> None:
        for part in [only] if only else self.parts:
            self.node.query(self.number, layer, self.q[layer, part.queries], part.microbatch)

    def check(self, layer: int, only: Asked | None = None) -> None:
        """The partials of this layer equal attention over what was held when the step began."""
        for part in [only] if only else self.parts:
            q = self.q[layer, part.queries]
            o, lse = self.node.partial(self.number, layer, len(q), part.microbatch)
            self._compare(layer, part.rows, q, o, lse)

    def _compare(self, layer, rows, q, o, lse) -> None:
        tolerance = 1e-5 if self.node.shape.layout.dtype == "float32" else 1e-2
        at = 0
        for slot, n, _ in rows:
            k, v = self.past[slot][layer].transpose(1, 2)
            scale = self.node.shape.layout.head_dim**-0.5
            want_o, want_lse = reference.attention(q[at : at + n], k, v, scale)
            torch.testing.assert_close(o[at : at + n].double(), want_o, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse[at : at + n].double(), want_lse, atol=2e-3, rtol=1e-4)
            at += n

    def send_kv(self, layers_per_kv: int = 1, until: int | None = None) -> None:
        """KV of the layers up to `until`; with all of them the step is committed."""
        layers = self.node.shape.layout.num_layers
        end = layers if until is None else until
        appended = torch.cat(
            [self.kv[slot] for slot, _, append in self.rows if append] or [self.node.new_kv(0)], 2
        )
        if appended.shape[2] == 0:
            return
        for first in range(0, end, layers_per_kv):
            self.node.append(self.number, first, appended[first : min(end, first + layers_per_kv)])
        if end == layers:
            self.node.kv_sent = self.number
            for slot, _, _ in self.rows:
                self.node.slots[slot].kv = torch.cat([self.node.slots[slot].kv, self.kv[slot]], 2)
