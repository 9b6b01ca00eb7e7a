"""Added words come out as they are written, though their letters be in GPT-2's table of bytes."""

import pytest
from flume_common.model_source import resolve_model
from flume_router.detokenizer import Detokenizer
from flume_router.text_model import load_text_model
from published_tokenizers import BYTE_LEVEL, train
from tokenizers import AddedToken, pre_tokenizers

WORDS = [
    "größe",
    "đem",
    "čaj",
    "naïveté",
    "Ġ",
    "ĠÿĀ",
    "œuvre",
    "日本",
    "two words",
    "ß",
    "é",
    "ã",
    "Ã©",
    "Ĭ",
    "\u00ad",
    "\u00a0x",
    "<|ö|>",
]


@pytest.fixture(scope="module")
def trained():
    return train("smollm", BYTE_LEVEL["smollm"])


def _gguf(trained, path, words, kind=4):
    tokens, types = [*trained.tokens, *words], [*trained.types, *[kind] * len(words)]
    made = type(trained)(trained.kind, trained.backend, tokens, types, trained.merges)
    return load_text_model(resolve_model(str(made.gguf(path)))).tokenizer


def _directory(trained, path, words):
    backend = trained.backend.from_str(trained.backend.to_str())
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    made = type(trained)(trained.kind, backend, [], [])
    return load_text_model(resolve_model(str(made.directory(path)))).tokenizer


def _streamed(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_a_gguf_file_is_shown_as_it_is_written(trained, tmp_path, word):
    tokenizer = _gguf(trained, tmp_path / "x.gguf", [word])
    own = len(trained.tokens)
    assert tokenizer.token_bytes(own).decode() == word
    assert _streamed(tokenizer, [own]) == tokenizer.decode([own]) == word
    ids = tokenizer.encode_now(f"a {word}b", add_special_tokens=False)
    assert _streamed(tokenizer, ids) == tokenizer.decode(ids) == f"a {word}b"


@pytest.mark.parametrize("word", ["größe", "đem", "čaj", "naïveté", "œuvre", "日本", "two words"])
def test_a_word_of_a_directory_is_one_token_and_shown_as_it_is_written(trained, tmp_path, word):
    for tokenizer in (
        _directory(trained, tmp_path / "hf", [word]),
        _gguf(trained, tmp_path / "x.gguf", [word]),
    ):
        ids = tokenizer.encode_now(f"a{word}b", add_special_tokens=False)
        assert len(ids) == 3
        assert _streamed(tokenizer, ids) == tokenizer.decode(ids) == f"a{word}b"


@pytest.mark.parametrize("word", WORDS)
def test_other_text_is_what_it_was(trained, tmp_path, word):
    """A word that is written like the spelling of a byte takes nothing away from that byte."""
    text = "日本語 ひらがな é naïve ß ÿ \u00ad größen 🙂"
    for tokenizer in (
        _gguf(trained, tmp_path / "x.gguf", [word]),
        _directory(trained, tmp_path / "hf", [word] if word not in ("é", "ß", "ã", "Ĭ", "Ã©") else []),
    ):
        ids = tokenizer.encode_now(text, add_special_tokens=False)
        assert _streamed(tokenizer, ids) == text


def test_a_byte_that_a_directory_adds_as_a_word_stays_a_byte(trained, tmp_path):
    """The library gives such a word the id of the byte, so one of both must lose: Japanese stays whole."""
    tokenizer = _directory(trained, tmp_path / "hf", ["ã"])
    ids = tokenizer.encode_now("ひ", add_special_tokens=False)
    assert tokenizer.decode(ids) == "ひ"


def test_control_tokens_with_letters_outside_ascii_are_control_tokens(trained, tmp_path):
    tokenizer = _gguf(trained, tmp_path / "x.gguf", ["<｜User｜>", "<|größe|>"], kind=3)
    for word in ("<｜User｜>", "<|größe|>"):
        [token_id] = tokenizer.encode_now(word, add_special_tokens=False)
        assert tokenizer.is_special(token_id)
        assert tokenizer.token_bytes(token_id).decode() == word


def test_every_byte_of_the_table_is_known(trained, tmp_path):
    tokenizer = _gguf(trained, tmp_path / "x.gguf", list(pre_tokenizers.ByteLevel.alphabet()))
    spelled = {tokenizer.token_bytes(i) for i in range(256)}
    assert spelled == {bytes([byte]) for byte in range(256)}
