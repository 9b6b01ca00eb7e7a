"""Which sequences may share a step with which: those that are suspected run alone. Pure.

A sequence is suspected when an engine, or a step, came to an end while several were in it and one of them
must have been the cause. Alone, the guilty one ends alone; each other is cleared by its next token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from flume_weight.scheduler import Candidate


class Isolation:
    """Takes turns, so that those beside a suspect with a long prompt go on, too."""

    def __init__(self) -> None:
        self._suspect_had_turn = False

    def groups(self, candidates: Sequence[Candidate], suspects: Collection[str]) -> list[Sequence[Candidate]]:
        """Split the candidates into possible steps, the one whose turn it is first."""
        if not suspects:
            return [candidates]
        alone: list[Sequence[Candidate]] = [[each] for each in candidates if each.sequence in suspects]
        others = [each for each in candidates if each.sequence not in suspects]
        if not others:
            return alone
        self._suspect_had_turn = not self._suspect_had_turn
        return [*alone, others] if self._suspect_had_turn else [others, *alone]
