"""Everything of sampling that is not a draw: penalties, bias, log-probabilities, ends, batches."""

import pytest

torch = pytest.importorskip("torch")
from flume_weight.sampling import (  # noqa: E402
    FinishReason,
    InvalidLogits,
    NotSampled,
    Sampled,
    Sampler,
    SamplingParams,
    greedy,
    sample_rows,
)
from flume_weight.sampling import batch as batch_module  # noqa: E402
from flume_weight.sampling.penalties import Penalties  # noqa: E402
from transformers import (  # noqa: E402
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 400
GENERATOR = torch.Generator().manual_seed(0)
EOS = 7


def row(seed=None):
    generator = GENERATOR if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, generator=generator) * 4


def sampler(prompt=(1, 2, 3), eos=(EOS,), **fields):
    return Sampler(SamplingParams(**({"seed": 0} | fields)), list(prompt), VOCAB, eos)


def penalised(logits, prompt, output, **fields):
    changed = logits.numpy().copy()
    Penalties(SamplingParams(**fields), prompt, output, VOCAB).apply(changed)
    return torch.from_numpy(changed)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits, prompt, output = row(), [1, 5, 5, 9], [20, 5, 21]
    want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits[None].clone())[0]
    got = penalised(logits, prompt, output, repetition_penalty=penalty)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-6)


def test_presence_and_frequency_count_the_answer_only():
    logits = torch.zeros(VOCAB)
    got = penalised(logits, [5, 8], [5, 5, 9], presence_penalty=0.5, frequency_penalty=0.25)
    want = torch.zeros(VOCAB)
    want[5], want[9] = -(0.5 + 2 * 0.25), -(0.5 + 0.25)
    torch.testing.assert_close(got, want)


def test_negative_penalties_encourage():
    got = penalised(torch.zeros(VOCAB), [], [4], presence_penalty=-1.0, frequency_penalty=-0.5)
    assert got[4] == 1.5


def test_the_repetition_penalty_comes_before_the_subtractions():
    logits = torch.zeros(VOCAB)
    logits[3] = 4.0
    got = penalised(logits, [], [3], repetition_penalty=2.0, presence_penalty=1.0)
    assert got[3] == 4.0 / 2.0 - 1.0


@pytest.mark.parametrize("penalty", [1e-38, 3e38])
def test_an_absurd_penalty_stays_finite(penalty):
    got = penalised(row(), [1, 2], [3], repetition_penalty=penalty)
    assert torch.isfinite(got).all()
    assert sampler(repetition_penalty=penalty, temperature=1.0).sample(row()).token_id < VOCAB


def test_a_penalised_greedy_answer_stops_repeating_itself():
    logits = row(1)
    plain, penalised_one = sampler(), sampler(frequency_penalty=2.0)
    assert len({plain.sample(logits).token_id for _ in range(20)}) == 1
    assert len({penalised_one.sample(logits).token_id for _ in range(20)}) > 3


@pytest.mark.parametrize(
    "fields, warpers",
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"temperature": 1.0, "top_k": 9}, [TopKLogitsWarper(9)]),
        ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"temperature": 1.0, "min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "min_p": 0.01, "top_k": 30, "top_p": 0.9},
            [
                TemperatureLogitsWarper(1.7),
                MinPLogitsWarper(0.01),
                TopKLogitsWarper(30),
                TopPLogitsWarper(0.9),
            ],
        ),
    ],
    ids=str,
)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(fields, warpers):
    for seed in range(20):
        logits = row(seed)
        one = sampler(**fields)
        scaled = ((logits - logits.max()) / fields["temperature"]).numpy()
        want = logits[None].clone()
        for warper in warpers:
            want = warper(torch.tensor([[1]]), want)
        kept = torch.isfinite(want[0]).nonzero().flatten()
        assert sorted(one._candidates(scaled)) == kept.tolist()


def test_a_bias_moves_a_token_and_minus_100_bans_it():
    logits = row(2)
    first = int(logits.argmax())
    assert sampler(logit_bias={first: -100.0}).sample(logits).token_id != first
    assert sampler(logit_bias={3: 100.0}).sample(logits).token_id == 3
    drawn = {
        sampler(logit_bias={5: 100.0}, temperature=1.0, seed=s).sample(logits).token_id for s in range(20)
    }
    assert drawn == {5}


