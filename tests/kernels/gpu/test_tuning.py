"""Results on disk: found again under the same key only, never lost to a broken file, default where
unknown."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from flume_kernels.gpu import decode_tuning
from flume_kernels.gpu.decode_attention import DecodeConfig, default_config
from flume_kernels.gpu.decode_tuning import DecodeProblem, decode_candidates
from flume_kernels.gpu.kv_pool import FP8
from flume_kernels.gpu.tuning import Key, TuningCache, choose, kernel_hash

KEY = Key("Some GPU", "3.7.1", "0123456789abcdef", "decode d128")
PROBLEM = DecodeProblem(32, 8, 128, 16, torch.bfloat16)


@pytest.fixture
def cache(tmp_path):
    return TuningCache(tmp_path / "deep" / "tuning.json", tmp_path / "shipped.json")


def test_a_result_is_found_again_by_another_process(cache):
    config = DecodeConfig(16, 128, 8, 5, 1)
    cache.put(KEY, asdict(config), 1e-4)
    assert DecodeConfig(**TuningCache(cache._path, cache._shipped).get(KEY)) == config


@pytest.mark.parametrize("field", ["gpu", "triton_version", "kernel_hash", "bucket"])
def test_a_result_holds_for_its_own_key_only(cache, field):
    cache.put(KEY, {}, 1.0)
    assert cache.get(replace(KEY, **{field: "other"})) is None


def test_results_of_other_keys_stay(cache):
    cache.put(KEY, {"num_warps": 1}, 1.0)
    cache.put(replace(KEY, bucket="other"), {"num_warps": 2}, 1.0)
    assert cache.get(KEY) == {"num_warps": 1}


def test_own_results_come_before_shipped_ones(cache):
    cache._shipped.write_text(json.dumps({KEY.text: {"config": {"num_warps": 8}, "seconds": 1.0}}))
    assert cache.get(KEY) == {"num_warps": 8}
    cache.put(KEY, {"num_warps": 4}, 1.0)
    assert cache.get(KEY) == {"num_warps": 4}


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_broken_file_counts_as_empty_and_is_replaced(cache, text):
    cache._path.parent.mkdir()
    cache._path.write_text(text)
    assert cache.get(KEY) is None
    cache.put(KEY, {"num_warps": 4}, 1.0)
    assert cache.get(KEY) == {"num_warps": 4}
    assert list(cache._path.parent.iterdir()) == [cache._path]


def test_the_hash_follows_the_source_of_each_kernel():
    kernels = decode_tuning.DECODE_KERNELS
    assert kernel_hash(kernels) == kernel_hash(kernels)
    assert len({kernel_hash([kernel]) for kernel in kernels}) == len(kernels)
    assert kernel_hash(kernels[:-1]) != kernel_hash(kernels)


def test_the_fastest_candidate_is_chosen_and_those_that_do_not_run_are_passed_over():
    seconds = {
        DecodeConfig(num_stages=2): 3.0,
        DecodeConfig(num_stages=3): 1.0,
        DecodeConfig(num_stages=4): 2.0,
    }

    def measure(config):
        if config not in seconds:
            raise torch.cuda.OutOfMemoryError
        return seconds[config]

    assert choose([DecodeConfig(num_stages=9), *seconds], measure) == (DecodeConfig(num_stages=3), 1.0)
    with pytest.raises(RuntimeError, match="no candidate"):
        choose([DecodeConfig(num_stages=9)], measure)


def test_the_bucket_names_what_a_configuration_depends_on():
    assert PROBLEM.bucket == replace(PROBLEM, rows=3, length=5).bucket
    others = {"head_dim": 64, "block_tokens": 32, "kv_dtype": FP8, "queries": 64}
    assert len({PROBLEM.bucket, *(replace(PROBLEM, **{k: v}).bucket for k, v in others.items())}) == 5


@pytest.mark.parametrize("problem", [PROBLEM, replace(PROBLEM, queries=64), replace(PROBLEM, head_dim=256)])
def test_candidates_are_many_differ_and_fit(problem):
    candidates = decode_candidates(problem, 227 << 10)
    assert len(candidates) == len(set(candidates)) > 10
    for config in candidates:
        assert (config.tile_rows > 16) == (problem.queries > 1)
        stage = 2 * config.tile_keys * problem.head_dim * problem.kv_dtype.itemsize
        assert config.programs_per_sm * (config.num_stages - 1) * stage <= 227 << 10


def test_what_is_not_known_runs_with_the_default(cache, monkeypatch):
    class Properties:
        shared_memory_per_multiprocessor = 227 << 10
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    config = decode_tuning.decode_config(PROBLEM, cache, "cuda")
    assert config == default_config(128, 2, 4, 1, 227 << 10)
    assert decode_tuning.decode_slots(config, "cuda") == 132 * config.programs_per_sm
    known = DecodeConfig(16, 128, 8, 3, 1)
    cache.put(decode_tuning.decode_key(PROBLEM, "Some GPU"), asdict(known), 1e-4)
    assert decode_tuning.decode_config(PROBLEM, cache, "cuda") == known


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_tuning_keeps_a_configuration_that_runs(cache):
    problem = replace(PROBLEM, rows=2, length=1024)
    chosen = decode_tuning.tune_decode([problem], cache, "cuda")
    assert decode_tuning.decode_config(problem, cache, "cuda") == chosen
