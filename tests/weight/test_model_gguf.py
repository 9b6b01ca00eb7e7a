"""GGUF files: the demo model against transformers' reading of the same file, and small random ones."""

import pytest

torch = pytest.importorskip("torch")
import gguf  # noqa: E402
import numpy as np  # noqa: E402
from flume_weight.model import LocalAttention, load_model  # noqa: E402
from flume_weight.model.errors import (  # noqa: E402
    BadConfig,
    DamagedFile,
    MissingFile,
    MissingTensor,
    TensorShape,
    UnexpectedTensor,
    UnknownArchitecture,
    UnsupportedDtype,
    UnsupportedFeature,
)
from flume_weight.model.gguf_file import open_gguf  # noqa: E402
from gguf import GGMLQuantizationType as Kind  # noqa: E402
from gguf_models import write  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config  # noqa: E402

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def prompt(length, vocab_size=160, seed=0):
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def logits(ours, token_ids):
    attention = LocalAttention(ours.config.num_layers)
    attention.next_pass([("s", len(token_ids))])
    rows = torch.arange(len(token_ids))
    return ours.forward(token_ids, rows, attention, rows)


@torch.inference_mode()
def wanted(theirs, token_ids):
    return theirs(token_ids[None]).logits[0]


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied embeddings": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, every bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, own head size": LlamaConfig(**SIZES, head_dim=24),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


@pytest.fixture(scope="module")
def llama(save_random):
    return save_random(MODELS["llama"])[1]


@pytest.mark.parametrize("model", MODELS)
def test_a_gguf_of_a_model_computes_as_the_model(model, save_random, tmp_path):
    theirs = save_random(MODELS[model])[1]
    ours, ids = load_model(write(tmp_path / "m.gguf", theirs), torch.float32), prompt(40)
    close(logits(ours, ids), wanted(theirs, ids))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q4_0], ids=lambda k: k.name)
def test_quantised_matrices_are_dequantised(kind, llama, tmp_path):
    ours = load_model(write(tmp_path / "m.gguf", llama, kind=kind), torch.float32)
    rounded = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind))
        for name, value in llama.state_dict().items()
        if value.dim() == 2
    }
    theirs = AutoModelForCausalLM.from_config(llama.config).eval()
    theirs.load_state_dict(llama.state_dict() | rounded)
    close(logits(ours, prompt(30)), wanted(theirs, prompt(30)))


