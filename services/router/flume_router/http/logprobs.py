"""Log probabilities in the shapes of the two APIs.

A token that is no whole text by itself (part of a character) is written as its escaped bytes, as OpenAI does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from flume_protos.v1 import weight_pb2 as pb

from flume_router.answer import Token
from flume_router.tokenizer import Tokenizer

_IMPOSSIBLE = -9999.0  # JSON has no infinity; OpenAI's stand-in


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token]) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""
    return {"content": [_chat_token(tokenizer, t.logprobs) for t in tokens if t.logprobs], "refusal": None}


def _chat_token(tokenizer: Tokenizer, logprobs: pb.Logprobs) -> dict[str, Any]:
    top = [_chat_entry(tokenizer, entry) for entry in logprobs.top]
    return {**_chat_entry(tokenizer, logprobs.chosen), "top_logprobs": top}


def _chat_entry(tokenizer: Tokenizer, entry: pb.TokenLogprob) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(entry.token_id)
    return {"token": _text(spelled, ""), "logprob": _finite(entry.logprob), "bytes": list(spelled)}


def completion_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token]) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions; offsets count characters of the choice's text."""
    known = [(token, token.logprobs) for token in tokens if token.logprobs]
    return {
        "tokens": [_name(tokenizer, logprobs.chosen) for _, logprobs in known],
        "token_logprobs": [_finite(logprobs.chosen.logprob) for _, logprobs in known],
        "top_logprobs": [
            # The chosen token is always there, one more where it is not among the most likely.
            {_name(tokenizer, entry): _finite(entry.logprob) for entry in [*logprobs.top, logprobs.chosen]}
            for _, logprobs in known
        ],
        "text_offset": [token.start for token, _ in known],
    }


def _name(tokenizer: Tokenizer, entry: pb.TokenLogprob) -> str:
    return _text(tokenizer.token_bytes(entry.token_id), "bytes:")


def _text(spelled: bytes, prefix: str) -> str:
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
