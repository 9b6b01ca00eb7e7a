"""Shortlists of logits against their definition, and their noise against the sampler's own."""

import numpy as np
import pytest
import torch
from flume_kernels.gpu import reference
from flume_kernels.gpu.shortlist import SUMS, shortlist
from flume_weight.sampling.noise import all_tokens, gumbels, stream_key

COUNT = 8
CHUNK = 64  # the interpreter is slow
VOCABULARIES = pytest.mark.parametrize("vocabulary", [5, CHUNK, 200])


def logits_of(rows, vocabulary, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(vocabulary)
    frame = torch.full((rows, vocabulary + 5), torch.inf)  # what lies beyond a row would win
    frame[:, :vocabulary] = torch.randn(rows, vocabulary, generator=generator) * 3
    return frame.to(device, dtype)[:, :vocabulary]


def signed(key):
    return key - (1 << 64) if key >> 63 else key


def keys_of(rows, device):
    return torch.tensor([signed(stream_key(11, row)) for row in range(rows)], device=device)


def found(logits, keys, temperatures, wants=None):
    """(tokens, values, sums, temperatures) out of poisoned memory."""
    rows, device = logits.shape[0], logits.device
    tokens = torch.full((rows, 1 + COUNT), -7, dtype=torch.int32, device=device)
    values = torch.full((rows, 1 + COUNT), torch.nan, device=device)
    sums = torch.full((rows, SUMS), torch.nan, device=device)
    heat = torch.tensor(temperatures, dtype=torch.float64, device=device)
    wants = torch.tensor([1] * rows if wants is None else wants, device=device)
    shortlist(logits, keys, heat, wants, tokens, values, sums, CHUNK)
    return tokens.long(), values.double(), sums.double(), heat


@VOCABULARIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_sums_and_draws_are_those_of_the_definition(vocabulary, dtype, device):
    logits, keys = logits_of(4, vocabulary, device, dtype), keys_of(4, device)
    tokens, values, sums, heat = found(logits, keys, [1.0, 0.3, 2.0, 0.9])
    want_tokens, want_values, want_sums = reference.shortlist(logits, keys, heat, COUNT)
    n = min(COUNT, vocabulary)
    assert tokens[:, : 1 + n].tolist() == want_tokens.tolist()
    assert torch.equal(values[:, : 1 + n], want_values)
    torch.testing.assert_close(sums[:, :2], want_sums[:, :2], atol=0, rtol=3e-6)
    torch.testing.assert_close(sums[:, 2], want_sums[:, 2], atol=5e-5, rtol=0)


def test_equal_logits_come_by_token_also_across_chunks(device):
    vocabulary = 2 * CHUNK + 9
    logits = torch.full((2, vocabulary), -4.0, device=device)
    ties = [3, CHUNK - 1, CHUNK, 2 * CHUNK + 8]
    logits[0, ties] = 1.0
    logits[1, ties] = torch.tensor([0.0, -0.0, 0.0, -0.0], device=device)
    tokens, values, _, _ = found(logits, keys_of(2, device), [0.0, 0.0])
    for row in tokens.tolist():
        assert row[1:] == [*ties, *(token for token in range(COUNT - 3) if token != 3)]
    assert values[:, 1].tolist() == [1.0, 0.0]


def test_a_row_that_wants_the_largest_alone_gets_it_and_no_more(device):
    logits = logits_of(3, CHUNK + 30, device)
    tokens, values, sums, _ = found(logits, keys_of(3, device), [0.0, 1.0, 0.0], wants=[0, 0, 1])
    assert tokens[:, 1].tolist() == logits.argmax(-1).tolist()
    assert values[:, 1].tolist() == logits.amax(-1).tolist()
    assert (tokens[:2, 2:] == -7).all() and values[:2, 2:].isnan().all()
    undrawn = [0, 2]
    assert (tokens[undrawn, 0] == -7).all() and values[undrawn, 0].isnan().all()
    assert sums[undrawn, 1:].isnan().all()
    want = torch.logsumexp(logits.double(), -1) - logits.double().amax(-1)
    torch.testing.assert_close(sums[:, 0].log(), want, atol=1e-6, rtol=0)


def test_extreme_temperatures_draw_the_largest_or_anything(device):
    logits, keys = logits_of(2, 200, device), keys_of(2, device)
    tokens, _, sums, _ = found(logits, keys, [1e-30, 1e-3])
    assert tokens[:, 0].tolist() == logits.argmax(-1).tolist()
    assert (sums[:, 2] > 1).all()
    level = torch.zeros(2, 200, device=device)
    noise = reference.draw_noise(keys, 200)
    assert found(level, keys, [1.0, 1.0])[0][:, 0].tolist() == noise.argmax(-1).tolist()


def test_forbidden_tokens_weigh_nothing_and_logits_that_are_no_numbers_do_no_harm(device):
    logits = logits_of(3, CHUNK + 50, device)
    logits[0, :CHUNK] = -torch.inf
    logits[1] = -torch.inf
    logits[2] = torch.nan
    keys = keys_of(3, device)
    tokens, values, sums, heat = found(logits, keys, [1.0] * 3)
    want_tokens, want_values, want_sums = reference.shortlist(logits[:1], keys[:1], heat[:1], COUNT)
    assert tokens[0].tolist() == want_tokens[0].tolist()
    assert values[0].tolist() == want_values[0].tolist()
    torch.testing.assert_close(sums[0], want_sums[0], atol=5e-5, rtol=1e-5)
    assert not (sums[1:, 2] > 0).any()


@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf], ids=["nan", "-nan", "inf"])
@pytest.mark.parametrize("at", [0, CHUNK - 1, CHUNK + 50 - 1])
def test_the_mass_tells_logits_that_are_no_numbers_wherever_they_are(poison, at, device):
    logits = logits_of(3, CHUNK + 50, device)
    logits[1, at] = poison
    logits[2] = -torch.inf
    for temperature, wants in (0.0, 0), (1.0, 1):
        _, _, sums, _ = found(logits, keys_of(3, device), [temperature] * 3, wants=[wants] * 3)
        assert sums[0, 0].isfinite() and sums[0, 0] >= 1
        assert sums[1, 0].isnan()
        assert sums[2, 0] == 0


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1, 0x8000000000000001, stream_key(5, 9)])
def test_the_noise_is_the_samplers(key):
    want = gumbels(key, all_tokens(3000)).astype(np.float64)
    got = reference.draw_noise(torch.tensor([signed(key)]), 3000)[0]
    assert np.abs(got.numpy() - want).max() < 2e-6


def test_arguments_that_do_not_fit_are_refused(device):
    logits, longs = logits_of(2, 10, device), torch.zeros(2, dtype=torch.int64, device=device)
    tokens, values, sums = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 5), torch.zeros(2, SUMS)
    with pytest.raises(ValueError, match="float64"):
        shortlist(logits, longs, longs.float(), longs, tokens, values, sums)
    with pytest.raises(ValueError, match="power of two"):
        shortlist(logits, longs, longs.double(), longs, tokens[:, :4].contiguous(), values, sums)
    with pytest.raises(ValueError, match="values"):
        shortlist(logits, longs, longs.double(), longs, tokens, values[:, :4], sums)
