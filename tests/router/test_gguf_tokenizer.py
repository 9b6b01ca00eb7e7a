"""Tokenizers of the other families, trained here on a few lines, written as GGUF, read back by both."""

import json

import gguf
import hypothesis.strategies as st
import pytest
from flume_common.model_source import ModelSource, resolve_model
from flume_router.gguf_metadata import GgufError, read_metadata
from flume_router.gguf_tokenizer import CUTS, build, merges_of_scores
from flume_router.text_model import load_text_model
from flume_router.tokenizer import TokenizerError
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and they're 12345 dogs in 2024.",
    "Hello world! hello World!! HELLO  world…  don't, can't, I'LL; we've 3.14159",
    "def f(x):\n    return x ** 2\n\n\tdone\r\n",
    "Привет мир, 日本語 テキスト, naïve café 🙂🙂",
] * 5
SPECIAL = ["<s>", "</s>", "<unk>", "<|start|>"]
TEXTS = st.lists(
    st.sampled_from(
        ["zzzz", "hello", "Hello", " World", " ", "  ", "\n", "\n\n", "\t", "1", "234", "12345", "é",
         "日本語", "🙂", "мир", "<|start|>", "</s>", "<think>", "'LL", "can't", "...", "!!", "x/y",
         "camelCase", "ÉCOLE", "a\u0301"]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
).map("".join)  # fmt: skip


def trained_byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[*SPECIAL, "<think>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def write(path, *, model, pre=None, tokens, types, merges=None, scores=None, flags=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    for name, value in (flags or {}).items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def byte_level_gguf(tmp_path_factory):
    trained = json.loads(trained_byte_level().to_str())["model"]
    tokens = [token for token, _ in sorted(trained["vocab"].items(), key=lambda item: item[1])]
    types = [3 if token in SPECIAL else 4 if token == "<think>" else 1 for token in tokens]
    tokens, types = [*tokens, "zzzz"], [*types, 1]  # a word that no merges lead to
    merges = [" ".join(pair) for pair in trained["merges"]]

    def make(pre, **flags):
        path = tmp_path_factory.mktemp("gguf") / f"{pre}.gguf"
        return write(path, model="gpt2", pre=pre, tokens=tokens, types=types, merges=merges, flags=flags)

    return make


@pytest.fixture(scope="session")
def sentencepiece_gguf(tmp_path_factory):
    """As SentencePiece BPE has it: control tokens, bytes, then pieces whose score is minus their rank."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    pieces = ["".join(pair) for pair in trained["merges"]]
    letters = [token for token in trained["vocab"] if token not in pieces]
    control = ["<s>", "</s>", "<unk>", "<|start|>", "<think>"]
    tokens = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(pieces), *letters]
    types = [3, 3, 2, 3, 4, *[6] * 256, *[1] * (len(tokens) - 261)]
    scores = [0.0] * 261 + [-float(rank) for rank in range(len(tokens) - 261)]

    def make(name, **flags):
        path = tmp_path_factory.mktemp("gguf") / f"{name}.gguf"
        return write(path, model="llama", tokens=tokens, types=types, scores=scores, flags=flags)

    return make


def both(path):
    from transformers import AutoTokenizer

    ours = load_text_model(resolve_model(str(path))).tokenizer
    return ours, AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


_pairs = {}


def pair(key, make):
    if key not in _pairs:
        _pairs[key] = both(make())
    return _pairs[key]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "qwen2", "deepseek-r1-qwen"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_byte_level_ids_are_those_of_transformers(byte_level_gguf, pre, text):
    ours, theirs = pair(pre, lambda: byte_level_gguf(pre))
    assert ours.encode_now(text, add_special_tokens=True) == theirs(text)["input_ids"]


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_llama3_and_tekken_differ_from_transformers_only_by_whole_words(byte_level_gguf, pre, text):
    """Theirs forgets `ignore_merges`, which the models' own tokenizer.json has; set there, all is alike."""
    ours, theirs = pair(pre, lambda: byte_level_gguf(pre, add_bos_token=True))
    theirs.backend_tokenizer.model.ignore_merges = True
    assert ours.encode_now(text, add_special_tokens=True) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    "pre, whole", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)]
)
def test_a_word_that_no_merges_lead_to_is_whole_only_where_words_are_looked_up_first(
    byte_level_gguf, pre, whole
):
    tokenizer = load_text_model(resolve_model(str(byte_level_gguf(pre)))).tokenizer
    ids = tokenizer.encode_now("zzzz", add_special_tokens=False)
    assert (len(ids) == 1) == whole


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_sentencepiece_ids_are_those_of_transformers(sentencepiece_gguf, flags, text):
    ours, theirs = pair(str(flags), lambda: sentencepiece_gguf("spm", **flags))
    ids = ours.encode_now(text, add_special_tokens=True)
    assert ids == theirs(text)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_sentencepiece_texts_come_back_byte_by_byte(sentencepiece_gguf, text):
    ours, _ = pair("{}", lambda: sentencepiece_gguf("spm"))
    ids = ours.encode_now(text, add_special_tokens=False)
    spelled = b"".join(map(ours.token_bytes, ids)).decode()
    assert spelled.removeprefix(" ") == text.replace("▁", " ").removeprefix(" ")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_a_saved_directory_of_a_sentencepiece_model_gives_the_same_ids(
    sentencepiece_gguf, tmp_path_factory, text
):
    def saved():
        _, theirs = pair("{}", lambda: sentencepiece_gguf("spm"))
        directory = tmp_path_factory.mktemp("spm")
        theirs.save_pretrained(directory)
        (directory / "config.json").write_text('{"model_type": "llama"}')
        return directory

    if "directory" not in _pairs:
        _pairs["directory"] = load_text_model(resolve_model(str(saved()))).tokenizer
    _, theirs = pair("{}", lambda: sentencepiece_gguf("spm"))
    assert _pairs["directory"].encode_now(text, add_special_tokens=True) == theirs(text)["input_ids"]


def test_a_space_is_put_first_unless_the_file_says_otherwise(sentencepiece_gguf):
    ours, _ = pair("{}", lambda: sentencepiece_gguf("spm"))
    never, _ = pair("never", lambda: sentencepiece_gguf("spm", add_space_prefix=False))
    assert ours.token_bytes(ours.encode_now("hello", add_special_tokens=False)[0]).startswith(b" ")
    assert never.token_bytes(never.encode_now("hello", add_special_tokens=False)[0]).startswith(b"h")


@pytest.mark.parametrize(
    "pre, bos", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-2", False)]
)
def test_where_the_file_does_not_say_bos_follows_the_family(byte_level_gguf, pre, bos):
    tokenizer = load_text_model(resolve_model(str(byte_level_gguf(pre)))).tokenizer
    assert (tokenizer.encode_now("hello", add_special_tokens=True)[0] == 0) == bos
    assert tokenizer.encode_now("hello", add_special_tokens=False)[0] != 0


def test_an_unknown_cut_is_refused_by_name(byte_level_gguf):
    with pytest.raises(TokenizerError, match="'chatglm-bpe' is not supported; default, gpt-2"):
        load_text_model(resolve_model(str(byte_level_gguf("chatglm-bpe"))))
    assert "chatglm-bpe" not in CUTS


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
            "bos_token is 1, outside the 1 tokens",
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
