"""One answer as it grows: token ids become text that is final, cut at the first stop string.

Values only. A token is shown when all of its text is: what a stop string may still take back is
held, text and token alike, so that not even a token id or a logprob gives away half a stop string; a
token that reaches into one is never shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec
from flume_protos.v1 import weight_pb2 as pb

from flume_router.detokenizer import Detokenizer
from flume_router.stop_strings import StopStrings
from flume_router.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


class Token(msgspec.Struct, frozen=True):
    """One shown token. Offsets count characters of the answer's text."""

    id: int
    start: int
    end: int
    logprobs: pb.Logprobs | None


class Finished(msgspec.Struct, frozen=True):
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


class Piece(msgspec.Struct, frozen=True):
    """What one reply of the weight node adds."""

    text: str
    tokens: tuple[Token, ...] = ()
    finished: Finished | None = None


class Answer:
    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, prompt_tokens: int, min_tokens: int
    ) -> None:
        """`stops` are not looked for in the first `min_tokens` tokens."""
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._prompt_tokens = prompt_tokens
        self._min_tokens = min_tokens
        self._waiting: deque[Token] = deque()
        self._num_tokens = 0
        self._decoded = 0  # characters
        self._shown = 0  # characters

    def push(self, reply: pb.GenerateReply) -> Piece:
        """Once a piece is finished the answer is over, whatever the weight node would still send."""
        text = "".join(self._token(reply, index) for index in range(len(reply.token_ids)))
        if self._stops.stopped:
            return self._piece(text, self._finished("stop", self._num_tokens))
        if not reply.HasField("finish"):
            return self._piece(text, None)
        return self._last(text, reply.finish)

    def _token(self, reply: pb.GenerateReply, index: int) -> str:
        """Text that may be shown thanks to this token."""
        if self._stops.stopped:
            return ""
        token_id = reply.token_ids[index]
        logprobs = reply.logprobs[index] if index < len(reply.logprobs) else None
        text = self._detokenizer.push(token_id)
        self._waiting.append(Token(token_id, self._decoded, self._decoded + len(text), logprobs))
        self._decoded += len(text)
        self._num_tokens += 1
        return text if self._num_tokens <= self._min_tokens else self._stops.push(text)

    def _last(self, text: str, finish: pb.Finish) -> Piece:
        text += self._stops.push(self._detokenizer.finish())
        if self._stops.stopped:
            return self._piece(text, self._finished("stop", finish.completion_tokens))
        text += self._stops.finish()
        reason: FinishReason = "length" if finish.reason == pb.LENGTH else "stop"
        return self._piece(text, self._finished(reason, finish.completion_tokens))

    def _finished(self, reason: FinishReason, completion_tokens: int) -> Finished:
        return Finished(reason, self._prompt_tokens, completion_tokens)

    def _piece(self, text: str, finished: Finished | None) -> Piece:
        self._shown += len(text)
        return Piece(text, tuple(self._shown_tokens()), finished)

    def _shown_tokens(self) -> list[Token]:
        tokens = []
        while self._waiting and self._waiting[0].end <= self._shown:
            tokens.append(self._waiting.popleft())
        return tokens
