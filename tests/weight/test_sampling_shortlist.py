"""Tokens chosen from shortlists are those chosen from all the logits, or none is named."""

import numpy as np
import pytest
import torch
from flume_kernels.gpu import reference
from flume_weight.sampling import (
    NotSampled,
    Sampled,
    Sampler,
    SamplingParams,
    Shortlist,
    sample_rows,
    sample_shortlisted,
)
from flume_weight.sampling.noise import all_tokens, gumbels
from flume_weight.sampling.shortlist import DEVICE_ROUNDING, bounds, drawn
from hypothesis import example, given, settings
from hypothesis import strategies as st

FEW = 8  # candidates, of some hundred tokens


def signed(key):
    return key - (1 << 64) if key >> 63 else key


def shortlisted(ask, logits, count=FEW, error=0.0):
    """What a device says of logits float32 [V]: by the definition, with its sums and its margin off."""
    heat = torch.tensor([ask.temperature], dtype=torch.float64)
    tokens, values, sums = reference.shortlist(
        torch.from_numpy(logits)[None], torch.tensor([signed(ask.key)]), heat, count
    )
    n = values.shape[1] - 1 if ask.candidates else 1
    mass, scaled_mass, margin = sums[0].tolist()
    return Shortlist(
        token_ids=tokens[0, 1 : 1 + n].numpy().astype(np.int32),
        logits=values[0, 1 : 1 + n].numpy().astype(np.float32),
        vocab_size=len(logits),
        mass=mass * (1 + error),
        scaled_mass=scaled_mass * (1 + error),
        best=int(tokens[0, 0]),
        best_logit=float(values[0, 0]),
        margin=margin - 5 * abs(error),
    )


def sampler(vocab_size, **fields):
    return Sampler(SamplingParams(**({"seed": 1} | fields)), [], vocab_size, [0])


options = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.floats(0.05, 2.0), st.sampled_from([1.0, 0.7, 1e-40])),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logprobs": st.sampled_from([None, 0, 3]),
    },
    optional={
        "top_k": st.integers(-1, 2 * FEW),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
    },
)
rows = st.fixed_dictionaries(
    {
        "vocab_size": st.sampled_from([5, FEW, FEW + 1, 200]),
        "seed": st.integers(0, 999),
        "spread": st.sampled_from([3e-7, 0.1, 1.0, 4.0]),
        "steps": st.sampled_from([None, 0.5, 2.0]),  # logits in steps: many are equal
        "lift": st.sampled_from([0.0, 3.0]),  # a difference to the largest makes equals of small ones
    }
)


MERGED = {"vocab_size": 200, "spread": 3e-7, "steps": None, "lift": 3.0}


def logits_of(vocab_size, seed, spread, steps, lift):
    row = np.random.default_rng(seed).standard_normal(vocab_size) * spread
    if steps:
        row = np.round(row / steps) * steps
    row[seed % vocab_size] += lift
    return row.astype(np.float32)


@settings(max_examples=400, deadline=None)
@given(options, rows, st.sampled_from([-3e-5, 0.0, 3e-5]))
def test_a_token_from_a_shortlist_is_the_one_from_all_logits(fields, row, error):
    logits = logits_of(**row)
    one, other = (sampler(len(logits), **fields) for _ in range(2))
    found = one.sample_from(shortlisted(one.ask(), logits, error=error))
    if found is None:
        assert one.num_output_tokens == 0
        return
    want = other.sample(logits)
    assert found.token_id == want.token_id
    assert found.logprob == (None if want.logprob is None else pytest.approx(want.logprob, abs=1e-4))
    if want.top and len(logits) > 3:
        assert [token for token, _ in found.top] == [token for token, _ in want.top]
        assert [x for _, x in found.top] == pytest.approx([x for _, x in want.top], abs=1e-4)
    assert one.num_output_tokens == 1


@settings(max_examples=200, deadline=None)
@given(options, rows)
@example({"temperature": 1.0, "top_k": 4}, MERGED | {"seed": 0})
@example({"temperature": 1.0, "top_k": 4}, MERGED | {"seed": 1})
@example({"temperature": 1.0, "top_p": 0.3}, MERGED | {"seed": 2})
def test_as_many_tokens_may_be_drawn_as_the_bounds_say(fields, row):
    logits = logits_of(**row)
    one = sampler(len(logits), **fields)
    known = shortlisted(one.ask(), logits, count=len(logits) if not one.ask().candidates else FEW)
    scaled = logits - logits.max()
    with np.errstate(over="ignore"):
        scaled /= np.float32(max(one.params.temperature, 1e-30))
    least, most = bounds(one.params, scaled[known.token_ids], len(logits), known.scaled_mass)
    may = set(one._candidates(scaled.copy()).tolist())
    if least < len(logits):
        assert set(known.token_ids[:least].tolist()) <= may
    else:
        assert len(may) == len(logits)
    if most is not None:
        assert may <= set(known.token_ids[:most].tolist())


