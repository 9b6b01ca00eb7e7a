"""The drawn token is exactly the definition's: same noise, same kept tokens; seeds are fixed, so no near
tie decides."""

import pytest
import torch
from flume_kernels.gpu import reference
from flume_kernels.gpu.sampling import LANES, greedy, greedy_workspace_size, sample

VOCABULARIES = pytest.mark.parametrize("vocabulary", [3, 700, 4999])


def logits_of(rows, vocabulary, device, dtype=torch.float32, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    frame = torch.full((rows, vocabulary + 5), torch.inf, device=device)  # what lies beyond a row would win
    frame[:, :vocabulary] = torch.randn(rows, vocabulary, generator=generator, device=device) * 3
    return frame.to(dtype)[:, :vocabulary]


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seeds=None, positions=None):
    rows, device = logits.shape[0], logits.device

    def column(value, dtype):
        return torch.as_tensor(value, dtype=dtype, device=device).expand(rows).contiguous()

    tokens = torch.full((rows,), -1, dtype=torch.int64, device=device)
    sample(
        logits,
        column(temperature, torch.float32),
        column(top_k, torch.int32),
        column(top_p, torch.float32),
        column(list(range(rows)) if seeds is None else seeds, torch.int64),
        column(7 if positions is None else positions, torch.int64),
        tokens,
    )
    return tokens.tolist()


def definition(logits, temperature=1.0, top_k=0, top_p=1.0, position=7):
    rows = enumerate(logits.float())
    return [reference.sample(row, temperature, top_k, top_p, seed, position, LANES) for seed, row in rows]


@VOCABULARIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_takes_the_first_of_the_largest(vocabulary, dtype, device):
    logits = logits_of(3, vocabulary, device, dtype)
    logits[1] = -5.0
    logits[1, vocabulary - 1] = 0.0
    logits[1, 1] = -0.0
    tokens = torch.full((3,), -1, dtype=torch.int64, device=device)
    workspace = torch.full((greedy_workspace_size(3, vocabulary),), 1 << 62, dtype=torch.int64, device=device)
    greedy(logits, tokens, workspace)
    first = [int((row == row.max()).nonzero()[0]) for row in logits.float()]
    assert tokens.tolist() == first == draw(logits, temperature=0.0)
    assert first[1] == 1


def test_greedy_sees_every_chunk(device):
    logits = torch.full((2, 20000), -1.0, device=device)
    logits[0, 19999] = logits[1, 8192] = 1.0
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    greedy(logits, tokens, torch.zeros(greedy_workspace_size(2, 20000), dtype=torch.int64, device=device))
    assert tokens.tolist() == [19999, 8192]


@VOCABULARIES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 2, "temperature": 5.0},
        {"top_p": 0.5},
        {"top_p": 1e-6},
        {"top_k": 2, "top_p": 0.9, "temperature": 2.0},
    ],
    ids=str,
)
def test_draws_what_the_definition_draws(vocabulary, options, device):
    logits = logits_of(3, vocabulary, device)
    assert draw(logits, **options) == definition(logits, **options)


def test_bf16_logits_with_ties_at_the_edge_keep_them_all(device):
    logits = logits_of(3, 700, device, torch.bfloat16)
    assert draw(logits, top_k=20) == definition(logits, top_k=20)


def test_a_draw_depends_on_its_own_row_alone(device):
    logits = logits_of(4, 700, device)
    seeds, positions, temperatures = [5, 6, 7, 1 << 40], [1, 1, 9, 2], [1.0, 0.0, 2.0, 0.7]
    together = draw(logits, temperatures, [0, 0, 5, 50], [1.0, 1.0, 0.9, 0.8], seeds, positions)
    alone = [
        draw(
            logits[i : i + 1],
            temperatures[i],
            [0, 0, 5, 50][i],
            [1.0, 1.0, 0.9, 0.8][i],
            seeds[i],
            positions[i],
        )[0]
        for i in range(4)
    ]
    order = [2, 0, 3, 1]
    shuffled = draw(
        logits[order].contiguous(),
        [temperatures[i] for i in order],
        [[0, 0, 5, 50][i] for i in order],
        [[1.0, 1.0, 0.9, 0.8][i] for i in order],
        [seeds[i] for i in order],
        [positions[i] for i in order],
    )
    assert together == alone == [shuffled[order.index(i)] for i in range(4)]


def test_seed_and_position_both_change_the_draw(device):
    logits = torch.zeros(16, 700, device=device)
    assert len(set(draw(logits))) > 12
    assert len(set(draw(logits, seeds=3, positions=list(range(16))))) > 12
    assert len(set(draw(logits, seeds=3))) == 1


def test_tokens_come_up_as_often_as_their_probability_says(device):
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = 4000 if device == "cuda" else 120
    logits = probabilities.log().expand(rows, 4).contiguous().to(device)
    counts = torch.bincount(torch.tensor(draw(logits)), minlength=4)
    chi_square = ((counts - rows * probabilities) ** 2 / (rows * probabilities)).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, one in a thousand


def test_top_k_and_top_p_keep_nothing_else(device):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device).expand(8, 4).contiguous()
    assert set(draw(logits, temperature=10.0, top_k=2)) == {2, 3}
    assert set(draw(logits, temperature=10.0, top_p=0.51)) == {2, 3}
    assert set(draw(logits, temperature=1e-3)) == {3}


def test_philox_is_the_published_one():
    # Known answers of Random123 for philox4x32-10.
    import numpy as np

    zeros = reference.philox(0, (np.zeros(1, np.uint64), 0, 0, 0))
    assert [int(word[0]) for word in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = reference.philox((1 << 64) - 1, (np.full(1, 0xFFFFFFFF, np.uint64), *([0xFFFFFFFF] * 3)))
    assert [int(word[0]) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_arguments_that_do_not_fit_are_refused(device):
    logits = logits_of(2, 10, device)
    with pytest.raises(ValueError, match="workspace"):
        greedy(logits, torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected"):
        sample(logits, *([torch.zeros(2, device=device)] * 6))
