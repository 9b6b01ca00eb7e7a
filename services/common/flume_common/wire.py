"""The messages of a lane: what their bytes mean. Pure numpy; `lanes` moves them.

A lane joins one weight node (W) and one attention node (A). Every message is a frame: a header of
eight int64 words, then a body. Per step:

    W -> A  PLAN     ops on slots, the rows of this step, and the credit W would like to have
    W -> A  QUERY    one per layer and microbatch: its rows' queries, [query_tokens, query_heads, head_dim]
    A -> W  PARTIAL  one per QUERY, in the same order: o like it, then lse float32 [query_tokens, query_heads]
    W -> A  KV       the appended keys and values of layers [first, last),
                     [last - first, 2, append_tokens, kv_heads, head_dim]; several per step
    A -> W  CREDIT   what W may still append, and how A is doing; whenever that changes, first of all when
                     the lane begins, and soon after every PLAN

A *slot* is a small integer W chooses for one sequence on one lane. It holds that sequence's ranges on
this node, in order of start. A row names the sequence position of its first token: it asks about all
ranges of its slot that start before it, at once, and appends to the open range that ends there. So a
sequence has at most one row per lane and step however often its tail came by, and a lost range is
computed again in its place while its successors stay where they are. Keys arrive after RoPE and every
token asked about lies in the past of every query, so A never masks.

A step may be cut into two microbatches, so that the dense path works on one while the other is attended to.
The last `second_rows` rows of a PLAN are the second's, none where there is one microbatch. QUERYs come layer
by layer, in each the first microbatch before the second; one without queries on this lane has no messages.
That of a layer follows the PARTIAL of the layer before, so two QUERYs at most wait for an answer. KV knows no
microbatches: it is the whole step's.

A PLAN with rows starts a step; QUERY messages follow if any row has queries and KV messages if any
row appends. A step is committed when KV of all its layers is in. Messages of one kind arrive in order, of
different kinds in any: a PLAN may overtake KV sent before it. So a PLAN names the last step whose KV was
sent whole, and A finishes that step before it looks at the PLAN. A step that is unfinished and newer than
that is abandoned, and nothing of it is kept. Ops take effect then, before the PLAN's rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from flume_common.layout import KvLayout

PROTOCOL_VERSION = 4
MOST_MICROBATCHES = 2

Words = NDArray[np.int64]


class Kind(IntEnum):
    """The kinds of message; each is one channel of a lane. The last two are `flume_common.pull_wire`'s."""

    PLAN = 1
    QUERY = 2
    PARTIAL = 3
    KV = 4
    CREDIT = 5
    PULL = 6
    PULLED = 7


class Op(IntEnum):
    """What a PLAN does to a slot before its rows run: [op, slot, argument, key]."""

    OPEN = 1  # argument: start, the sequence position of the new range's first token; key: sequence_key
    CLOSE = 2  # argument: start of an open range, which becomes immutable; key: its length in tokens
    RELEASE = 3  # drops the slot and its ranges
    # A new slot of what another weight node left. argument: position to cut it at; key: sequence_key
    ADOPT = 4
    # A range that this node has pulled for W joins the slot. argument: its start; key: sequence_key
    TAKE = 5
    DROP = 6  # frees one closed range of the slot. argument: its start; key: its length in tokens


class Header(IntEnum):
    """Words of a frame's header. Words not named are zero."""

    STEP = 0  # step number of the sending weight node, counting up; on PARTIAL the step it answers
    BODY_BYTES = 1
    EPOCH = 2  # of the sender
    LAYER = 3  # QUERY, PARTIAL: the layer; KV: the first layer
    LAYER_END = 4  # KV: one past the last layer
    MICROBATCH = 5  # QUERY, PARTIAL: 0, or 1 for the second


HEADER_WORDS = 8
HEADER_BYTES = 8 * HEADER_WORDS
PLAN_HEAD_WORDS = 8
CREDIT_WORDS = 8
OP_WORDS = 4
ROW_WORDS = 5
MAX_OPS = 256  # in one PLAN; W sends several when it has more


class Refusal(IntEnum):
    """Why A refused a step (word of CREDIT). The step is abandoned."""

    NONE = 0
    UNKNOWN_SLOT = 1
    LENGTH_MISMATCH = 2  # the slot holds other tokens than W believes
    OVER_CREDIT = 3
    STALE_EPOCH = 4
    NO_OPEN_RANGE = 5
    TOO_LARGE = 6  # more rows or tokens than the lane was attached for


