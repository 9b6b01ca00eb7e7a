"""What the attention nodes hold of a sequence, as the weight engine believes it. Pure.

`Part` and `Slot` mirror the ranges and slots of `flume_common.wire`. A `Hole` is what was lost of the
closed ranges and is being computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Part:
    """A range as far as it is stored: `tokens` committed ones from position `start`."""

    start: int
    tokens: int = 0
    is_open: bool = True

    @property
    def end(self) -> int:
        return self.start + self.tokens

    def blocks(self, block_tokens: int) -> int:
        return -(-self.tokens // block_tokens)

    def slack_tokens(self, block_tokens: int) -> int:
        """Tokens that still fit the last block."""
        return -self.tokens % block_tokens


@dataclass(slots=True)
class Slot:
    """The parts of a sequence that one attention node holds."""

    number: int
    parts: list[Part] = field(default_factory=list)
    held_tokens: int = 0  # of all parts

    def holds_before(self, position: int) -> bool:
        """Whether a query at `position` has something to ask here."""
        return any(part.tokens and part.start < position for part in self.parts)

    def open_at(self, position: int) -> Part | None:
        """The open part whose next token is the one at `position`."""
        return next((part for part in self.parts if part.is_open and part.end == position), None)

    def append(self, part: Part, tokens: int) -> None:
        part.tokens += tokens
        self.held_tokens += tokens

    def closed_at(self, start: int, tokens: int) -> Part | None:
        """The closed part of exactly these tokens."""
        closed = (part for part in self.parts if not part.is_open)
        return next((part for part in closed if (part.start, part.tokens) == (start, tokens)), None)

    def add(self, part: Part) -> None:
        """A closed part that came from elsewhere."""
        self.parts.append(part)
        self.held_tokens += part.tokens

    def remove(self, part: Part) -> None:
        """A closed part that is held elsewhere now."""
        self.parts.remove(part)
        self.held_tokens -= part.tokens

    def close(self, part: Part) -> None:
        """It grows no more; without tokens it is gone, as on the node."""
        part.is_open = False
        if not part.tokens:
            self.parts.remove(part)


@dataclass(slots=True)
class Hole:
    """Tokens `[at, end)` of a closed range `[start, end)` of the route are stored nowhere.

    `[start, at)` is back, in an open part on `node`; the route names it once that part is closed.
    """

    start: int
    end: int
    at: int
    node: str | None = None  # None: no node has room for it yet
