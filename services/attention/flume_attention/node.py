"""What all lanes of one node share: its memory, its credit, its state. And who may attach.

One node holds one KV layout at a time. The first weight node brings it; another one may be brought when
no lane is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flume_common.epochs import revision_of
from flume_common.layout import KvLayout, LayoutMismatch
from flume_common.read_speed import ReadSums
from flume_common.wire import LaneShape

from flume_attention.arrivals import Arrivals
from flume_attention.blocks import BlockPool
from flume_attention.credit import grants
from flume_attention.errors import AttachRefused
from flume_attention.holdings import Holdings
from flume_attention.kv_pool import KvPool, MakePool, Pool
from flume_attention.messages import Attach
from flume_attention.orphans import Orphans
from flume_attention.ranges import Range

MAX_FRAME_BYTES = 1 << 30


@dataclass(slots=True)
class Node:
    """A node's memory budget and what became of it."""

    kv_bytes: int
    dtype: str | None = None  # the only one taken; None: the weight node's
    draining: bool = False
    epoch_rejected: int = 0  # messages refused for an older epoch
    pulled_tokens: int = 0  # read from other nodes
    pulls_refused: int = 0  # reads of ranges that are not there any more
    reads: ReadSums = field(default_factory=ReadSums)  # by steps of few queries
    make_pool: MakePool = KvPool
    pool: Pool | None = None
    blocks: BlockPool = field(default_factory=lambda: BlockPool(0))
    holdings: dict[str, Holdings] = field(default_factory=dict)  # by weight node
    orphans: Orphans = field(default_factory=Orphans)
    arrivals: Arrivals = field(default_factory=Arrivals)
    epochs: dict[str, int] = field(default_factory=dict)  # the newest seen of each weight node

    @property
    def capacity_blocks(self) -> int:
        return self.blocks.num_blocks

    @property
    def free_blocks(self) -> int:
        """Neither held nor promised to anyone."""
        lanes = self.holdings.values()
        return self.blocks.free + sum(lane.reserved_blocks - lane.unused for lane in lanes)

    @property
    def used_blocks(self) -> int:
        """Held by committed tokens."""
        return self.blocks.held - sum(lane.reserved_blocks for lane in self.holdings.values())

    def grant(self) -> list[str]:
        """Give out what credit there is; returns the weight nodes whose credit grew."""
        names = list(self.holdings)
        demands = [self.holdings[name].demand for name in names]
        grown = []
        for name, blocks in zip(
            names, grants(self.free_blocks, demands, draining=self.draining), strict=True
        ):
            self.holdings[name].granted += blocks
            if blocks:
                grown.append(name)
        return grown

    def admit(self, request: Attach) -> LaneShape:
        """Decide about a lane and make room for its layout. Frees a lane it replaces only in `add`.

        Raises AttachRefused naming the field of AttachRequest that is to blame.
        """
        self.require_epoch(request.weight_node, request.epoch)
        others = any(name != request.weight_node for name in self.holdings)
        self._require_layout(request.layout, others=others)
        return _shape(request)

    def require_epoch(self, weight_node: str, epoch: int) -> None:
        """Raises AttachRefused for an epoch older than one seen, and counts it."""
        newest = self.epochs.get(weight_node, epoch)
        if epoch < newest:
            self.epoch_rejected += 1
            raise AttachRefused(
                "epoch",
                f"epoch {revision_of(epoch)} of {weight_node} is older than {revision_of(newest)}, "
                "which was seen already",
            )
        self.epochs[weight_node] = epoch

    def fence(self, weight_node: str, below: int) -> None:
        """From now on this weight node is refused with an epoch below this one."""
        self.epochs[weight_node] = max(below, self.epochs.get(weight_node, below))

    def add(self, weight_node: str, shape: LaneShape) -> Holdings:
        """Holdings for a new lane of this weight node. Needs the lane it replaces removed.

        Raises AttachRefused when the machine does not give the memory.
        """
        assert weight_node not in self.holdings
        if self.pool is None or self.pool.layout != shape.layout:
            self._take_layout(shape.layout)
        holdings = Holdings(
            self.blocks, shape, weight_node=weight_node, orphans=self.orphans, arrivals=self.arrivals
        )
        self.holdings[weight_node] = holdings
        return holdings

    def remove(self, weight_node: str) -> None:
        """Free everything this weight node's lane holds."""
        self.holdings.pop(weight_node).release_all()

    def orphan(self, weight_node: str, engine: bytes, now_s: float) -> None:
        """Keep what this weight node's lane holds for others to take over, and free its credit."""
        self.orphans.add(weight_node, engine, self.holdings.pop(weight_node).leave(), now_s)

    @property
    def used_tokens(self) -> int:
        """Of committed ranges, with orphans and arrivals."""
        lanes = sum(lane.held_tokens for lane in self.holdings.values())
        return lanes + self.orphans.held_tokens + self.arrivals.held_tokens

    def closed_range(self, key: int, start: int, tokens: int) -> Range | None:
        """A closed range of a lane that is up, by its sequence's key; None when there is no such."""
        for lane in self.holdings.values():
            for slot in lane.slots.values():
                item = slot.range_at(start) if slot.key == key else None
                if item is not None and item.closed and item.length == tokens:
                    return item
        return None

    def make_room(self, start: int, tokens: int) -> Range | None:
        """A range with memory for `tokens` that nobody is promised; None when there is not so much."""
        if self.pool is None or self.pool.layout.blocks_of(tokens) > self.free_blocks:
            return None
        item = Range(self.blocks, self.pool.layout.block_tokens, start)
        item.reserve(tokens)
        return item

    def has(self, key: int) -> bool:
        """Whether a lane that is up holds something of this sequence."""
        lanes = self.holdings.values()
        return any(slot.key == key for lane in lanes for slot in lane.slots.values())

    def _take_layout(self, layout: KvLayout) -> None:
        assert not self.holdings
        self.orphans.clear()
        self.arrivals.clear()
        self.pool, self.blocks = None, BlockPool(0)  # before the next one is allocated
        num_blocks = self.kv_bytes // layout.block_bytes
        try:
            self.pool = self.make_pool(layout, num_blocks)
        except ValueError as error:
            raise AttachRefused("layout", str(error)) from error
        except (RuntimeError, MemoryError) as error:
            raise AttachRefused("layout", f"no {num_blocks} blocks of KV memory: {error}") from error
        self.blocks = BlockPool(num_blocks)

    def _require_layout(self, layout: KvLayout, *, others: bool) -> None:
        if self.dtype is not None and layout.dtype != self.dtype:
            raise AttachRefused("layout.dtype", f"this node was started for {self.dtype}, not {layout.dtype}")
        if self.pool is not None and others:
            try:
                self.pool.layout.require_same(layout)
            except LayoutMismatch as error:
                raise AttachRefused(f"layout.{error.field}", str(error)) from error
        if self.kv_bytes < layout.block_bytes:
            raise AttachRefused(
                "layout",
                f"KV memory of {self.kv_bytes} bytes holds no block of {layout.block_tokens} tokens, "
                f"which takes {layout.block_bytes}",
            )


def _shape(request: Attach) -> LaneShape:
    shape = LaneShape(
        request.layout, request.max_step_tokens, request.max_step_sequences, request.kv_frame_bytes
    )
    for name in ("max_step_tokens", "max_step_sequences"):
        if getattr(shape, name) < 1:
            raise AttachRefused(name, f"{name} must be at least 1")
    if shape.kv_frame_bytes < shape.layout.layer_token_bytes:
        raise AttachRefused(
            "kv_frame_bytes",
            f"kv_frame_bytes {shape.kv_frame_bytes} does not hold one token of one layer, "
            f"which takes {shape.layout.layer_token_bytes}",
        )
    for kind in shape.kinds:
        if shape.body_bytes(kind) > MAX_FRAME_BYTES:
            raise AttachRefused(
                "max_step_tokens",
                f"a {kind.name} frame of {shape.body_bytes(kind)} bytes is over {MAX_FRAME_BYTES}",
            )
    return shape
