"""What both front doors share: the served model, prompts into token ids, requests into answers.

Checks here need the tokenizer or the cluster; what can be judged from the request alone is the doors'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from flume_protos.v1 import weight_pb2 as pb

from flume_router.chat_template import TemplateRefused
from flume_router.errors import BadRequest, ContextTooLong, ModelNotFound
from flume_router.generation import Generation
from flume_router.in_flight import InFlight
from flume_router.sequence_request import SequenceRequest
from flume_router.text_model import TextModel
from flume_router.weight_pool import WeightPool

_INT64_SPAN = 2**64
_INT64_MAX = 2**63 - 1


class Service(msgspec.Struct, frozen=True):
    model: str
    text: TextModel
    pool: WeightPool
    generation: Generation
    in_flight: InFlight
    started_at_s: float  # Unix time

    @property
    def ready(self) -> bool:
        """Whether new requests have a chance."""
        return self.pool.ready and not self.in_flight.draining

    def require_model(self, model: str) -> None:
        if model != self.model:
            raise ModelNotFound(model, self.model)

    async def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> Sequence[int]:
        """Token ids of the rendered chat; the template writes its own BOS."""
        template = self.text.chat_template
        if template is None:
            raise BadRequest(
                f"The model {self.model} has no chat template; use /v1/completions.", param="messages"
            )
        try:
            text = template.render(messages)
        except TemplateRefused as error:
            raise BadRequest(
                f"The chat template of {self.model} does not take these messages: {error}",
                param="messages",
                code="invalid_value",
            ) from error
        return await self.text.tokenizer.encode(text, add_special_tokens=False)

    async def text_prompt(self, text: str) -> Sequence[int]:
        return await self.text.tokenizer.encode(text, add_special_tokens=True)

    def check_prompt(self, token_ids: Sequence[int], param: str) -> None:
        """That there is one, of tokens that the model has."""
        if not token_ids:
            raise BadRequest(f"Invalid '{param}': it has no tokens.", param=param, code="invalid_value")
        highest, vocab_size = max(token_ids), self.pool.vocab_size
        if highest >= vocab_size:
            raise BadRequest(
                f"Invalid '{param}': token id {highest} is not below the vocabulary's size, {vocab_size}.",
                param=param,
                code="invalid_value",
            )

    def check_length(self, prompt_tokens: int, max_tokens: int | None, param: str) -> None:
        """That prompt and answer, at least one token, fit the context. Raises ContextTooLong."""
        context_tokens = self.pool.context_tokens
        if prompt_tokens + (max_tokens or 1) > context_tokens:
            raise ContextTooLong(context_tokens, prompt_tokens, max_tokens, param=param)

    def check_sampling(self, sampling: pb.Sampling) -> None:
        """That the token ids it names exist."""
        vocab_size = self.pool.vocab_size
        for param, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if max(ids, default=0) >= vocab_size:
                raise BadRequest(
                    f"Invalid '{param}': token id {max(ids)} is not below the vocabulary's size, "
                    f"{vocab_size}.",
                    param=param,
                    code="invalid_value",
                )


def sequences(base: SequenceRequest, prompts: Sequence[Sequence[int]], n: int) -> Iterator[SequenceRequest]:
    """`n` sequences for each prompt, prompt by prompt; ids and seeds count up, so that answers differ."""
    total = len(prompts) * n
    for index in range(total):
        sampling = pb.Sampling()
        sampling.CopyFrom(base.sampling)
        if sampling.HasField("seed"):
            sampling.seed = wrapped(sampling.seed + index % n)
        yield msgspec.structs.replace(
            base,
            id=base.id if total == 1 else f"{base.id}-{index}",
            prompt_token_ids=prompts[index // n],
            sampling=sampling,
        )


def wrapped(number: int) -> int:
    """Into the int64 range, as overflow does."""
    return (number + _INT64_MAX + 1) % _INT64_SPAN - _INT64_MAX - 1
