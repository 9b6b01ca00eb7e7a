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
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        prompt_tokens: int,
        min_tokens: int,
        skip_special_tokens: bool = True,
    ) -> None:
        """`stops` are not looked for in the first `min_tokens` tokens."""
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stops = StopStrings(stops, tokenizer.special_texts if skip_special_tokens else ())
        self._prompt_tokens = prompt_tokens
        self._min_tokens = min_tokens
        self._waiting: deque[tuple[Token, int]] = deque()
        """Tokens that are not shown yet, each with where it ends in the text that is searched for stops."""
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
        token = Token(token_id, self._decoded, self._decoded + len(text), logprobs)
        self._decoded += len(text)
        self._num_tokens += 1
        shown = self._searched(token_id, text)
        self._waiting.append((token, self._stops.length))
        return shown

    def _searched(self, token_id: int, text: str) -> str:
        """Text that may be shown now that a token's has been searched for stop strings."""
        if self._num_tokens <= self._min_tokens:
            return text
        if self._detokenizer.hides(token_id):
            spelled = self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
            return self._stops.push(spelled, hidden=True)
        return self._stops.push(text)

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
        while self._waiting:
            token, searched_end = self._waiting[0]
            if token.end > self._shown or searched_end > self._stops.released:
                break
            tokens.append(token)
            self._waiting.popleft()
        return tokens