def test_a_matrix_read_in_many_pieces_is_the_same(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("flume_weight.model.gguf.CHUNK_BYTES", 4 * 64 * 7)
    ours = load_model(write(tmp_path / "m.gguf", llama, kind=Kind.Q8_0), torch.float32)
    monkeypatch.undo()
    whole = load_model(tmp_path / "m.gguf", torch.float32)
    assert torch.equal(logits(ours, prompt(9)), logits(whole, prompt(9)))


def test_llama3_rope_comes_as_a_tensor_of_divisors(save_random, tmp_path):
    theirs = save_random(LlamaConfig(**SIZES, rope_parameters=LLAMA3))[1]
    plain = 1.0 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    divisors = (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == 8
    path = write(tmp_path / "m.gguf", theirs, tensors={"rope_freqs.weight": divisors})
    close(logits(load_model(path, torch.float32), prompt(90)), wanted(theirs, prompt(90)))


def test_linear_rope_scaling_is_read(save_random, tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    theirs = save_random(LlamaConfig(**SIZES, rope_parameters=linear))[1]
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ours = load_model(write(tmp_path / "m.gguf", theirs, fields=fields), torch.float32)
    close(logits(ours, prompt(90)), wanted(theirs, prompt(90)))


def test_the_end_tokens_are_those_of_text_and_of_turn(llama, tmp_path):
    assert load_model(write(tmp_path / "m.gguf", llama), torch.float32).config.eos_token_ids == (7, 9)


def test_an_end_token_that_is_none_is_none(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama, other_fields={"tokenizer.ggml.eom_token_id": 2**32 - 1})
    assert load_model(path, torch.float32).config.eos_token_ids == (7, 9)


def test_progress_counts_the_bytes_of_the_file(llama, tmp_path):
    seen = []
    load_model(
        write(tmp_path / "m.gguf", llama), torch.float32, lambda done, total: seen.append((done, total))
    )
    done = [d for d, _ in seen]
    expected = 4 * sum(value.numel() for value in llama.state_dict().values())
    assert {total for _, total in seen} == {expected}
    assert done == sorted(done)
    assert done[-1] == expected


# fmt: off
SMOLLM2_PROMPTS = {
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n":
        [1, 4093, 198, 4898, 314, 260, 6376, 4461, 47, 2, 198, 1, 520, 9531, 198],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "def fibonacci(n):\n": [1604, 3987, 46477, 24, 94, 727, 198],
    "Les élèves étudient — 東京は日本の首都です。 Здравствуйте":
        [39571, 26411, 92, 11180, 1099, 216, 19380, 413, 1010, 1841, 17097, 247, 126, 16736, 122, 7365, 124,
         23274, 115, 40993, 26453, 180, 116, 240, 180, 38466, 7365, 117, 39958, 19076, 5470, 241, 19263,
         23728, 16464, 24674, 16464, 14714, 24958, 8355, 6643],
}
# fmt: on


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    """(ours, transformers') of the same GGUF in float32."""
    folder, name = smollm2_path.parent, smollm2_path.name
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    return load_model(smollm2_path, torch.float32), theirs


@pytest.mark.parametrize("token_ids", SMOLLM2_PROMPTS.values(), ids=["chat", "plain", "code", "not ASCII"])
def test_smollm2_says_what_it_says_in_transformers(token_ids, smollm2):
    ours, theirs = smollm2
    ids = torch.tensor(token_ids)
    close(logits(ours, ids), wanted(theirs, ids), 2e-3)
    want = theirs.generate(ids[None], max_new_tokens=16, min_new_tokens=16, do_sample=False)[0, len(ids) :]
    assert greedy_answer(ours, ids, 16) == want.tolist()


def greedy_answer(ours, ids, count):
    attention, answer, start = LocalAttention(ours.config.num_layers), [], 0
    for _ in range(count):
        attention.next_pass([("s", len(ids))])
        positions = start + torch.arange(len(ids))
        start += len(ids)
        row = ours.forward(ids, positions, attention, torch.tensor([len(ids) - 1]))[0].clone()
        # min_new_tokens forbids the end token.
        row[list(ours.config.eos_token_ids)] = -torch.inf
        ids = row.argmax().view(1)
        answer.append(int(ids))
    return answer


# What is refused, and how it says so.


def refused(path, error, *words):
    with pytest.raises(error) as caught:
        load_model(path, torch.float32)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message, message
    return caught.value


@pytest.mark.parametrize(
    "fields, error, words",
    [
        (
            {"rope.scaling.type": "longrope"},
            UnsupportedFeature,
            ["llama.rope.scaling.type = 'longrope'", "yarn"],
        ),
        ({"expert_count": 8}, UnsupportedFeature, ["llama.expert_count = 8", "dense"]),
        ({"attention.value_length": 8}, UnsupportedFeature, ["llama.attention.value_length = 8", "16"]),
        ({"rope.dimension_count": 8}, UnsupportedFeature, ["llama.rope.dimension_count = 8", "16"]),
        ({"attention.sliding_window": 32}, UnsupportedFeature, ["llama.attention.sliding_window = 32", "96"]),
        ({"logit_scale": 2.0}, UnsupportedFeature, ["llama.logit_scale = 2.0"]),
        ({"context_length": None}, BadConfig, ["field llama.context_length", "found 'nothing'"]),
        ({"block_count": 0}, BadConfig, ["field llama.block_count", "at least 1", "found 0"]),
        ({"attention.head_count_kv": 3}, BadConfig, ["llama.attention.head_count_kv", "divisor", "found 3"]),
        ({"attention.key_length": 15}, BadConfig, ["llama.attention.key_length", "even", "found 15"]),
        ({"block_count": 3}, MissingTensor, ["model.layers.2.input_layernorm.weight", "[64]"]),
        ({"block_count": 1}, UnexpectedTensor, ["tensor blk.1.", "llama"]),
        ({"feed_forward_length": 100}, TensorShape, ["blk.0.ffn_gate.weight", "[100, 64]", "[96, 64]"]),
        ({"vocab_size": 161}, TensorShape, ["token_embd.weight", "[161, 64]", "[160, 64]"]),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, error, words, llama, tmp_path):
    refused(write(tmp_path / "m.gguf", llama, fields=fields), error, *words)


@pytest.mark.parametrize("architecture", ["gemma2", "smollm3", "phi3"])
def test_an_unknown_architecture_is_named(architecture, llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama, architecture=architecture)
    refused(path, UnknownArchitecture, f"'{architecture}'", "llama, qwen2, qwen3")


def test_a_missing_tensor_is_named(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama, drop=["blk.1.ffn_up.weight"])
    error = refused(path, MissingTensor, "model.layers.1.mlp.up_proj.weight", "[96, 64]")
    assert error.shape == (96, 64)


def test_a_tensor_too_many_is_named(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama, tensors={"blk.0.attn_gate.weight": np.ones((4, 4), np.float32)})
    refused(path, UnexpectedTensor, "blk.0.attn_gate.weight", "[4, 4]")


@pytest.mark.parametrize(
    "divisors, fields, error, words",
    [
        ([1.0] * 5, {}, BadConfig, ["8 numbers", "[5]"]),
        ([1.0] * 7 + [0.0], {}, BadConfig, ["positive numbers"]),
        ([1.0] * 7 + [float("nan")], {}, BadConfig, ["positive numbers"]),
        ([1.0] * 7 + [float("inf")], {}, BadConfig, ["positive numbers"]),
        ([1.0] * 8, {"rope.scaling.factor": 4.0}, UnsupportedFeature, ["LinearScaling", "no other scaling"]),
    ],
    ids=str,
)
def test_divisors_that_make_no_sense_are_refused(divisors, fields, error, words, llama, tmp_path):
    tensors = {"rope_freqs.weight": np.array(divisors, np.float32)}
    path = write(tmp_path / "m.gguf", llama, tensors=tensors, fields=fields)
    refused(path, error, "rope_freqs.weight", *words)


def test_a_quantisation_that_cannot_be_undone_is_named(llama, tmp_path):
    path = tmp_path / "m.gguf"
    integers = {"blk.0.ffn_up.weight": np.zeros((96, 64), np.int32)}
    refused(write(path, llama, tensors=integers), UnsupportedDtype, "blk.0.ffn_up.weight", "I32")


def test_a_file_that_ends_early_says_where(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama)
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (len(whole) - 1, len(whole) // 2, 3000, 200, 30, 10):
        cut.write_bytes(whole[:size])
        refused(cut, DamagedFile, "truncated", f"the file has {size}")


def test_every_cut_is_refused_as_damaged_and_nothing_else(llama, tmp_path):
    whole = write(tmp_path / "m.gguf", llama).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, 6000, 37):
        cut.write_bytes(whole[:size])
        with pytest.raises(DamagedFile):
            load_model(cut, torch.float32)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 this is a zip")
    refused(path, DamagedFile, "not a GGUF file")


def test_an_unknown_version_is_refused(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama)
    data = bytearray(path.read_bytes())
    data[4:8] = (9).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path, DamagedFile, "version 9")


def test_a_path_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "nowhere.gguf", MissingFile, "no such file")


def test_the_header_is_read_as_the_gguf_package_reads_it(llama, tmp_path):
    path = write(tmp_path / "m.gguf", llama, kind=Kind.Q4_1)
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    assert file.fields["llama.rope.freq_base"] == 10000.0
    assert file.array_lengths == {"tokenizer.ggml.tokens": 160}
    assert "tokenizer.ggml.tokens" not in file.fields
    assert len(file.tensors) == len(reader.tensors)
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert (ours.start, ours.num_bytes) == (theirs.data_offset, theirs.n_bytes)
        assert (ours.kind, list(ours.shape)) == (theirs.tensor_type, theirs.shape.tolist()[::-1])
