"""Ids are those of the families' published rules, from a GGUF file and from a directory alike."""

import itertools

import pytest
from flume_common.model_source import resolve_model
from flume_router.gguf_metadata import read_metadata
from flume_router.pre_tokenizers import PRE_TOKENIZERS
from flume_router.text_model import load_text_model
from flume_router.tokenizer import TokenizerError
from published_tokenizers import (
    BYTE_LEVEL,
    LOOKED_UP,
    SPECIAL,
    WORDS,
    digits_then_gpt2,
    strings,
    train,
    train_sentencepiece,
)
from tokenizers import AddedToken, Tokenizer, decoders, models

MANY = 2000


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """By kind: the published tokenizer, and ours from the directory and from the GGUF file."""
    made = {}

    def make(kind):
        if kind not in made:
            published = train_sentencepiece() if kind == "llama" else train(kind, BYTE_LEVEL[kind])
            folder = tmp_path_factory.mktemp("family")
            sources = published.directory(folder / "hf"), published.gguf(folder / "model.gguf")
            made[kind] = (published, *(load_text_model(resolve_model(str(s))).tokenizer for s in sources))
        return made[kind]

    return make


def test_every_kind_that_is_served_has_a_publication_here():
    assert set(PRE_TOKENIZERS) == set(BYTE_LEVEL)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_ids_are_those_of_the_published_rules(family, kind):
    published, by_directory, by_gguf = family(kind)
    for text in strings(MANY):
        expected = published.ids(text)
        assert by_gguf.encode_now(text, add_special_tokens=True) == expected, repr(text)
        assert by_directory.encode_now(text, add_special_tokens=True) == expected, repr(text)


def test_the_demo_model_has_the_ids_of_smollm(text_model):
    """Its own vocabulary: digits are cut off one by one, then GPT-2's rule."""
    metadata = read_metadata(resolve_model("smollm2-135m").path)
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    published = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    published.pre_tokenizer = digits_then_gpt2()
    published.decoder = decoders.ByteLevel()
    published.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:17]])
    for text in [
        *strings(MANY),
        "a list:\n\n1. one\n\n2. two",
        "    42",
        "x =  7",
        "\t\t3",
        "<|im_end|>\n 5",
    ]:
        ids = text_model.tokenizer.encode_now(text, add_special_tokens=True)
        assert ids == published.encode(text).ids, repr(text)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_texts_come_back_byte_by_byte(family, kind):
    """But for what normalizes them, and the space that SentencePiece puts first."""
    published, *ours = family(kind)
    for text in strings(200, seed=2):
        for tokenizer in ours:
            ids = tokenizer.encode_now(text, add_special_tokens=False)
            spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
            if kind == "llama":
                assert spelled.replace(" ", "") == text.replace("▁", " ").replace(" ", ""), repr(text)
            else:
                normal = published.backend.normalizer
                assert spelled == _normalized(text, normal), repr(text)


def _normalized(text, normalizer):
    """Stretches between added tokens, each by itself."""
    if normalizer is None:
        return text
    stretches = [text]
    for token in sorted([*SPECIAL, *WORDS], key=len, reverse=True):
        stretches = [
            piece
            for stretch in stretches
            for piece in (_around(stretch, token) if stretch not in (*SPECIAL, *WORDS) else [stretch])
        ]
    return "".join(s if s in (*SPECIAL, *WORDS) else normalizer.normalize_str(s) for s in stretches)


def _around(text, token):
    parts = text.split(token)
    return [piece for part in parts for piece in (part, token)][:-1]


@pytest.mark.parametrize("kind", ["llama-bpe", "tekken", "qwen2", "smollm"])
def test_whole_words_are_looked_up_only_where_the_family_does(family, kind):
    _, *ours = family(kind)
    for tokenizer in ours:
        ids = tokenizer.encode_now(LOOKED_UP, add_special_tokens=False)
        assert (len(ids) == 1) == BYTE_LEVEL[kind].ignore_merges


def test_sentencepiece_merges_the_best_pair_first_and_the_leftmost_of_equals(family):
    published, *ours = family("llama")
    for text in strings(100, seed=3):
        if "<" in text:
            continue
        expected = _sentencepiece("▁" + text.replace(" ", "▁"), published)
        for tokenizer in ours:
            assert tokenizer.encode_now(text, add_special_tokens=False) == expected, repr(text)


def _sentencepiece(text, published):
    """SentencePiece's own algorithm, step by step."""
    ids = {token: token_id for token_id, token in enumerate(published.tokens)}
    pieces = list(text)
    while True:
        pairs = [(ids.get(a + b), at) for at, (a, b) in enumerate(itertools.pairwise(pieces))]
        known = [(published.scores[i], -at) for i, at in pairs if i is not None and published.types[i] == 1]
        if not known:
            break
        at = -max(known)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
    spelled = ([p] if p in ids else [f"<0x{byte:02X}>" for byte in p.encode()] for p in pieces)
    return [ids[token] for tokens in spelled for token in tokens]


def test_a_space_comes_first_and_after_control_tokens_unless_the_file_says_otherwise(family, tmp_path):
    published, _, by_gguf = family("llama")
    path = published.gguf(tmp_path / "never.gguf", add_space_prefix=False)
    never = load_text_model(resolve_model(str(path))).tokenizer
    for tokenizer, space in ((by_gguf, b" "), (never, b"")):
        ids = tokenizer.encode_now("hello<|start|>hello", add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)) == space + b"hello<|start|>" + space + b"hello"


def test_an_unknown_kind_is_refused_by_name(family, tmp_path):
    published = train("gpt-2", BYTE_LEVEL["gpt-2"])
    published.kind = "chatglm-bpe"
    with pytest.raises(TokenizerError, match="'chatglm-bpe' is not supported; default, gpt-2"):
        load_text_model(resolve_model(str(published.gguf(tmp_path / "x.gguf"))))


def test_a_file_that_names_no_kind_is_cut_by_default_with_a_warning(tmp_path, capsys):
    published = train("default", BYTE_LEVEL["default"])
    published.kind = None
    tokenizer = load_text_model(resolve_model(str(published.gguf(tmp_path / "x.gguf")))).tokenizer
    assert tokenizer.encode_now("a  12345!?", add_special_tokens=False) == published.ids("a  12345!?")
    assert "pre_tokenizer_unnamed" in capsys.readouterr().out