def test_log_probabilities_are_of_the_raw_distribution():
    logits = row(3)
    want = torch.log_softmax(logits.double(), -1)
    fields = {"temperature": 0.3, "top_k": 2, "logit_bias": {9: 100.0}, "repetition_penalty": 1.8}
    got = sampler(logprobs=5, **fields).sample(logits)
    assert got.token_id == 9
    assert got.logprob == pytest.approx(float(want[9]), abs=1e-6)
    values, ids = want.topk(5)
    assert [token for token, _ in got.top] == ids.tolist()
    assert [value for _, value in got.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_no_logprobs_unless_asked_and_none_but_the_chosen_for_zero():
    plain, zero = sampler().sample(row(4)), sampler(logprobs=0).sample(row(4))
    assert plain == Sampled(int(row(4).argmax()), None, [])
    assert zero.top == []
    assert zero.logprob == pytest.approx(float(torch.log_softmax(row(4).double(), -1).max()), abs=1e-6)


def test_the_logits_are_left_as_they_were():
    logits = row(5)
    before = logits.clone()
    sampler(temperature=1.0, frequency_penalty=1.0, logit_bias={2: 5.0}, min_tokens=3, logprobs=2).sample(
        logits
    )
    assert torch.equal(logits, before)


def test_the_end_token_stops_and_ignore_eos_goes_on():
    one, deaf = sampler(), sampler(ignore_eos=True)
    one.accept(EOS)
    deaf.accept(EOS)
    assert one.finish_reason(EOS) is FinishReason.STOP
    assert deaf.finish_reason(EOS) is None


def test_a_stop_token_stops_also_where_the_end_token_is_ignored():
    one = sampler(ignore_eos=True, stop_token_ids=(30,))
    one.accept(30)
    assert one.finish_reason(30) is FinishReason.STOP


def test_an_end_token_said_too_early_does_not_end():
    one = sampler(min_tokens=2)
    reasons = []
    for _ in range(3):
        one.accept(EOS)
        reasons.append(one.finish_reason(EOS))
    assert reasons == [None, None, FinishReason.STOP]


def test_max_tokens_ends_with_length_unless_the_last_one_stops():
    one = sampler(max_tokens=2)
    one.accept(50)
    assert one.finish_reason(50) is None
    one.accept(50)
    assert one.finish_reason(50) is FinishReason.LENGTH
    other = sampler(max_tokens=1)
    other.accept(EOS)
    assert other.finish_reason(EOS) is FinishReason.STOP


def test_min_tokens_forbids_the_end_until_then():
    logits = row(6)
    logits[EOS], logits[30] = 100.0, 99.0
    one = sampler(min_tokens=3, stop_token_ids=(30,))
    answer = [one.sample(logits).token_id for _ in range(4)]
    assert EOS not in answer[:3]
    assert 30 not in answer[:3]
    assert answer[3] == EOS
    assert one.finish_reason(EOS) is FinishReason.STOP
    assert torch.isfinite(logits).all()


def test_min_tokens_holds_for_draws_too():
    logits = torch.full((VOCAB,), -20.0)
    logits[EOS] = 20.0
    one = sampler(min_tokens=5, temperature=1.0)
    assert EOS not in [one.sample(logits).token_id for _ in range(5)]
    assert one.sample(logits).token_id == EOS


def test_greedy_takes_the_lowest_of_equal_tokens_wherever_it_is_computed():
    logits = torch.zeros(4, VOCAB)
    logits[0, [300, 20, 80]] = 5.0
    logits[1, VOCAB - 1] = 1.0
    logits[3] = -torch.inf
    assert greedy(logits)[0] == [20, VOCAB - 1, 0, 0]
    assert [sampler(logprobs=0).sample(logits[r]).token_id for r in range(3)] == [20, VOCAB - 1, 0]


def many_samplers():
    return [
        sampler(),
        sampler(temperature=1.0, seed=3),
        sampler(frequency_penalty=1.5),
        sampler(logprobs=2),
        sampler(temperature=0.8, top_p=0.9, top_k=20, seed=4),
        sampler(min_tokens=2),
        sampler(logit_bias={5: 100.0}),
        sampler(max_tokens=3),
    ]


def test_a_batch_gives_each_row_what_it_gets_alone():
    batch, alone = many_samplers(), many_samplers()
    with torch.inference_mode():
        for step in range(6):
            logits = torch.stack([row(10 * step + r) for r in range(len(batch))])
            logits[:, EOS] += 15.0
            want = [one.sample(logits[r]) for r, one in enumerate(alone)]
            assert sample_rows(batch, logits) == want
    assert [one.num_output_tokens for one in batch] == [6] * len(batch)


def test_the_order_of_rows_and_their_company_do_not_matter():
    forward, backward = many_samplers(), many_samplers()
    for step in range(5):
        logits = torch.stack([row(100 + 10 * step + r) for r in range(8)])
        first = sample_rows(forward, logits)
        second = sample_rows(backward[::-1], logits.flip(0))[::-1]
        assert first == second


def test_an_all_greedy_batch_takes_the_short_way_and_counts():
    batch = [sampler(max_tokens=1) for _ in range(3)]
    logits = torch.stack([row(r) for r in range(3)])
    assert [s.token_id for s in sample_rows(batch, logits)] == logits.argmax(-1).tolist()
    assert [one.finish_reason(50) for one in batch] == [FinishReason.LENGTH] * 3


POISONS = {
    "nan": lambda logits: logits.__setitem__(7, torch.nan),
    "-nan": lambda logits: logits.__setitem__(VOCAB - 1, -torch.nan),
    "inf": lambda logits: logits.__setitem__(7, torch.inf),
    "all -inf": lambda logits: logits.fill_(-torch.inf),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_row_that_is_no_numbers_gets_no_token_and_leaves_the_others_theirs(poison):
    batch, alone = many_samplers(), many_samplers()
    for bad in range(len(batch)):
        logits = torch.stack([row(300 + 10 * bad + r) for r in range(len(batch))])
        want = [one.sample(logits[r]) for r, one in enumerate(alone) if r != bad]
        POISONS[poison](logits[bad])
        got = sample_rows(batch, logits)
        failed = got.pop(bad)
        assert isinstance(failed, NotSampled) and isinstance(failed.error, InvalidLogits)
        word = {"inf": "infinite", "all -inf": "all -inf"}.get(poison, "NaN")
        assert word in failed.error.found
        assert got == want
        assert [one.num_output_tokens for one in batch] == [bad + (r != bad) for r in range(len(batch))]
        batch[bad].accept(0)
        alone[bad].accept(0)


def test_a_row_with_nothing_but_what_min_tokens_forbids_has_no_token():
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, EOS] = 1.0
    for temperature in (0.0, 1.0):
        (failed,) = sample_rows([sampler(min_tokens=2, temperature=temperature)], logits)
        assert "min_tokens" in failed.error.found


def test_a_sampler_that_raises_costs_its_own_row_alone(monkeypatch):
    batch = many_samplers()
    monkeypatch.setattr(batch[4], "_candidates", lambda scaled: {}["no such thing"])
    got = sample_rows(batch, torch.stack([row(r) for r in range(len(batch))]))
    assert [isinstance(one, Sampled) for one in got] == [r != 4 for r in range(len(batch))]
    assert isinstance(got[4].error, KeyError)


@pytest.mark.parametrize("device", ["cpu", "meta-like"])
def test_the_largest_of_a_row_with_nan_is_nan_on_every_device(device):
    logits = torch.zeros(3, VOCAB)
    logits[1, 5], logits[2, 9] = torch.nan, 2.0
    find = greedy if device == "cpu" else batch_module._first_of_the_largest
    tokens, values = find(logits)
    assert tokens[0] == 0 and tokens[2] == 9
    assert values[0] == 0.0 and values[2] == 2.0 and values[1] != values[1]


def test_no_rows_is_no_tokens():
    assert sample_rows([], torch.empty(0, VOCAB)) == []
    assert greedy(torch.empty(0, VOCAB)) == ([], [])


def test_numpy_rows_are_as_good_as_tensors():
    assert sampler().sample(row(9).numpy()) == sampler().sample(row(9))
