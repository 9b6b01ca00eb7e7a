"""Tokenizers out of GGUF metadata: what a file says, what it lacks, and the reader of its header."""

import pytest
from flume_common.model_source import ModelSource, resolve_model
from flume_router.gguf_metadata import GgufError, read_metadata
from flume_router.gguf_tokenizer import build, end_token_ids, merges_of_scores
from flume_router.text_model import load_text_model
from flume_router.tokenizer import TokenizerError
from published_tokenizers import BYTE_LEVEL, train, write_gguf


@pytest.fixture(scope="session")
def byte_level_gguf(tmp_path_factory):
    def make(pre, **flags):
        return train(pre, BYTE_LEVEL[pre]).gguf(tmp_path_factory.mktemp("gguf") / f"{pre}.gguf", **flags)

    return make


@pytest.mark.parametrize(
    "pre, bos", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)]
)
def test_where_the_file_does_not_say_bos_follows_the_family(byte_level_gguf, pre, bos):
    tokenizer = load_text_model(resolve_model(str(byte_level_gguf(pre)))).tokenizer
    bos_id = tokenizer.encode_now("<s>", add_special_tokens=False)[0]
    assert (tokenizer.encode_now("hello", add_special_tokens=True)[0] == bos_id) == bos
    assert tokenizer.encode_now("hello", add_special_tokens=False)[0] != bos_id


@pytest.mark.parametrize("flag, at", [("add_bos_token", 0), ("add_eos_token", -1)])
def test_a_file_may_say_which_ends_are_added(byte_level_gguf, flag, at):
    tokenizer = load_text_model(resolve_model(str(byte_level_gguf("gpt-2", **{flag: True})))).tokenizer
    ids = tokenizer.encode_now("hello", add_special_tokens=True)
    assert tokenizer.token_bytes(ids[at]) == (b"<s>", b"</s>")[at]


def test_all_tokens_that_end_something_are_ends(tmp_path):
    tokens = ["<s>", "</s>", "<unk>", "<|eot|>", "<|eom|>", "a"]
    ids = {"eos_token_id": 1, "eot_token_id": 3, "eom_token_id": 4}
    path = write_gguf(
        tmp_path / "x.gguf",
        model="gpt2",
        pre="gpt-2",
        tokens=tokens,
        types=[3, 3, 3, 1, 1, 1],
        merges=["a a"],
        ids=ids,
    )
    assert end_token_ids(read_metadata(path)) == (1, 3, 4)


def test_a_filler_that_is_an_ordinary_word_stays_one(tmp_path):
    path = write_gguf(
        tmp_path / "x.gguf",
        model="gpt2",
        pre="gpt-2",
        tokens=["<s>", "!"],
        types=[3, 1],
        merges=None,
        ids={"unknown_token_id": 1, "bos_token_id": 0},
    )
    metadata = {**read_metadata(path), "tokenizer.ggml.merges": []}
    assert [t.content for t in build(metadata).get_added_tokens_decoder().values() if t.special] == ["<s>"]


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "no tokenizer.ggml.model"),
        ({"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": []}, "'t5' is not supported"),
        ({"tokenizer.ggml.model": "gpt2"}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]}, "no tokenizer.ggml.scores"),
        (
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.merges": [],
                "tokenizer.ggml.bos_token_id": 1,
            },
            r"bos_token_id is 1, outside the 1 tokens",
        ),
    ],
)
def test_what_a_file_lacks_is_named(metadata, message):
    with pytest.raises(TokenizerError, match=message):
        build(metadata)


def test_merges_follow_the_scores():
    vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
    merges = merges_of_scores(vocab, [0, 0, -2, -1, -3])
    assert merges == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


def test_metadata_is_what_the_gguf_package_reads(gguf_reader):
    ours = read_metadata(resolve_model("smollm2-135m").path)
    theirs = gguf_reader.fields.items()
    assert ours == {name: field.contents() for name, field in theirs if not name.startswith("GGUF.")}


def test_a_truncated_file_says_so(tmp_path):
    whole = resolve_model("smollm2-135m").path.read_bytes()[:2_000_000]
    for size in (4, 10, 30, 100, 1000, 50_000, 1_500_000):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(GgufError, match="is it whole"):
            read_metadata(path)
        with pytest.raises(TokenizerError, match=r"cut\.gguf.*is it whole"):
            load_text_model(ModelSource(path, "gguf", "cut"))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"GGUF" + b"\x09\0\0\0" + b"\0" * 16, "version 9"),
        (b"ELF!" + b"\0" * 20, "letters GGUF"),
        (
            b"GGUF"
            + b"\x03\0\0\0"
            + b"\0" * 8
            + b"\1"
            + b"\0" * 7
            + b"\1"
            + b"\0" * 7
            + b"k"
            + b"\x63\0\0\0",
            "type 99",
        ),
        (b"", "letters GGUF"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, data, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(GgufError, match=message):
        read_metadata(path)
