"""Which products run by our kernel, and how: only what was measured, was right and was faster."""

from dataclasses import replace

import pytest
import torch
from flume_kernels.gpu import linear_tuning
from flume_kernels.gpu.linear_tuning import (
    Chip,
    Fusion,
    LinearChoice,
    LinearProblem,
    LinearRun,
    linear_candidates,
    model_problems,
    tune_linear,
)
from flume_kernels.gpu.skinny_linear import SkinnyConfig, tile_rows
from flume_kernels.gpu.tuning import TuningCache

H200 = Chip(132, 228 << 10, 9)
SMALL = LinearProblem(3, 24, 64, torch.float32, Fusion.NORM)
LLAMA_8B = {"hidden": 4096, "query": 4096, "kv": 2048, "inner": 14336, "vocabulary": 128256}
CONFIGS = [SkinnyConfig(16, 32, split, 2) for split in (1, 2, 3)]


@pytest.fixture
def cache(tmp_path):
    return TuningCache(tmp_path / "tuning.json", tmp_path / "shipped.json")


@pytest.fixture
def measured(monkeypatch):
    """Seconds by configuration, None for the plain way; stands for a GPU's clock."""
    seconds = {CONFIGS[0]: 3.0, CONFIGS[1]: 1.0, CONFIGS[2]: 2.0, None: 1.5}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(Chip, "of", lambda device: H200)
    monkeypatch.setattr(linear_tuning, "linear_candidates", lambda problem, chip: CONFIGS)
    monkeypatch.setattr(LinearRun, "seconds", lambda run, config: seconds[config])
    made = LinearRun.__init__
    monkeypatch.setattr(LinearRun, "__init__", lambda run, problem, where: made(run, problem, where, 1))
    return seconds


def chosen(cache, problem=SMALL):
    return LinearChoice(cache)(problem, torch.device("cuda"))


def test_the_fastest_is_kept_and_taken_where_it_beats_the_plain_way(cache, measured, device):
    assert chosen(cache) is None
    assert tune_linear(SMALL, cache, device) == (1.0, 1.5)
    assert chosen(cache) == CONFIGS[1]
    assert chosen(cache, replace(SMALL, rows=8)) == CONFIGS[1]
    assert chosen(cache, replace(SMALL, rows=9)) is None
    assert LinearChoice(cache)(SMALL, torch.device("cpu")) is None


def test_the_plain_way_is_taken_where_it_is_faster(cache, measured, device):
    measured[None] = 0.5
    tune_linear(SMALL, cache, device)
    assert chosen(cache) is None
    assert linear_tuning.known_config(SMALL, cache, "Some GPU") == (CONFIGS[1], False)


def test_what_answers_wrongly_or_not_the_same_twice_is_never_chosen(cache, measured, monkeypatch, device):
    right = LinearRun.product
    calls = iter(range(100))

    def product(run, weight, config):
        result = right(run, weight, config)
        if config == CONFIGS[1]:
            result[0, 0] += 1.0
        if config == CONFIGS[2]:
            result[0, 0] += 1e-6 * next(calls)
        return result

    monkeypatch.setattr(LinearRun, "product", product)
    assert tune_linear(SMALL, cache, device) == (3.0, 1.5)
    monkeypatch.setattr(LinearRun, "product", lambda run, weight, config: run.out.fill_(torch.nan))
    with pytest.raises(RuntimeError, match="no candidate computes"):
        tune_linear(SMALL, cache, device)


def test_each_bucket_is_looked_up_once(cache, measured, device):
    choice = LinearChoice(cache)
    assert choice(SMALL, torch.device("cuda")) is None
    tune_linear(SMALL, cache, device)
    assert choice(SMALL, torch.device("cuda")) is None
    assert chosen(cache) == CONFIGS[1]


@pytest.mark.parametrize("fusion", Fusion)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_our_way_and_the_plain_way_compute_the_same(fusion, dtype, device):
    problem = LinearProblem(3, 24, 64, dtype, fusion)
    run = LinearRun(problem, device, 1)
    assert run.weights[0].shape == ((48, 64) if fusion is Fusion.GATE else (24, 64))
    want = run.exact()
    assert run.is_right(None, want) and run.is_right(CONFIGS[1], want)
    run.weights[0] = run.weights[0] * 1.1
    assert not run.is_right(CONFIGS[1], want)


def test_float16_is_not_scaled_before_it_is_normed(cache, device):
    half = replace(SMALL, dtype=torch.float16)
    assert not linear_tuning.can_take(half)
    assert linear_tuning.can_take(replace(half, fusion=Fusion.ADD))
    with pytest.raises(ValueError, match="takes"):
        tune_linear(half, cache, device)
    assert not linear_tuning.can_take(replace(SMALL, rows=65))


@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize("name", model_problems(1, **LLAMA_8B, dtype=torch.bfloat16))
def test_candidates_are_many_and_fill_a_chip_whose_memory_they_fit(name, rows):
    problem = model_problems(rows, **LLAMA_8B, dtype=torch.bfloat16)[name]
    candidates = linear_candidates(problem, H200)
    assert len(candidates) == len(set(candidates)) >= 16
    matrices = 2 if problem.fusion is Fusion.GATE else 1
    for config in candidates:
        stage = (matrices * config.block_n + tile_rows(rows)) * config.block_k * 2
        assert config.num_stages * stage <= H200.shared_bytes
        tiles = -(-problem.outputs // config.block_n)
        # Once over the chip or, where a tile each is more than that, not cut at all.
        assert config.split == 1 or tiles * config.split <= 4 * H200.processors
    fullest = max(-(-problem.outputs // config.block_n) * config.split for config in candidates)
    assert fullest >= 0.9 * H200.processors


def test_launches_begin_early_only_where_the_card_can():
    problem = model_problems(8, **LLAMA_8B, dtype=torch.bfloat16)["Q"]
    assert {config.early for config in linear_candidates(problem, H200)} == {0, 1}
    assert {config.early for config in linear_candidates(problem, replace(H200, capability=8))} == {0}


def test_the_bucket_names_what_a_configuration_depends_on():
    changes = {"rows": 9, "outputs": 25, "inner": 63, "dtype": torch.bfloat16, "fusion": Fusion.ADD}
    others = {replace(SMALL, **{name: value}).bucket for name, value in changes.items()}
    assert len(others | {SMALL.bucket}) == 6
    assert replace(SMALL, rows=8).bucket == SMALL.bucket


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_tuning_keeps_a_configuration_that_runs(cache):
    problem = LinearProblem(8, 256, 512, torch.bfloat16, Fusion.NORM)
    tune_linear(problem, cache, "cuda")
    assert linear_tuning.known_config(problem, cache, torch.cuda.get_device_name()) is not None
