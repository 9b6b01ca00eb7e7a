"""What one lane holds: its slots, its credit, and the step that is under way. No tensors, no I/O.

Every change a weight node can cause goes through here, and either happens whole or raises StepRefused
and leaves everything as it was. A step reserves the blocks it will fill when it begins; they count as
taken only when it is committed, and go back when it is abandoned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from flume_common.wire import LaneShape, Op, Refusal, Words

from flume_attention.arrivals import Arrivals
from flume_attention.blocks import BlockPool
from flume_attention.credit import Demand
from flume_attention.errors import StepRefused
from flume_attention.orphans import Orphans
from flume_attention.ranges import Range, Run, Slot


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in a step."""

    slot: Slot
    queries: int
    append: int
    grows: Range | None  # the range it appends to
    past: list[Run]  # the tokens it asks about: those held when the step began and before its position
    target: list[Run]  # where its appended tokens go


@dataclass(frozen=True, slots=True)
class Part:
    """What one microbatch asks of this node: `asking` are those of its rows that have queries."""

    microbatch: int
    asking: list[Row]
    query_tokens: int


@dataclass(slots=True)
class Step:
    """A step under way. Layers are asked about, answered and appended in order, and in each the parts."""

    number: int
    rows: list[Row]
    parts: list[Part]  # of the microbatches with queries
    append_tokens: int
    asked: int = 0  # QUERYs taken up
    answered: int = 0
    layers_appended: int = 0
    committed: bool = False

    @property
    def query_tokens(self) -> int:
        return sum(part.query_tokens for part in self.parts)

    @property
    def asking(self) -> list[Row]:
        """Those of the rows with queries."""
        return [row for part in self.parts for row in part.asking]

    @property
    def all_asked(self) -> bool:
        """Whether every part waits for an answer: nothing can be asked before there is one."""
        return 0 < len(self.parts) == self.asked - self.answered

    def turn(self, number: int) -> tuple[int, int]:
        """Layer of the QUERY or PARTIAL of this number, and index of its part. There must be parts."""
        return divmod(number, len(self.parts))

    @property
    def awaits_kv(self) -> bool:
        """Whether KV of this step is still to come."""
        return self.append_tokens > 0 and not self.committed


