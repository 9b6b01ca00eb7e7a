"""POST /v1/completions: its prompts and its shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flume_router.answer import Piece, Token
from flume_router.http.job import Job, Kind
from flume_router.http.logprobs import completion_logprobs
from flume_router.http.shape import Document, Shape, UsageReporting, finish_reason_of, text_of
from flume_router.service import Service
from flume_router.tokenizer import Tokenizer


class CompletionShape(Shape):
    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        *envelope: Any,
        tokenizer: Tokenizer,
        logprobs: bool,
        echoes: Sequence[str],
        usage: UsageReporting,
    ) -> None:
        """`echoes`: what comes before each answer, by its index."""
        super().__init__(*envelope, usage=usage)
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echoes = echoes

    def opening(self, index: int) -> Iterable[Document]:
        if self._echoes[index]:
            yield _choice(index, self._echoes[index])

    def choices(self, index: int, piece: Piece) -> Iterable[Document]:
        if piece.text or piece.finished or (self._logprobs and piece.tokens):
            yield _choice(index, piece.text, self._logprobs_of(piece.tokens), finish_reason_of([piece]))

    def whole_choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        tokens = [token for piece in pieces for token in piece.tokens]
        text = self._echoes[index] + text_of(pieces)
        return _choice(index, text, self._logprobs_of(tokens), finish_reason_of(pieces))

    def _logprobs_of(self, tokens: Sequence[Token]) -> Document | None:
        return completion_logprobs(self._tokenizer, tokens) if self._logprobs else None


def _choice(
    index: int, text: str, logprobs: Document | None = None, finish_reason: str | None = None
) -> Document:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionApi:
    """Of `endpoint.Api`."""

    id_prefix = "cmpl"
    kind = Kind.COMPLETION

    def shape(self, service: Service, job: Job, request_id: str, created_s: int) -> Shape:
        echoes = job.echoes or ("",) * len(job.prompts)
        return CompletionShape(
            request_id,
            service.model,
            created_s,
            tokenizer=service.text.tokenizer,
            logprobs=job.common.sampling.has_logprobs,
            echoes=[echo for echo in echoes for _ in range(job.common.n)],
            usage=job.common.usage,
        )