def sequence_key(sequence: str) -> int:
    """A sequence's name as one signed 64-bit word, the same on every node."""
    return int.from_bytes(hashlib.blake2b(sequence.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True, slots=True)
class LaneShape:
    """Sizes that both ends derive the same buffers from."""

    kinds: ClassVar[tuple[Kind, ...]] = (Kind.PLAN, Kind.QUERY, Kind.PARTIAL, Kind.KV, Kind.CREDIT)

    layout: KvLayout
    max_step_tokens: int  # most query tokens and most appended tokens of one step
    max_step_sequences: int
    kv_frame_bytes: int  # body of one KV message

    def body_bytes(self, kind: Kind) -> int:
        """The largest body of a message of this kind."""
        heads = self.max_step_tokens * self.layout.num_query_heads
        queries = heads * self.layout.head_dim * self.layout.itemsize
        match kind:
            case Kind.PLAN:
                return 8 * (PLAN_HEAD_WORDS + OP_WORDS * MAX_OPS + ROW_WORDS * self.max_step_sequences)
            case Kind.QUERY:
                return queries
            case Kind.PARTIAL:
                return queries + 4 * heads
            case Kind.KV:
                return self.kv_frame_bytes
            case Kind.CREDIT:
                return 8 * CREDIT_WORDS
            case _:
                raise ValueError(f"{kind.name} is no message of this lane")

    def layers_per_kv(self, append_tokens: int) -> int:
        """How many layers of `append_tokens` tokens travel in one KV message.

        Raises ValueError when not even one layer fits the frame.
        """
        layer_bytes = append_tokens * self.layout.layer_token_bytes
        layers = self.kv_frame_bytes // max(layer_bytes, 1)
        if layers < 1:
            raise ValueError(
                f"{append_tokens} tokens need {layer_bytes} bytes a layer, "
                f"the KV frame holds {self.kv_frame_bytes}"
            )
        return min(layers, self.layout.num_layers)


@dataclass(frozen=True, slots=True)
class Plan:
    """A PLAN message. `ops` [n, 4]: op, slot, argument, key. `rows` [n, 5]: slot, queries, append, held,
    position.

    `held` is the number of committed tokens W believes the slot has before the step; A refuses
    another number. `position` is that of the row's first token in its sequence. Queries of the rows
    follow one another in QUERY in row order, appended tokens in KV.
    """

    step: int
    epoch: int
    ops: Words
    rows: Words
    layers_per_kv: int  # of this step's KV messages; 0 when nothing is appended
    want_blocks: int  # unused credit W would like to have; A grants up to it, now or later
    returned_blocks: int  # credit W has given back so far, a running total
    kv_sent_step: int = 0  # the last step whose KV W has sent whole on this lane
    direct: bool = False  # queries and partials go through the lane's region: `direct_region`
    second_rows: int = 0  # so many of the last rows are the second microbatch's

    def encode(self, header: Words, body: Words) -> int:
        """Write into a frame's header and body (int64 views); returns the body's bytes."""
        num_ops, num_rows = len(self.ops), len(self.rows)
        body[:PLAN_HEAD_WORDS] = (
            num_ops, num_rows, self.layers_per_kv,
            self.want_blocks, self.returned_blocks, self.kv_sent_step, self.direct, self.second_rows,
        )  # fmt: skip
        rows_at = PLAN_HEAD_WORDS + OP_WORDS * num_ops
        end = rows_at + ROW_WORDS * num_rows
        body[PLAN_HEAD_WORDS:rows_at] = self.ops.reshape(-1)
        body[rows_at:end] = self.rows.reshape(-1)
        header[Header.STEP] = self.step
        header[Header.EPOCH] = self.epoch
        return 8 * end

    @classmethod
    def decode(cls, header: Words, body: Words) -> Plan:
        """Arrays are copies: the frame may be given back at once."""
        head = (int(word) for word in body[:PLAN_HEAD_WORDS])
        num_ops, num_rows, layers_per_kv, want, returned, kv_sent_step, direct, second_rows = head
        rows_at = PLAN_HEAD_WORDS + OP_WORDS * num_ops
        end = rows_at + ROW_WORDS * num_rows
        return cls(
            step=int(header[Header.STEP]),
            epoch=int(header[Header.EPOCH]),
            ops=body[PLAN_HEAD_WORDS:rows_at].reshape(num_ops, OP_WORDS).copy(),
            rows=body[rows_at:end].reshape(num_rows, ROW_WORDS).copy(),
            layers_per_kv=layers_per_kv,
            want_blocks=want,
            returned_blocks=returned,
            kv_sent_step=kv_sent_step,
            direct=bool(direct),
            second_rows=second_rows,
        )


@dataclass(frozen=True, slots=True)
class Credit:
    """A CREDIT message. Totals only grow, so a lost or repeated one does no harm.

    Unused credit of W = granted − returned − every block W's slots ever took on this lane.
    A block is taken when a step is committed whose first token enters it (an abandoned or refused
    step takes none); blocks of a released slot go back to A and not into W's unused credit.
    """

    granted_blocks: int  # running total for this lane
    capacity_blocks: int  # of the node
    free_blocks: int  # of the node: neither held nor granted to anyone
    draining: bool  # A grants nothing more; W opens no new ranges here (one already on its way is served)
    committed_step: int  # the last step of this lane whose KV is all in
    refused_step: int = 0
    refusal: Refusal = Refusal.NONE
    plans_taken: int = 0  # of this lane

    def encode(self, body: Words) -> int:
        body[:CREDIT_WORDS] = (
            self.granted_blocks, self.capacity_blocks, self.free_blocks, self.draining,
            self.committed_step, self.refused_step, self.refusal, self.plans_taken,
        )  # fmt: skip
        return 8 * CREDIT_WORDS

    @classmethod
    def decode(cls, body: Words) -> Credit:
        granted, capacity, free, draining, committed, refused, why, taken = body[:CREDIT_WORDS].tolist()
        return cls(granted, capacity, free, bool(draining), committed, refused, Refusal(why), taken)
