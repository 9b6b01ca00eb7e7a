"""One sequence as the weight engine keeps it: its tokens, how far they are stored, and where."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from flume_common.routes import Route

from flume_weight.messages import Stage
from flume_weight.sampling import Sampler
from flume_weight.storage import Hole, Part, Slot


class Cause(StrEnum):
    """Why tokens are computed again."""

    NODE_LOST = "node_lost"  # an attention node that held them
    PREEMPTED = "preempted"  # gave way for want of memory
    WEIGHT_NODE_LOST = "weight_node_lost"  # the one that served the request before


@dataclass(slots=True)
class Recovery:
    """Tokens that were computed before are being computed again."""

    cause: Cause
    since_s: float
    tokens: int = 0  # computed again so far


@dataclass(slots=True)
class Sequence:
    """Prompt and answer of one request.

    `committed_tokens` of `tokens` have their KV stored, but for the holes; the rest are pending. Holes
    are filled first, in order, since what follows depends on them. A decoding sequence has exactly one
    pending token, its newest; a preempted one has all of them pending again.
    """

    name: str
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampler: Sampler
    arrived_s: float
    committed_tokens: int = 0
    computed_tokens: int = 0  # the most that ever were committed, here or elsewhere
    route: Route | None = None
    slots: dict[str, Slot] = field(default_factory=dict)  # by attention node
    holes: list[Hole] = field(default_factory=list)  # in order
    recovery: Recovery | None = None
    ran_here: bool = False
    canary: bool = False
    begun: bool = False  # some of its prompt is, or was, in a step
    stalled: bool = False  # it had no place in the last step
    suspect: bool = False  # runs alone until it has a token
    nodes_lost: int = 0  # attention nodes, in steps of it, since its last token
    preempted_at_tokens: int = -1  # its length when it last gave way

    @property
    def position(self) -> int:
        """Position of the next token to compute."""
        return self.holes[0].at if self.holes else self.committed_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens to compute before the next change: of the first hole, or to the newest token."""
        return (self.holes[0].end if self.holes else len(self.tokens)) - self.position

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
    def node(self) -> str | None:
        """Where the next tokens are stored; None while no node has room for them."""
        return self.holes[0].node if self.holes else self.tail_node

    @property
    def growing(self) -> Part | None:
        """The part the next tokens are appended to, if its node has heard of it."""
        slot = self.slots.get(self.node or "")
        return slot.open_at(self.position) if slot is not None else None

    @property
    def samples(self) -> bool:
        """Whether everything is stored, so that a new token follows."""
        return not self.holes and not self.pending_tokens

    @property
    def recovering(self) -> bool:
        return bool(self.holes) or self.committed_tokens < self.computed_tokens

    @property
    def state(self) -> Stage:
        """Stalled ones that have said something pause; a prompt that is left out of a step is still that."""
        if self.route is None:
            return Stage.WAITING
        if self.recovering or (self.stalled and self.completion_tokens > 0):
            return Stage.PAUSED
        if self.pending_tokens == 1 and self.completion_tokens > 0:
            return Stage.DECODING
        return Stage.PREFILLING if self.begun else Stage.QUEUED

    @property
    def stored_tokens(self) -> int:
        """Tokens whose KV is stored now."""
        return self.committed_tokens - sum(hole.end - hole.at for hole in self.holes)

    def advance(self, tokens: int) -> int:
        """`tokens` more from `position` are stored. How many of them had been computed before."""
        if self.holes:
            self.holes[0].at += tokens
            return tokens  # a hole is made of tokens that were lost
        again = min(tokens, max(0, self.computed_tokens - self.committed_tokens))
        self.committed_tokens += tokens
        self.computed_tokens = max(self.computed_tokens, self.committed_tokens)
        return again

    def lose(self, node: str) -> int:
        """What this node held is gone: it becomes holes, or pending again where it was the tail.

        Returns the number of tokens lost.
        """
        assert self.route is not None
        self.slots.pop(node, None)
        lost = 0
        for hole in self.holes:
            if hole.node == node:
                lost += hole.at - hole.start
                hole.at, hole.node = hole.start, None
        known = {hole.start for hole in self.holes}
        *closed, tail = self.route.ranges
        for item in closed:
            if item.node == node and item.start not in known:
                assert item.end is not None
                lost += item.end - item.start
                self.holes.append(Hole(item.start, item.end, item.start))
        self.holes.sort(key=lambda hole: hole.start)
        if tail.node == node:
            lost += self.committed_tokens - tail.start
            self.committed_tokens = tail.start
        return lost

    def forget_storage(self) -> None:
        """Everything must be computed again."""
        self.committed_tokens = 0
        self.route = None
        self.slots.clear()
        self.holes.clear()
        self.begun = self.stalled = False
