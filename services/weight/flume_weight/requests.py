"""A request as it comes from the supervisor becomes a sequence, or is refused by the field to blame. Pure."""

from __future__ import annotations

from flume_weight import messages as m
from flume_weight.errors import RequestRefused
from flume_weight.model import ModelConfig
from flume_weight.sampling import Sampler
from flume_weight.sequence import Sequence


def new_sequence(message: m.Submit, config: ModelConfig, now_s: float) -> Sequence:
    """Raises RequestRefused."""
    prompt, said = message.prompt_token_ids, message.output_token_ids
    if not prompt:
        raise RequestRefused("INVALID_ARGUMENT", "prompt_token_ids is empty")
    for field, ids in ("prompt_token_ids", prompt), ("output_token_ids", said):
        if any(not 0 <= token < config.vocab_size for token in ids):
            raise RequestRefused("INVALID_ARGUMENT", f"{field} has an id outside 0..{config.vocab_size - 1}")
    room = config.context_tokens - len(prompt)
    wanted = message.sampling.max_tokens
    if room < max(wanted, len(said), 1):
        raise RequestRefused(
            "INVALID_ARGUMENT",
            f"the context holds {config.context_tokens} tokens; the prompt has {len(prompt)} and"
            f" max_tokens asks for {wanted or 'at least 1'}",
        )
    try:
        message.sampling.validate(config.vocab_size)
    except ValueError as error:
        raise RequestRefused("INVALID_ARGUMENT", str(error)) from error
    return Sequence(
        name=message.sequence,
        tokens=[*prompt, *said],
        prompt_tokens=len(prompt),
        max_tokens=wanted or room,
        sampler=Sampler(message.sampling, prompt, config.vocab_size, _eos_token_ids(message, config), said),
        arrived_s=now_s,
        canary=message.canary,
        # Whoever said the newest token had computed all before it.
        computed_tokens=len(prompt) + len(said) - 1 if said else 0,
        suspect=message.suspect,
    )


def _eos_token_ids(message: m.Submit, config: ModelConfig) -> list[int]:
    """The model's own, and those of the tokenizer, which a vocabulary may be too small for."""
    also = (token for token in message.sampling.eos_token_ids if token < config.vocab_size)
    return list(dict.fromkeys([*config.eos_token_ids, *also]))
