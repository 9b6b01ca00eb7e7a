"""GGUF models in parts: read as one, whatever part is given; parts of different models are refused."""

import shutil

import pytest

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402
from flume_weight.model import LocalAttention, load_model  # noqa: E402
from flume_weight.model.errors import DamagedFile, MissingFile  # noqa: E402
from gguf_models import write  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def theirs(save_random):
    return save_random(LlamaConfig(**SIZES))[1]


@pytest.fixture
def parts(theirs, tmp_path):
    write(tmp_path / "m.gguf", theirs, parts_of=5)
    found = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in found] == [f"m-{n:05}-of-00005.gguf" for n in range(1, 6)]
    return found


def logits(ours):
    ids, attention = torch.arange(40), LocalAttention(2)
    attention.next_pass([("s", 40)])
    return ours.forward(ids, torch.arange(40), attention, torch.arange(40))


def refused(path, error, *words):
    with pytest.raises(error) as caught:
        load_model(path, torch.float32)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize("given", range(5))
def test_any_part_given_the_model_is_the_same(given, parts, theirs):
    seen = []
    ours = load_model(parts[given], torch.float32, lambda done, total: seen.append((done, total)))
    with torch.inference_mode():
        torch.testing.assert_close(
            logits(ours), theirs(torch.arange(40)[None]).logits[0], atol=2e-5, rtol=2e-5
        )
    total = 4 * sum(value.numel() for value in theirs.state_dict().values())
    assert seen[-1] == (total, total)  # progress is of all parts


@pytest.mark.parametrize("lost", range(5))
def test_a_missing_part_is_named(lost, parts):
    parts[lost].unlink()
    refused(parts[lost - 1], MissingFile, str(parts[lost]), "one part of a model")


def test_exchanged_parts_are_refused(parts):
    shutil.copy(parts[1], parts[0].parent / "keep")
    shutil.move(parts[2], parts[1])
    shutil.move(parts[0].parent / "keep", parts[2])
    refused(parts[0], DamagedFile, parts[1].name, "split.no is 2", "split.no 1", "exchanged")


def test_a_part_of_another_number_of_parts_is_refused(parts, theirs, tmp_path):
    write(tmp_path / "other.gguf", theirs, parts_of=7)
    shutil.copy(tmp_path / "other-00002-of-00003.gguf", parts[1])
    refused(parts[0], DamagedFile, parts[1].name, "split.count is 3", "part 2 of 5")


def test_a_part_of_another_model_is_refused(parts, save_random, tmp_path):
    larger = save_random(LlamaConfig(**SIZES | {"num_hidden_layers": 3}))[1]
    write(tmp_path / "other.gguf", larger, parts_of=6)
    assert (tmp_path / "other-00002-of-00005.gguf").exists()
    shutil.copy(tmp_path / "other-00002-of-00005.gguf", parts[1])
    refused(parts[0], DamagedFile, "already")


def test_a_part_with_other_tensors_is_refused(parts, theirs, tmp_path):
    extra = {"blk.2.attn_norm.weight": np.ones(32, np.float32)}
    write(tmp_path / "other.gguf", theirs, parts_of=5, tensors=extra)
    shutil.copy(tmp_path / "other-00005-of-00005.gguf", parts[4])
    refused(parts[0], DamagedFile, "split.tensors.count is 21", "22 tensors", "not of one model")


def test_a_renamed_part_says_how_parts_are_named(parts, tmp_path):
    shutil.copy(parts[1], tmp_path / "second.gguf")
    refused(tmp_path / "second.gguf", DamagedFile, "split.count is 5", "NAME-00001-of-00003.gguf")


def test_a_whole_file_that_is_named_as_a_part_is_refused(theirs, tmp_path):
    for number in (1, 2):
        write(tmp_path / f"w-0000{number}-of-00002.gguf", theirs)
    refused(tmp_path / "w-00001-of-00002.gguf", DamagedFile, "split.count is absent", "part 1 of 2")


def test_a_truncated_part_is_named(parts):
    parts[3].write_bytes(parts[3].read_bytes()[:-40])
    refused(parts[0], DamagedFile, parts[3].name, "truncated")