@pytest.mark.parametrize(
    "fields, told",
    [
        ({}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5, "temperature": 0.5}, 1.0),
        ({"min_p": 0.3}, 0.99),
        ({"top_k": FEW, "top_p": 0.9}, 0.9),
        ({"top_p": 0.95}, 0.6),
        ({"top_k": 3 * FEW}, 0.6),
    ],
    ids=str,
)
def test_nearly_all_tokens_are_told_by_a_few_candidates(fields, told):
    logits = logits_of(200, 3, 4.0, None, 0.0)
    one = sampler(200, **({"temperature": 1.0} | fields))
    found = []
    for position in range(200):
        one.num_output_tokens = position
        found.append(one.sample_from(shortlisted(one.ask(), logits)))
    assert sum(each is not None for each in found) >= told * len(found)


def test_a_best_score_that_rounding_may_have_made_is_not_believed():
    logits = logits_of(200, 5, 1.0, None, 0.0)
    one = sampler(200, temperature=1.0)
    known = shortlisted(one.ask(), logits)
    assert known.margin > DEVICE_ROUNDING
    names = Shortlist.__dataclass_fields__
    close = Shortlist(**{name: getattr(known, name) for name in names} | {"margin": DEVICE_ROUNDING / 2})
    assert one.sample_from(close) is None and one.num_output_tokens == 0
    assert one.sample_from(known) is not None


def test_scores_that_all_but_tie_are_left_to_all_logits():
    key, ids = 77, np.arange(4, dtype=np.uint32)
    logits = -gumbels(key, all_tokens(4))
    order = np.argsort(-logits)
    params = SamplingParams(temperature=1.0, top_k=4)
    known = Shortlist(ids[order].astype(np.int32), logits[order], 4, 1.0, 1.0, 0, 0.0, 0.0)
    assert drawn(params, key, known) is None


def test_rows_that_a_shortlist_cannot_tell_are_read_together_and_the_others_not():
    logits = np.stack([logits_of(200, seed, 4.0, None, 0.0) for seed in range(6)])
    fields = [
        {},
        {"temperature": 1.0, "logit_bias": {7: 2.0}},
        {"temperature": 1.0, "top_k": 4},
        {"frequency_penalty": 0.5},
        {"min_tokens": 3},
        {"logprobs": 2},
    ]
    ours, theirs = ([sampler(200, **each) for each in fields] for _ in range(2))
    asked = []

    def logits_of_rows(which):
        asked.append(list(which))
        return torch.from_numpy(logits)[which]

    for step in range(4):
        asks = [one.ask() for one in ours]
        known = [
            None if ask is None else shortlisted(ask, row) for ask, row in zip(asks, logits, strict=True)
        ]
        found, read = sample_shortlisted(ours, known, logits_of_rows)
        want = sample_rows(theirs, torch.from_numpy(logits))
        assert [each.token_id for each in found] == [each.token_id for each in want]
        assert asked.pop() == ([1, 3, 4] if step < 3 else [1, 3]) and read == (3 if step < 3 else 2)
    assert asked == [] and [one.num_output_tokens for one in ours] == [4] * 6


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0, "top_k": 4, "seed": 3}]
)
def test_a_shortlist_of_invalid_logits_tells_no_token_and_all_of_them_tell_why(fields):
    logits = np.stack([logits_of(200, seed, 4.0, None, 0.0) for seed in range(3)])
    logits[1, 150] = np.nan
    samplers = [sampler(200, **fields) for _ in range(3)]
    with np.errstate(invalid="ignore"):
        known = [shortlisted(one.ask(), row) for one, row in zip(samplers, logits, strict=True)]
    assert [each.valid for each in known] == [True, False, True]
    found, read = sample_shortlisted(samplers, known, lambda which: torch.from_numpy(logits)[which])
    assert read == 1 and [type(each) for each in found] == [Sampled, NotSampled, Sampled]
    assert found[1].error.found == "NaN logits"
