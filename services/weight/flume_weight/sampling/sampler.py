"""Choosing the next token of one sequence, and when its answer ends.

The order of operations is the one vLLM documents, on float32 logits:

1. log-probabilities, where asked for, of the raw logits: natural log, before all that follows;
2. min_tokens (end and stop tokens forbidden until then), then logit_bias;
3. repetition penalty (over prompt and answer: divides positive logits, multiplies negative ones), then
   frequency (· times in the answer) and presence (once, if in the answer), both subtracted;
4. temperature 0: the largest logit, the lowest token id among equals;
5. otherwise divide by the temperature, keep by min-p, then top-k, then top-p, and draw from what is left.

Logits with NaN or +inf among them, or with nothing above -inf after 3., raise InvalidLogits: no token is
drawn from them, and none is recorded.

A draw depends on (seed, number of the token in the answer, token id) only: see `noise.py`. numpy only, on
the host: a row is tens of thousands of numbers, and torch's threads would be fought over.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flume_weight.sampling.candidates import candidates, largest
from flume_weight.sampling.invalid import InvalidLogits, require_finite
from flume_weight.sampling.noise import all_tokens, gumbels, stream_key
from flume_weight.sampling.params import SamplingParams
from flume_weight.sampling.penalties import Penalties
from flume_weight.sampling.shortlist import MIN_TEMPERATURE, Ask, Shortlist, drawn, truncates

if TYPE_CHECKING:
    from torch import Tensor  # the supervisor imports this package and must not load torch


class FinishReason(StrEnum):
    STOP = "STOP"
    LENGTH = "LENGTH"


@dataclass(frozen=True, slots=True)
class Sampled:
    """One chosen token; log-probabilities where they were asked for."""

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)  # (token id, logprob), most likely first


class Sampler:
    """State of one sequence: what it has said, and the seed of its draws.

    `output_token_ids` is an answer begun elsewhere: the rest then comes out as it would have there.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.num_output_tokens = len(output_token_ids)
        self._ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self._forbidden_at_first = np.array(sorted(self._ends | set(eos_token_ids)), dtype=np.int64)
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self._bias = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._penalties = Penalties(params, prompt_token_ids, output_token_ids, vocab_size)

    @property
    def takes_the_largest(self) -> bool:
        """Whether the next token is the plain argmax of the raw logits, and nothing else is wanted."""
        return self.params.temperature == 0 and self.params.logprobs is None and self._takes_them_raw

    @property
    def _takes_them_raw(self) -> bool:
        """Whether the next token is chosen from the logits as they are."""
        return (
            not self.params.logit_bias
            and not self._penalties.active
            and self.num_output_tokens >= self.params.min_tokens
        )

    def ask(self) -> Ask | None:
        """What must be known of the next logits; None when it is all of them."""
        if not self._takes_them_raw:
            return None
        params = self.params
        if params.temperature == 0:
            return Ask(0.0, 0, bool(params.logprobs))
        key = stream_key(self.seed, self.num_output_tokens)
        return Ask(max(params.temperature, MIN_TEMPERATURE), key, bool(params.logprobs) or truncates(params))

    def sample_from(self, known: Shortlist) -> Sampled | None:
        """As `sample`, from what the last `ask` asked for; None when that does not tell the token.

        That includes logits that are invalid: read as a whole they tell what is wrong with them.
        """
        if not known.valid:
            return None
        if self.params.temperature == 0:
            token_id = int(known.token_ids[0])
        else:
            found = drawn(self.params, stream_key(self.seed, self.num_output_tokens), known)
            if found is None:
                return None
            token_id = found
        self.accept(token_id)
        if self.params.logprobs is None:
            return Sampled(token_id)
        return Sampled(token_id, *_log_probabilities_of(known, token_id, self.params.logprobs))

    def sample(self, logits_row: Tensor | NDArray[np.float32]) -> Sampled:
        """Chooses and records the next token. logits_row [V] float32 on the host; it is left unchanged.

        Raises InvalidLogits.
        """
        logits: NDArray[np.float32] = np.asarray(logits_row)
        require_finite(float(logits.max()))
        token_id = self._choose(self._adjusted(logits))
        self.accept(token_id)
        if self.params.logprobs is None:
            return Sampled(token_id)
        return Sampled(token_id, *log_probabilities(logits, token_id, self.params.logprobs))

    def accept(self, token_id: int) -> None:
        """Records a token chosen elsewhere (`sample` does it itself)."""
        self.num_output_tokens += 1
        self._penalties.add(token_id)

    def finish_reason(self, token_id: int) -> FinishReason | None:
        """Whether the token just recorded ends the answer. A token that stops it is not part of the text."""
        if token_id in self._ends and self.num_output_tokens > self.params.min_tokens:
            return FinishReason.STOP
        if 0 < self.params.max_tokens <= self.num_output_tokens:
            return FinishReason.LENGTH
        return None

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        adjusted = logits.copy()
        if self.num_output_tokens < self.params.min_tokens:
            adjusted[self._forbidden_at_first] = -np.inf
        adjusted[self._bias_ids] += self._bias
        self._penalties.apply(adjusted)
        return adjusted

    def _choose(self, logits: NDArray[np.float32]) -> int:
        params = self.params
        largest = logits.max()
        if largest == -np.inf:
            raise InvalidLogits("no token above -inf but those that min_tokens forbids")
        if params.temperature == 0:
            return int(logits.argmax())
        scaled = logits - largest
        with np.errstate(over="ignore"):  # to -inf, as a very low temperature should
            scaled /= np.float32(max(params.temperature, MIN_TEMPERATURE))
        ids = self._candidates(scaled)
        key = stream_key(self.seed, self.num_output_tokens)
        return int(ids[(scaled[ids] + gumbels(key, ids)).argmax()])

    def _candidates(self, scaled: NDArray[np.float32]) -> NDArray[np.uint32]:
        params = self.params
        if params.top_k <= 0 and params.top_p == 1 and params.min_p == 0:
            return all_tokens(scaled.size)
        return candidates(scaled, params.top_k, params.top_p, params.min_p).astype(np.uint32)


def log_probabilities(
    logits: NDArray[np.float32], token_id: int, count: int
) -> tuple[float, list[tuple[int, float]]]:
    """Of one token, and of the `count` most likely ones, under softmax(logits)."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    best = largest(logits, count)
    return float(wide[token_id]), [(int(token), float(wide[token])) for token in best]


def _log_probabilities_of(
    known: Shortlist, token_id: int, count: int
) -> tuple[float, list[tuple[int, float]]]:
    """The same from a shortlist, of a candidate or the token of the best score."""
    one = float(known.logits[0]) + math.log(known.mass)  # the logit of probability 1
    pairs = zip(known.token_ids.tolist(), known.logits.tolist(), strict=True)
    found = {token: logit - one for token, logit in pairs}
    chosen = found[token_id] if token_id in found else known.best_logit - one
    return chosen, list(found.items())[:count]
