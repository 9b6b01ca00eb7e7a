"""How answers are laid out as JSON: what both completion APIs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import msgspec

from flume_router.answer import Piece

Document = dict[str, Any]


class UsageReporting(Enum):
    """Where a stream carries usage."""

    NEVER = "never"
    AT_THE_END = "at the end"
    IN_EVERY_CHUNK = "in every chunk"


class Usage(msgspec.Struct):
    """Tokens of a whole request so far; a prompt is counted once however many answers it gets."""

    prompt_tokens: int
    generated_tokens: dict[int, int] = {}
    """Of each answer, by its index."""

    @property
    def completion_tokens(self) -> int:
        return sum(self.generated_tokens.values())

    def count(self, index: int, piece: Piece) -> None:
        """Add a piece of answer `index`. Its last piece says how many tokens the answer really has."""
        if piece.finished:
            self.generated_tokens[index] = piece.finished.completion_tokens
        else:
            self.generated_tokens[index] = self.generated_tokens.get(index, 0) + len(piece.tokens)

    def document(self) -> Document:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},  # nothing is reused between requests yet
        }


class Shape(ABC):
    """Of one request's answers."""

    object_name: str
    chunk_name: str

    def __init__(self, request_id: str, model: str, created_s: int, *, usage: UsageReporting) -> None:
        self._envelope: Document = {"id": request_id, "created": created_s, "model": model}
        self._usage = usage

    @abstractmethod
    def opening(self, index: int) -> Iterable[Document]:
        """Choices sent before anything of answer `index`."""

    @abstractmethod
    def choices(self, index: int, piece: Piece) -> Iterable[Document]:
        """Choices that a piece adds; none where there is nothing to tell."""

    @abstractmethod
    def whole_choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        """The choice of an answer that is complete."""

    def chunk(self, choice: Document, usage: Usage) -> Document:
        """An event of a stream; `usage` is what was generated up to and with it."""
        chunk = {**self._envelope, "object": self.chunk_name, "choices": [choice]}
        match self._usage:
            case UsageReporting.NEVER:
                return chunk
            case UsageReporting.AT_THE_END:
                return {**chunk, "usage": None}
            case UsageReporting.IN_EVERY_CHUNK:
                return {**chunk, "usage": usage.document()}

    def usage_chunk(self, usage: Usage) -> Document:
        """The last event, where usage was asked for."""
        return {
            **self._envelope,
            "object": self.chunk_name,
            "choices": [],
            "usage": usage.document(),
        }

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> Document:
        """The response when it is not streamed."""
        choices = [self.whole_choice(index, pieces) for index, pieces in enumerate(answers)]
        return {**self._envelope, "object": self.object_name, "choices": choices, "usage": usage.document()}


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def finish_reason_of(pieces: Sequence[Piece]) -> str | None:
    """None while the answer goes on."""
    finished = pieces[-1].finished if pieces else None
    return finished.reason if finished else None
