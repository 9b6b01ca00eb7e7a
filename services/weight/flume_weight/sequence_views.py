"""The sequences of a weight node as its supervisor knows them: listing them never waits for the engine.

They come from what passes through the supervisor anyway (submissions, tokens, routes, ends) and from what
the engine reports when sequences change what they do. Values only; the time is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flume_weight import messages as m
from flume_weight.messages import Stage


@dataclass(slots=True)
class SequenceView:
    """One live sequence."""

    sequence: str
    prompt_tokens: int
    submitted_s: float  # monotonic
    completion_tokens: int = 0
    computed_tokens: int = 0
    stage: Stage = Stage.QUEUED
    ranges: list[m.RangeInfo] = field(default_factory=list)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens whose KV is still to be computed before the next token comes."""
        return max(0, self.total_tokens - self.computed_tokens)


class SequenceViews:
    """Live sequences in order of submission. What comes about others is ignored: they have just ended."""

    def __init__(self) -> None:
        self._views: dict[str, SequenceView] = {}

    def __iter__(self) -> Iterator[SequenceView]:
        return iter(list(self._views.values()))  # a copy, as metrics ask from another thread

    def __len__(self) -> int:
        return len(self._views)

    def submitted(self, message: m.Submit, now_s: float) -> None:
        """The engine has been sent this; it may look at it only when its step is over."""
        if message.sequence not in self._views:
            self._views[message.sequence] = SequenceView(
                message.sequence, len(message.prompt_token_ids), now_s, len(message.output_token_ids)
            )

    def produced(self, tokens: Iterable[m.Token]) -> None:
        for token in tokens:
            if (view := self._views.get(token.sequence)) is not None:
                view.completion_tokens += 1
                view.computed_tokens = view.total_tokens - 1  # all but the newest
                view.stage = Stage.DECODING

    def routed(self, sequence: str, ranges: list[m.RangeInfo]) -> None:
        if (view := self._views.get(sequence)) is not None:
            view.ranges = ranges

    def reported(self, states: Iterable[m.SequenceState]) -> None:
        for state in states:
            if (view := self._views.get(state.sequence)) is not None:
                view.stage, view.computed_tokens = Stage(state.stage), state.computed_tokens

    def ended(self, sequence: str) -> None:
        self._views.pop(sequence, None)

    def clear(self) -> None:
        """The engine is gone, and all of them with it."""
        self._views.clear()

    def count(self) -> Counter[Stage]:
        """How many there are at each stage."""
        return Counter(view.stage for view in self)

    def prefill(self) -> tuple[int, int]:
        """Tokens computed and tokens to compute of all that have to be before their next token comes."""
        pending = [view for view in self if view.stage is not Stage.DECODING]
        return sum(view.computed_tokens for view in pending), sum(view.total_tokens for view in pending)
