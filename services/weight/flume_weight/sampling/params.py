"""What one request asks of sampling. A value, checked once at the edge; no torch here."""

from __future__ import annotations

import math
from typing import Self

import msgspec
from flume_protos.v1 import weight_pb2 as pb

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0


class InvalidSampling(ValueError):
    """A field is outside its legal range."""

    def __init__(self, field: str, value: object, legal: str) -> None:
        super().__init__(f"{field} is {value!r}; it must be {legal}")
        self.field = field
        self.value = value
        self.legal = legal


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of the proto `Sampling`, unset ones resolved to what they mean."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: drawn when the sequence starts
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()  # beside the model's own
    max_tokens: int = 0  # 0: no limit of its own
    min_tokens: int = 0
    logprobs: int | None = None  # None: none; n: the chosen token's and the n most likely
    logit_bias: dict[int, float] = {}

    def validate(self, vocab_size: int | None = None) -> Self:
        """Itself, when every field is legal. Raises InvalidSampling naming field, value and range."""
        _between("temperature", self.temperature, 0, 2)
        _at_least("top_k", self.top_k, -1)
        _between("top_p", self.top_p, 0, 1, open_low=True)
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        _at_least("max_tokens", self.max_tokens, 0)
        _at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens and self.min_tokens > self.max_tokens:
            raise InvalidSampling("min_tokens", self.min_tokens, f"at most max_tokens {self.max_tokens}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidSampling("seed", self.seed, "a 64-bit integer")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidSampling("logprobs", self.logprobs, f"between 0 and {MAX_LOGPROBS}")
        for bias in self.logit_bias.values():
            _between("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        _token_ids("stop_token_ids", self.stop_token_ids, vocab_size)
        _token_ids("logit_bias", self.logit_bias, vocab_size)
        return self

    @classmethod
    def from_proto(cls, message: pb.Sampling, vocab_size: int | None = None) -> Self:
        """Resolves what unset means, then validates. Raises InvalidSampling."""
        has_logprobs = message.has_logprobs and message.logprobs != -1
        return cls(
            temperature=message.temperature,
            top_k=0 if message.top_k == -1 else message.top_k,
            top_p=message.top_p or 1.0,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty or 1.0,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            seed=message.seed if message.HasField("seed") else None,
            stop_token_ids=tuple(message.stop_token_ids),
            ignore_eos=message.ignore_eos,
            eos_token_ids=tuple(message.eos_token_ids),
            max_tokens=message.max_tokens,
            min_tokens=message.min_tokens,
            logprobs=message.logprobs if has_logprobs else None,
            logit_bias=dict(message.logit_bias),
        ).validate(vocab_size)


def _between(field: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    above = value > low if open_low else value >= low
    if above and value <= high and math.isfinite(value):
        return
    lower = f"greater than {low:g}" if open_low else f"at least {low:g}"
    upper = f" and at most {high:g}" if math.isfinite(high) else " and finite"
    raise InvalidSampling(field, value, lower + upper)


def _at_least(field: str, value: int, low: int) -> None:
    if value < low:
        raise InvalidSampling(field, value, f"at least {low}")


def _token_ids(field: str, ids: tuple[int, ...] | dict[int, float], vocab_size: int | None) -> None:
    for token in ids:
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            legal = "token ids from 0" if vocab_size is None else f"token ids in [0, {vocab_size})"
            raise InvalidSampling(field, token, legal)
