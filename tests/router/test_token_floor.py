"""No text has fewer tokens than its floor says, whatever the tokenizer does to it."""

import unicodedata

import pytest
from flume_router.token_floor import NO_FLOOR, TokenFloor
from flume_router.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        ["aaaa", "  ", "\x04\x06", "e\u0301", "\u1100\u1161\u11a8", "K", "<x>", "\n\t", "\u3000", "🙂"]
    )
).map("".join)


def byte_level(*, without="", added=(), normalizer=None, pre_tokenizer=None):
    vocab = {character: i for i, character in enumerate(sorted(set(ALPHABET) - set(without)))}
    merges = [("a", "a"), ("aa", "aa"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return Tokenizer(backend, {})


def sentencepiece(*, byte_fallback=True):
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "aa", "▁a"]
    backend = Backend(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[("a", "a"), ("▁", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(backend, {})


KINDS = {
    "plain": byte_level(),
    "lacks bytes": byte_level(without="ĄĆ"),
    "composes": byte_level(normalizer=normalizers.NFC()),
    "swallows white space": byte_level(added=[AddedToken("<x>", lstrip=True, rstrip=True)]),
    "long added token": byte_level(added=[AddedToken("<" + "x" * 40 + ">")]),
    "sentencepiece": sentencepiece(),
}


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_no_text_has_fewer_tokens(kind, text):
    tokenizer = KINDS[kind]
    assert tokenizer.floor != NO_FLOOR
    assert tokenizer.floor.of(text) <= len(tokenizer.encode_now(text, add_special_tokens=False))


@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_nor_in_the_vocabulary_of_the_demo_model(text_model, text):
    tokenizer = text_model.tokenizer
    assert tokenizer.floor.of(text) <= len(tokenizer.encode_now(text, add_special_tokens=False))


def test_the_floor_is_what_the_longest_token_says():
    assert KINDS["plain"].floor == TokenFloor(4)
    assert KINDS["plain"].floor.of("b" * 9) == 3
    assert KINDS["lacks bytes"].floor == TokenFloor(4, b"\x04\x06")
    assert KINDS["lacks bytes"].floor.of("\x04" * 100) == 0
    assert KINDS["long added token"].floor == TokenFloor(42)
    assert KINDS["swallows white space"].floor.of(" " * 100 + "b" * 5) == 2
    assert KINDS["composes"].floor == TokenFloor(16)


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizer=normalizers.NFKC()),
        byte_level(normalizer=normalizers.Replace("aa", "a")),
        byte_level(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        byte_level(pre_tokenizer=pre_tokenizers.Whitespace()),
        byte_level(pre_tokenizer=pre_tokenizers.Split("a", "removed")),
        sentencepiece(byte_fallback=False),
    ],
)
def test_where_text_may_vanish_there_is_none(tokenizer):
    assert tokenizer.floor == NO_FLOOR
    assert tokenizer.floor.of("b" * 1000) == 0


@pytest.mark.slow
def test_composing_shortens_no_character_more_than_is_assumed():
    def ratio(text):
        return len(text.encode()) / len(unicodedata.normalize("NFC", text).encode())

    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            character = chr(code)
            assert max(ratio(character), ratio(unicodedata.normalize("NFD", character))) <= 3
