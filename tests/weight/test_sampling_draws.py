"""Draws: their statistics against the analytic distribution, seeds, and what they may not depend on."""

import numpy as np
import pytest
from flume_weight.sampling import Sampler, SamplingParams
from flume_weight.sampling.candidates import candidates, largest
from flume_weight.sampling.noise import all_tokens, gumbels, stream_key, uniforms
from hypothesis import given, settings
from hypothesis import strategies as st

RANDOM = np.random.default_rng(0)
LOGITS = (RANDOM.standard_normal(300) * 2).astype(np.float32)


def sampler(vocab_size=300, **fields):
    return Sampler(SamplingParams(**({"temperature": 1.0, "seed": 1} | fields)), [], vocab_size, [])


def draws(count, logits=LOGITS, **fields):
    one = sampler(len(logits), **fields)
    return np.array([one.sample(logits).token_id for _ in range(count)])


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def chi_square(counts, probabilities):
    """(statistic - degrees) / sqrt(2 · degrees): about standard normal; rare outcomes are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    degrees = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", [0, -5, 2**62])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(seed, temperature):
    counts = np.bincount(draws(12_000, seed=seed, temperature=temperature), minlength=300)
    assert abs(chi_square(counts, softmax(LOGITS / temperature))) < 4


def test_first_draws_of_many_seeds_follow_the_softmax():
    counts = np.zeros(300, dtype=np.int64)
    for seed in range(12_000):
        counts[sampler(seed=seed).sample(LOGITS).token_id] += 1
    assert abs(chi_square(counts, softmax(LOGITS))) < 4


def test_successive_draws_are_independent():
    logits = np.zeros(6, dtype=np.float32)
    tokens = draws(30_000, logits)
    pairs = np.bincount(tokens[:-1] * 6 + tokens[1:], minlength=36)
    assert abs(chi_square(pairs, np.full(36, 1 / 36))) < 4


@pytest.mark.parametrize(
    "fields, kept",
    [
        ({"top_k": 5}, lambda p: np.argsort(-p)[:5]),
        ({"top_p": 0.6}, lambda p: np.argsort(-p)[: np.searchsorted(np.sort(p)[::-1].cumsum(), 0.6) + 1]),
        ({"min_p": 0.2}, lambda p: np.flatnonzero(p >= 0.2 * p.max())),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_draws_from_a_truncated_distribution_follow_it_renormalised(fields, kept):
    probabilities = np.zeros(300)
    stays = kept(softmax(LOGITS))
    probabilities[stays] = softmax(LOGITS)[stays]
    counts = np.bincount(draws(12_000, **fields), minlength=300)
    assert set(np.flatnonzero(counts)) <= set(stays)
    assert abs(chi_square(counts[stays], probabilities[stays] / probabilities.sum())) < 4


def test_min_p_is_taken_before_top_k_and_top_k_before_top_p():
    probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = np.log(probabilities).astype(np.float32)
    # Of the three that top_k leaves, two hold 0.7 / 0.9 = 0.78 of the mass: enough; of all they hold 0.7.
    assert sorted(candidates(logits, 3, 0.75, 0.0)) == [0, 1]
    assert sorted(candidates(logits, 0, 0.75, 0.0)) == [0, 1, 2]
    # min_p leaves the first two; 0.4 / 0.7 = 0.57 of that mass is one token.
    assert sorted(candidates(logits, 0, 0.57, 0.7)) == [0]
    assert sorted(candidates(logits, 0, 0.57, 0.0)) == [0, 1]


def test_the_temperature_comes_before_truncation():
    logits = np.log(np.array([0.5, 0.3, 0.2])).astype(np.float32)
    assert set(draws(500, logits, temperature=1.0, top_p=0.5)) == {0}
    assert set(draws(500, logits, temperature=2.0, top_p=0.5)) == {0, 1}


def test_the_same_seed_says_the_same_and_another_seed_another():
    assert draws(50, seed=11).tolist() == draws(50, seed=11).tolist()
    assert draws(50, seed=11).tolist() != draws(50, seed=12).tolist()


def test_without_a_seed_every_sequence_draws_its_own():
    one, other = sampler(seed=None), sampler(seed=None)
    assert one.seed != other.seed
    assert [one.sample(LOGITS).token_id for _ in range(50)] != [
        other.sample(LOGITS).token_id for _ in range(50)
    ]


def test_a_half_said_answer_goes_on_elsewhere_as_it_would_have_here():
    fields = {"frequency_penalty": 1.0, "repetition_penalty": 1.2, "temperature": 1.5, "top_p": 0.9}
    whole = draws(40, **fields).tolist()
    params = SamplingParams(seed=1, **fields)
    heir = Sampler(params, [], 300, [], output_token_ids=whole[:15])
    assert [heir.sample(LOGITS).token_id for _ in range(25)] == whole[15:]


def test_the_last_bits_of_the_logits_hardly_ever_change_a_draw():
    noisy = sampler(temperature=1.0)
    exact = sampler(temperature=1.0)
    wiggle = RANDOM.standard_normal((2000, 300)).astype(np.float32) * 1e-5
    changed = sum(
        exact.sample(LOGITS).token_id != noisy.sample(LOGITS + wiggle[i]).token_id for i in range(2000)
    )
    assert changed <= 1


def test_a_tokens_noise_does_not_depend_on_the_other_candidates():
    key = stream_key(3, 4)
    some = np.array([250, 3, 77], dtype=np.uint32)
    assert np.array_equal(gumbels(key, some), gumbels(key, all_tokens(300))[some])


def test_uniforms_are_uniform_across_tokens_and_across_keys():
    across_tokens = uniforms(stream_key(0, 0), all_tokens(200_000))
    across_keys = np.array([uniforms(stream_key(5, n), all_tokens(3))[2] for n in range(20_000)])
    for sample in (across_tokens, across_keys):
        counts = np.bincount((sample * 64).astype(int), minlength=64)
        assert abs(chi_square(counts, np.full(64, 1 / 64))) < 4
        assert 0 < sample.min() < sample.max() < 1


def test_noise_of_different_draws_is_uncorrelated():
    rows = np.stack([gumbels(stream_key(0, n), all_tokens(5000)) for n in range(40)])
    off_diagonal = np.corrcoef(rows)[~np.eye(40, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(5000)


@pytest.mark.parametrize(
    "other", [1 << 32, 0xFFFF << 32, (1 << 64) - (1 << 32)], ids=["one bit", "16 bits", "32 bits"]
)
def test_keys_that_share_their_lower_half_share_nothing_else(other):
    key, ids = stream_key(0, 0), all_tokens(20_000)
    one, two = uniforms(key, ids), uniforms(key ^ other, ids)
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / np.sqrt(20_000)
    close = np.abs(one - two) < 0.01
    assert abs(close.mean() - 0.02) < 5 * np.sqrt(0.02 / 20_000)


def test_keys_whose_lower_halves_are_a_step_apart_are_not_the_same_noise_shifted():
    key, ids = stream_key(0, 1), all_tokens(20_000)
    stepped = (stream_key(9, 9) & ~0xFFFFFFFF) | ((key + 0x9E3779B1) & 0xFFFFFFFF)
    assert abs(np.corrcoef(uniforms(key, ids)[1:], uniforms(stepped, ids)[:-1])[0, 1]) < 5 / np.sqrt(20_000)


def test_gumbel_noise_has_its_mean_and_variance():
    noise = gumbels(stream_key(1, 1), all_tokens(400_000)).astype(np.float64)
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    assert np.isfinite(noise).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-30, 1e-9, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy_and_no_accident(temperature):
    assert set(draws(20, temperature=temperature)) == {int(LOGITS.argmax())}


def test_top_k_of_one_is_greedy_even_among_equals():
    logits = np.array([1, 5, 5, 5, 0], dtype=np.float32)
    assert set(draws(50, logits, top_k=1)) == {1}


scores = st.lists(st.integers(-6, 6).map(lambda n: n / 2), min_size=1, max_size=60).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(scores, st.integers(0, 70))
def test_the_largest_are_those_a_stable_sort_puts_first(values, count):
    count = min(count, values.size)
    assert largest(values, count).tolist() == np.argsort(-values, kind="stable")[:count].tolist()


@settings(max_examples=300)
@given(scores, st.integers(0, 70), st.floats(0.01, 1), st.floats(0, 1))
def test_what_stays_is_a_head_of_the_sorted_tokens_and_never_empty(values, top_k, top_p, min_p):
    stays = candidates(values, top_k, top_p, min_p)
    order = np.argsort(-values, kind="stable")
    assert 1 <= len(stays) == len(set(stays))
    assert sorted(order[: len(stays)]) == sorted(stays)
    if top_k:
        assert len(stays) <= top_k
    mass = softmax(values[sorted(candidates(values, top_k, 1.0, min_p))])
    if top_p < 1:
        kept = np.sort(mass)[::-1][: len(stays)]
        assert kept.sum() >= top_p - 1e-6
        assert kept[:-1].sum() < top_p + 1e-6


def test_top_p_over_a_flat_vocabulary_keeps_its_share():
    flat = np.zeros(50_000, dtype=np.float32)
    assert abs(len(candidates(flat, 0, 0.9, 0.0)) - 45_000) <= 1
    assert len(candidates(flat, 0, 0.9999999, 0.0)) >= 49_999
