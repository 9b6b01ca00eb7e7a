"""One sequence as the weight engine keeps it: its tokens, how far they are stored, and where."""

from __future__ import annotations

from dataclasses import dataclass, field

from flume_common.routes import Route

from flume_weight.sampling import Sampler


@dataclass(slots=True)
class Slot:
    """The part of a sequence that one attention node holds (see `flume_common.wire`)."""

    number: int
    held_tokens: int = 0  # committed tokens over all ranges of the slot
    open_tokens: int = 0  # committed tokens in the open range
    is_open: bool = False

    def slack_tokens(self, block_tokens: int) -> int:
        """Tokens that still fit the open range's last block."""
        return -self.open_tokens % block_tokens if self.is_open else 0


@dataclass(slots=True)
class Sequence:
    """Prompt and answer of one request.

    `committed_tokens` of `tokens` have their KV stored; the rest are pending. A decoding sequence
    has exactly one pending token, its newest; a preempted one has all of them pending again.
    """

    name: str
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampler: Sampler
    arrived_s: float
    committed_tokens: int = 0
    route: Route | None = None
    slots: dict[str, Slot] = field(default_factory=dict)  # by attention node
    stalled: bool = False
    preempted_at_tokens: int = -1  # its length when it last gave way

    @property
    def pending_tokens(self) -> int:
        return len(self.tokens) - self.committed_tokens

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def tail_node(self) -> str:
        """Raises ValueError when the sequence has no route yet."""
        if self.route is None:
            raise ValueError(f"sequence {self.name} has no route")
        return self.route.tail.node

    @property
    def tail_slot(self) -> Slot | None:
        """The slot on the tail's node, if that node has heard of the sequence."""
        return self.slots.get(self.tail_node)

    @property
    def state(self) -> str:
        if self.route is None:
            return "WAITING"
        if self.stalled:
            return "PAUSED"
        return "DECODING" if self.pending_tokens == 1 and self.completion_tokens > 0 else "PREFILLING"

    def forget_storage(self) -> None:
        """Everything must be computed again: preempted, or a node that held a part is lost."""
        self.committed_tokens = 0
        self.route = None
        self.slots.clear()
        self.stalled = False
