"""The fields that both completion APIs share, read from a JSON body.

OpenAI's own, and vLLM's extensions under vLLM's names: top_k, min_p, repetition_penalty, ignore_eos,
min_tokens, stop_token_ids, skip_special_tokens, and continuous_usage_stats of stream_options. Bounds are
OpenAI's, defaults too (temperature 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from flume_protos.v1 import weight_pb2 as pb

from flume_router.errors import BadRequest
from flume_router.http import fields
from flume_router.http.fields import Object, take
from flume_router.http.shape import UsageReporting

MAX_SEQUENCES = 128
"""Most answers of one request: prompts times n."""

_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_MOST_STOPS = 64
_MOST_STOP_TOKENS = 128
_MOST_BIASES = 1024
_INT32_MAX = 2**31 - 1
_SMALLEST_TOP_P = 1e-9

COMMON_FIELDS = frozenset(
    {
        "model", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "max_tokens",
        "presence_penalty", "frequency_penalty", "logit_bias", "user", "logprobs",
        "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "stop_token_ids",
        "skip_special_tokens",
    }
)  # fmt: skip


class Common(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    stream: bool
    usage: UsageReporting
    n: int
    stop: tuple[str, ...]
    max_tokens: int | None
    """None: as many as the context allows."""
    min_tokens: int
    skip_special_tokens: bool
    sampling: pb.Sampling
    """Without max_tokens, which waits for the prompt's length."""


def read_common(body: Object, *, max_tokens: int | None, logprobs: int | None) -> Common:
    """`max_tokens` and `logprobs` (alternatives per token; None: off) differ between the APIs."""
    stream = take(body, "stream", fields.boolean, False)
    min_tokens = take(body, "min_tokens", fields.integer(0, _INT32_MAX), 0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise fields.combination(
            f"'min_tokens' ({min_tokens}) must not exceed 'max_tokens' ({max_tokens}).", "min_tokens"
        )
    return Common(
        model=fields.require(body, "model", fields.string),
        stream=stream,
        usage=_usage_reporting(body, stream),
        n=take(body, "n", fields.integer(1, MAX_SEQUENCES), 1),
        stop=take(body, "stop", _stop, ()),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        skip_special_tokens=take(body, "skip_special_tokens", fields.boolean, True),
        sampling=_sampling(body, min_tokens, logprobs),
    )


def _sampling(body: Object, min_tokens: int, logprobs: int | None) -> pb.Sampling:
    take(body, "user", fields.string, "")
    return pb.Sampling(
        temperature=take(body, "temperature", fields.decimal(0, 2), 1.0),
        # Nothing of the mass is the most likely token alone; on the wire 0 means unset.
        top_p=max(take(body, "top_p", fields.decimal(0, 1), 1.0), _SMALLEST_TOP_P),
        top_k=take(body, "top_k", fields.integer(-1, _INT32_MAX), 0),
        min_p=take(body, "min_p", fields.decimal(0, 1), 0.0),
        repetition_penalty=take(body, "repetition_penalty", _repetition_penalty, 1.0),
        presence_penalty=take(body, "presence_penalty", fields.decimal(-2, 2), 0.0),
        frequency_penalty=take(body, "frequency_penalty", fields.decimal(-2, 2), 0.0),
        seed=take(body, "seed", fields.integer(-(2**63), 2**63 - 1), None),
        stop_token_ids=take(body, "stop_token_ids", _stop_token_ids, ()),
        ignore_eos=take(body, "ignore_eos", fields.boolean, False),
        min_tokens=min_tokens,
        logprobs=-1 if logprobs is None else logprobs,
        has_logprobs=logprobs is not None,
        logit_bias=take(body, "logit_bias", _logit_bias, {}),
    )


def _usage_reporting(body: Object, stream: bool) -> UsageReporting:
    options = take(body, "stream_options", fields.obj, None)
    if options is None:
        return UsageReporting.NEVER
    if not stream:
        raise fields.combination(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
        )
    fields.refuse_unknown(options, _STREAM_OPTIONS, "stream_options.")
    take(options, "include_obfuscation", fields.boolean, False)
    continuous = take(options, "continuous_usage_stats", fields.boolean, False)
    if not take(options, "include_usage", fields.boolean, False):
        return UsageReporting.NEVER  # as vLLM reads it: the one says whether, the other where
    return UsageReporting.IN_EVERY_CHUNK if continuous else UsageReporting.AT_THE_END


def _repetition_penalty(value: Any, param: str) -> float:
    number = fields.decimal(0, 2)(value, param)
    if number == 0:
        raise fields.invalid_value(f"Invalid '{param}': expected a value > 0, but got 0 instead.", param)
    return number


def _stop(value: Any, param: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else fields.array(value, param, at_most=_MOST_STOPS)
    for index, stop in enumerate(listed):
        if not fields.string(stop, f"{param}[{index}]"):
            raise fields.invalid_value(f"Invalid '{param}': a stop string must not be empty.", param)
    return tuple(listed)


def _stop_token_ids(value: Any, param: str) -> tuple[int, ...]:
    read = fields.integer(0, _INT32_MAX)
    listed = fields.array(value, param, at_most=_MOST_STOP_TOKENS)
    return tuple(read(token, f"{param}[{index}]") for index, token in enumerate(listed))


def _logit_bias(value: Any, param: str) -> Mapping[int, float]:
    biases = fields.obj(value, param)
    if len(biases) > _MOST_BIASES:
        raise fields.invalid_value(f"Invalid '{param}': at most {_MOST_BIASES} tokens can be biased.", param)
    read = fields.decimal(-100, 100)
    return {_token_id(key, param): read(bias, f"{param}.{fields.shown(key)}") for key, bias in biases.items()}


def _token_id(key: str, param: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise BadRequest(
            f"Invalid key in '{param}': {fields.shown(key)}. Keys are token ids.",
            param=param,
            code="invalid_value",
        )
    return int(key)
