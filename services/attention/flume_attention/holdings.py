"""What one lane holds: its slots, its credit, and the step that is under way. No tensors, no I/O.

Every change a weight node can cause goes through here, and either happens whole or raises StepRefused
and leaves everything as it was. A step reserves the blocks it will fill when it begins; they count as
taken only when it is committed, and go back when it is abandoned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flume_common.wire import LaneShape, Op, Refusal, Words

from flume_attention.blocks import BlockPool
from flume_attention.credit import Demand
from flume_attention.errors import StepRefused
from flume_attention.ranges import Range, Run, Slot


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence in a step."""

    slot: Slot
    queries: int
    append: int
    past: list[Run]  # the tokens it asks about: those held when the step began
    target: list[Run]  # where its appended tokens go


@dataclass(slots=True)
class Step:
    """A step under way. Layers are answered and appended in order."""

    number: int
    rows: list[Row]
    asking: list[Row]  # those with queries
    query_tokens: int
    append_tokens: int
    layers_answered: int = 0
    layers_appended: int = 0
    committed: bool = False

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
        return sum(row.slot.ranges[-1].reserved_blocks for row in self.step.rows if row.append)

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
                self._close(slot, argument)
            case Op.RELEASE:
                self._release(slot)
            case _:
                raise StepRefused(Refusal.UNKNOWN_SLOT, f"op {op} on slot {slot} is none of this protocol")

    def _open(self, number: int, start: int, key: int) -> None:
        slot = self.slots.get(number)
        if slot is None:
            slot = self.slots[number] = Slot(key)
        elif slot.open_range is not None or slot.key != key:
            raise StepRefused(
                Refusal.LENGTH_MISMATCH, f"slot {number} has an open range or is another sequence's"
            )
        slot.ranges.append(Range(self.blocks, self.shape.layout.block_tokens, start))

    def _close(self, number: int, length: int) -> None:
        slot = self._slot(number)
        item = slot.open_range
        if item is None:
            raise StepRefused(Refusal.NO_OPEN_RANGE, f"slot {number} has no open range to close")
        if slot.held != length:
            raise StepRefused(
                Refusal.LENGTH_MISMATCH, f"slot {number} closed at {length}, it holds {slot.held} tokens"
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
        for item in slot.ranges:
            item.release()

    def _slot(self, number: int) -> Slot:
        slot = self.slots.get(number)
        if slot is None:
            raise StepRefused(Refusal.UNKNOWN_SLOT, f"slot {number} was never opened or is released")
        return slot

    def begin(self, number: int, rows: Words) -> Step:
        """Start a step over rows [n, 4] of wire.Plan and reserve what it appends. Raises StepRefused."""
        assert self.step is None or self.step.committed or not self.step.append_tokens
        self._require_size(rows)
        checked = [self._checked(*row) for row in rows.tolist()]
        if len({id(slot) for slot, _, _ in checked}) != len(checked):
            raise StepRefused(Refusal.LENGTH_MISMATCH, "two rows of one step are the same slot's")
        needed = sum(slot.ranges[-1].new_blocks(append) for slot, _, append in checked if append)
        if needed > self.unused:
            raise StepRefused(Refusal.OVER_CREDIT, f"{needed} blocks needed, credit is {self.unused}")
        begun = [self._row(slot, queries, append) for slot, queries, append in checked]
        self.step = Step(
            number,
            begun,
            asking=[row for row in begun if row.queries],
            query_tokens=int(rows[:, 1].sum()),
            append_tokens=int(rows[:, 2].sum()),
        )
        self.steps += not self.step.append_tokens
        return self.step

    def _require_size(self, rows: Words) -> None:
        queries, appended = int(rows[:, 1].sum()), int(rows[:, 2].sum())
        shape = self.shape
        too_large = (
            len(rows) > shape.max_step_sequences
            or max(queries, appended) > shape.max_step_tokens
            or appended * shape.layout.layer_token_bytes > shape.kv_frame_bytes
            or bool((rows[:, 1:3] < 0).any())
        )
        if too_large:
            raise StepRefused(
                Refusal.TOO_LARGE,
                f"{len(rows)} rows, {queries} queries, {appended} appended; the lane was attached for "
                f"{shape.max_step_sequences} rows, {shape.max_step_tokens} tokens and KV frames of "
                f"{shape.kv_frame_bytes} bytes",
            )

    def _checked(self, number: int, queries: int, append: int, held: int) -> tuple[Slot, int, int]:
        slot = self._slot(number)
        if slot.held != held:
            raise StepRefused(Refusal.LENGTH_MISMATCH, f"slot {number} holds {slot.held} tokens, not {held}")
        if append and slot.open_range is None:
            raise StepRefused(Refusal.NO_OPEN_RANGE, f"slot {number} has no open range to append to")
        return slot, queries, append

    def _row(self, slot: Slot, queries: int, append: int) -> Row:
        past = slot.runs() if queries else []
        target = slot.ranges[-1].reserve(append) if append else []
        return Row(slot, queries, append, past, target)

    def commit(self) -> None:
        """KV of all layers is in: the step's tokens are held from now on."""
        assert self.step is not None and not self.step.committed
        for row in self.step.rows:
            if row.append:
                item = row.slot.ranges[-1]
                blocks_before = item.num_blocks
                item.commit(row.append)
                row.slot.held += row.append
                self.held_tokens += row.append
                self.taken += item.num_blocks - blocks_before
                self.held_blocks += item.num_blocks - blocks_before
        self.step.committed = True
        self.steps += 1

    def abandon(self) -> None:
        """Forget the step under way and what it reserved; a committed one is only forgotten."""
        step, self.step = self.step, None
        if step is not None and not step.committed:
            for row in step.rows:
                if row.append:
                    row.slot.ranges[-1].drop_reserved()

    def release_all(self) -> None:
        """The lane is gone: free every slot, and its credit with it."""
        self.abandon()
        for number in list(self.slots):
            self._release(number)
        self.granted = self.returned = self.taken = self.want = 0
