"""Which tokens end a sequence: those of the model's config and those the router's tokenizer knows."""

from types import SimpleNamespace

import pytest
from flume_weight import messages as m
from flume_weight.requests import new_sequence
from flume_weight.sampling import SamplingParams

CONFIG = SimpleNamespace(vocab_size=10, context_tokens=64, eos_token_ids=(2,))


@pytest.mark.parametrize(
    "ignore_eos, ends", [(False, {2: True, 7: True, 3: False}), (True, {2: False, 7: False, 3: False})]
)
def test_the_tokenizers_ends_end_too_unless_ends_are_ignored(ignore_eos, ends):
    params = SamplingParams(eos_token_ids=(7, 99), ignore_eos=ignore_eos, min_tokens=0)
    for token, stops in ends.items():
        sequence = new_sequence(m.Submit(sequence="s", prompt_token_ids=[1], sampling=params), CONFIG, 0.0)
        sequence.sampler.accept(token)
        assert (sequence.sampler.finish_reason(token) is not None) == stops
