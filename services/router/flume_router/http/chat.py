"""POST /v1/chat/completions: its prompts and its shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flume_router.answer import Piece, Token
from flume_router.http.job import Job, Kind
from flume_router.http.logprobs import chat_logprobs
from flume_router.http.shape import Document, Shape, UsageReporting, finish_reason_of, text_of
from flume_router.service import Service
from flume_router.tokenizer import Tokenizer


class ChatShape(Shape):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, *envelope: Any, tokenizer: Tokenizer, logprobs: bool, usage: UsageReporting) -> None:
        super().__init__(*envelope, usage=usage)
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, index: int) -> Iterable[Document]:
        yield _choice(index, {"role": "assistant", "content": "", "refusal": None})

    def choices(self, index: int, piece: Piece) -> Iterable[Document]:
        if piece.text or (self._logprobs and piece.tokens):
            yield _choice(index, {"content": piece.text}, logprobs=self._logprobs_of(piece.tokens))
        if piece.finished:
            yield _choice(index, {}, finish_reason=piece.finished.reason)

    def whole_choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text_of(pieces), "refusal": None},
            "logprobs": self._logprobs_of([token for piece in pieces for token in piece.tokens]),
            "finish_reason": finish_reason_of(pieces),
        }

    def _logprobs_of(self, tokens: Sequence[Token]) -> Document | None:
        return chat_logprobs(self._tokenizer, tokens) if self._logprobs else None


def _choice(
    index: int, delta: Document, *, logprobs: Document | None = None, finish_reason: str | None = None
) -> Document:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class ChatApi:
    """Of `endpoint.Api`."""

    id_prefix = "chatcmpl"
    kind = Kind.CHAT

    def shape(self, service: Service, job: Job, request_id: str, created_s: int) -> Shape:
        return ChatShape(
            request_id,
            service.model,
            created_s,
            tokenizer=service.text.tokenizer,
            logprobs=job.common.sampling.has_logprobs,
            usage=job.common.usage,
        )