@dataclass(slots=True)
class Holdings:
    """One lane's slots and credit out of a node's blocks."""

    blocks: BlockPool
    shape: LaneShape
    slots: dict[int, Slot] = field(default_factory=dict)
    granted: int = 0  # the running totals of wire.Credit, in blocks
    returned: int = 0
    taken: int = 0
    want: int = 0
    held_blocks: int = 0  # by committed tokens
    held_tokens: int = 0
    weight_node: str = ""
    orphans: Orphans = field(default_factory=Orphans)  # of the node
    arrivals: Arrivals = field(default_factory=Arrivals)  # of the node
    step: Step | None = None
    steps: int = 0  # committed or, without appends, begun

    @property
    def unused(self) -> int:
        """Credit in blocks that the weight node may still use. Covers what is reserved, too."""
        return self.granted - self.returned - self.taken

    @property
    def demand(self) -> Demand:
        return Demand(self.unused, self.want)

    @property
    def reserved_blocks(self) -> int:
        """Blocks the step under way has taken from the pool and not from the credit yet."""
        if self.step is None or self.step.committed:
            return 0
        return sum(row.grows.reserved_blocks for row in self.step.rows if row.grows)

    @property
    def num_ranges(self) -> int:
        return sum(len(slot.ranges) for slot in self.slots.values())

    def set_credit(self, want_blocks: int, returned_blocks: int) -> None:
        """Take over what a PLAN says. Raises StepRefused when more is returned than is unused."""
        if returned_blocks > self.granted - self.taken or returned_blocks < self.returned:
            raise StepRefused(
                Refusal.OVER_CREDIT,
                f"returned {returned_blocks} blocks in all, of {self.granted} granted and {self.taken} taken",
            )
        self.want, self.returned = want_blocks, returned_blocks

    def apply(self, op: int, slot: int, argument: int, key: int) -> None:
        """One op of a PLAN. Raises StepRefused."""
        match op:
            case Op.OPEN:
                self._open(slot, argument, key)
            case Op.CLOSE:
                self._close(slot, argument, key)
            case Op.RELEASE:
                self._release(slot)
            case Op.ADOPT:
                self._adopt(slot, argument, key)
            case Op.TAKE:
                self._take(slot, argument, key)
            case Op.DROP:
                self._drop(slot, argument, key)
            case _:
                raise StepRefused(Refusal.UNKNOWN_SLOT, f"op {op} on slot {slot} is none of this protocol")

    def _open(self, number: int, start: int, key: int) -> None:
        slot = self.slots.get(number)
        if slot is None:
            slot = self.slots[number] = Slot(key)
        elif slot.key != key:
            raise StepRefused(Refusal.LENGTH_MISMATCH, f"slot {number} is another sequence's")
        elif slot.range_at(start) is not None or slot.open_at(start) is not None:
            raise StepRefused(
                Refusal.LENGTH_MISMATCH, f"slot {number} has a range that starts or is open at {start}"
            )
        slot.add(Range(self.blocks, self.shape.layout.block_tokens, start))

    def _close(self, number: int, start: int, length: int) -> None:
        slot = self._slot(number)
        item = slot.range_at(start)
        if item is None or item.closed:
            raise StepRefused(Refusal.NO_OPEN_RANGE, f"slot {number} has no open range at {start} to close")
        if item.length != length:
            raise StepRefused(
                Refusal.LENGTH_MISMATCH,
                f"slot {number}: the range at {start} closed at {length}, it holds {item.length} tokens",
            )
        item.closed = True
        if item.length == 0:
            slot.ranges.remove(item)

    def _release(self, number: int) -> None:
        """Releasing what is not there is no error: it is gone either way."""
        slot = self.slots.pop(number, None)
        if slot is None:
            return
        self.held_blocks -= slot.num_blocks
        self.held_tokens -= slot.held
        slot.release()

    def _adopt(self, number: int, position: int, key: int) -> None:
        if number in self.slots:
            raise StepRefused(Refusal.LENGTH_MISMATCH, f"slot {number} is in use")
        slot = self.orphans.take(key, self.weight_node)
        if slot is None:
            raise StepRefused(Refusal.UNKNOWN_SLOT, f"nothing is kept of sequence {key} for this weight node")
        slot.cut(position)
        self.slots[number] = slot
        self._receive(slot.held, slot.num_blocks)

    def _take(self, number: int, start: int, key: int) -> None:
        slot = self.slots.get(number) or Slot(key)
        if slot.key != key or slot.range_at(start) is not None:
            raise StepRefused(
                Refusal.LENGTH_MISMATCH, f"slot {number} is another sequence's or has a range at {start}"
            )
        item = self.arrivals.take(self.weight_node, key, start)
        if item is None:
            raise StepRefused(Refusal.UNKNOWN_SLOT, f"no range at {start} of sequence {key} has arrived")
        self.slots[number] = slot
        slot.add(item)
        slot.held += item.length
        self._receive(item.length, item.num_blocks)

    def _receive(self, tokens: int, blocks: int) -> None:
        """Blocks that others filled count as granted to this lane and taken by it, in one."""
        self.held_tokens += tokens
        self.held_blocks += blocks
        self.granted += blocks
        self.taken += blocks

    def _drop(self, number: int, start: int, length: int) -> None:
        slot = self._slot(number)
        item = slot.range_at(start)
        if item is None or not item.closed or item.length != length:
            raise StepRefused(
                Refusal.LENGTH_MISMATCH,
                f"slot {number} has no closed range of {length} tokens at {start} to drop",
            )
        slot.ranges.remove(item)
        slot.held -= length
        self.held_tokens -= length
        self.held_blocks -= item.num_blocks
        item.release()

    def _slot(self, number: int) -> Slot:
        slot = self.slots.get(number)
        if slot is None:
            raise StepRefused(Refusal.UNKNOWN_SLOT, f"slot {number} was never opened or is released")
        return slot

    def begin(self, number: int, rows: Words, second_rows: int = 0) -> Step:
        """Start a step over rows [n, 5] of wire.Plan and reserve what it appends. Raises StepRefused."""
        assert self.step is None or self.step.committed or not self.step.append_tokens
        self._require_size(rows, second_rows)
        checked = [self._checked(*row) for row in rows.tolist()]
        if len({id(row.slot) for row in checked}) != len(checked):
            raise StepRefused(Refusal.LENGTH_MISMATCH, "two rows of one step are the same slot's")
        needed = sum(row.grows.new_blocks(row.append) for row in checked if row.grows)
        if needed > self.unused:
            raise StepRefused(Refusal.OVER_CREDIT, f"{needed} blocks needed, credit is {self.unused}")
        begun = [_with_target(row) for row in checked]
        self.step = Step(
            number, begun, _parts(begun, len(begun) - second_rows), append_tokens=int(rows[:, 2].sum())
        )
        self.steps += not self.step.append_tokens
        return self.step

    def _require_size(self, rows: Words, second_rows: int) -> None:
        queries, appended = int(rows[:, 1].sum()), int(rows[:, 2].sum())
        shape = self.shape
        too_large = (
            len(rows) > shape.max_step_sequences
            or max(queries, appended) > shape.max_step_tokens
            or appended * shape.layout.layer_token_bytes > shape.kv_frame_bytes
            or bool((rows[:, 1:3] < 0).any())
            or not 0 <= second_rows <= len(rows)
        )
        if too_large:
            raise StepRefused(
                Refusal.TOO_LARGE,
                f"{len(rows)} rows, {queries} queries, {appended} appended; the lane was attached for "
                f"{shape.max_step_sequences} rows, {shape.max_step_tokens} tokens and KV frames of "
                f"{shape.kv_frame_bytes} bytes",
            )

    def _checked(self, number: int, queries: int, append: int, held: int, position: int) -> Row:
        slot = self._slot(number)
        if slot.held != held:
            raise StepRefused(Refusal.LENGTH_MISMATCH, f"slot {number} holds {slot.held} tokens, not {held}")
        if any(item.start < position < item.end for item in slot.ranges):
            raise StepRefused(
                Refusal.LENGTH_MISMATCH,
                f"slot {number} holds tokens on both sides of {position} in one range",
            )
        grows = slot.open_at(position) if append else None
        if append and grows is None:
            raise StepRefused(
                Refusal.NO_OPEN_RANGE, f"slot {number} has no open range to append to at {position}"
            )
        return Row(slot, queries, append, grows, slot.runs(position) if queries else [], [])

    def commit(self) -> None:
        """KV of all layers is in: the step's tokens are held from now on."""
        assert self.step is not None and not self.step.committed
        for row in self.step.rows:
            if row.grows:
                blocks_before = row.grows.num_blocks
                row.grows.commit(row.append)
                row.slot.held += row.append
                self.held_tokens += row.append
                self.taken += row.grows.num_blocks - blocks_before
                self.held_blocks += row.grows.num_blocks - blocks_before
        self.step.committed = True
        self.steps += 1

    def abandon(self) -> None:
        """Forget the step under way and what it reserved; a committed one is only forgotten."""
        step, self.step = self.step, None
        if step is not None and not step.committed:
            for row in step.rows:
                if row.grows:
                    row.grows.drop_reserved()

    def release_all(self) -> None:
        """The lane is gone: free every slot, and its credit with it."""
        for slot in self.leave():
            slot.release()

    def leave(self) -> list[Slot]:
        """The lane is gone, and its credit with it: what it held, for others to keep or to free."""
        self.abandon()
        slots = list(self.slots.values())
        self.slots.clear()
        self.held_tokens = self.held_blocks = 0
        self.granted = self.returned = self.taken = self.want = 0
        return slots


def _parts(rows: list[Row], first_rows: int) -> list[Part]:
    found = []
    for microbatch, some in enumerate((rows[:first_rows], rows[first_rows:])):
        if asking := [row for row in some if row.queries]:
            found.append(Part(microbatch, asking, sum(row.queries for row in asking)))
    return found


def _with_target(row: Row) -> Row:
    """The row with room reserved for what it appends."""
    return replace(row, target=row.grows.reserve(row.append)) if row.grows else row
