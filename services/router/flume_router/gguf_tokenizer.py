"""A tokenizer out of GGUF metadata: `tokenizer.ggml.*`, as llama.cpp writes it.

Two families: `gpt2`, byte-level BPE whose text is first cut by a regular expression named in `pre`, and
`llama`, SentencePiece BPE with byte fallback, whose merges follow from the scores. Ids are those of
`transformers` for the same file. Two consequences: `smollm` cuts as GPT-2 does (the original splits
digits off too, which differs only in a run of spaces before a digit); Llama 3 and Tekken look whole
words up first (`ignore_merges`), as their own tokenizer.json says though a GGUF does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from flume_router.tokenizer import TokenizerError, character_of_byte

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ALPHABET = frozenset(character_of_byte().values())
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Cut(msgspec.Struct, frozen=True):
    """How one value of `tokenizer.ggml.pre` cuts text, and what else its models share."""

    regex: str | None = None  # None: GPT-2's own
    whole_words: bool = False
    add_bos: bool = False  # where the file does not say


_GPT2_CUT = Cut()
_LLAMA3_CUT = Cut(_LLAMA3, whole_words=True, add_bos=True)
CUTS: Mapping[str, Cut] = {
    "default": _GPT2_CUT,
    "gpt-2": _GPT2_CUT,
    "smollm": _GPT2_CUT,
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "qwen2": Cut(_QWEN2),
    "deepseek-r1-qwen": Cut(_QWEN2),
    "tekken": Cut(_TEKKEN, whole_words=True, add_bos=True),
}


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises TokenizerError naming the metadata key that is missing or not supported."""
    model = _required(metadata, "tokenizer.ggml.model")
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
    elif model == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens), True
    else:
        raise TokenizerError(f"tokenizer.ggml.model {model!r} is not supported; gpt2 and llama are")
    _add_marked_tokens(
        backend, tokens, metadata.get("tokenizer.ggml.token_type", ()), byte_level=model == "gpt2"
    )
    named = special_tokens(metadata)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in named.values()])
    backend.post_processor = ends_template(
        backend,
        bos=named.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos=named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return backend


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those the file names."""
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKENS.items()}
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise TokenizerError(f"{name} is {token_id}, outside the {len(tokens)} tokens of the file")
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def ends_template(backend: Tokenizer, *, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    """A post-processor that puts `bos` before and `eos` after a text, where given."""
    ends = [token for token in (bos, eos) if token is not None]
    single = " ".join([*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])])
    ids = [(token, backend.token_to_id(token)) for token in ends]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    cut = CUTS.get(pre)
    if cut is None:
        raise TokenizerError(f"tokenizer.ggml.pre {pre!r} is not supported; {', '.join(CUTS)} are")
    merges = [tuple(merge.split(" ")) for merge in _required(metadata, "tokenizer.ggml.merges")]
    vocab = {_in_byte_alphabet(token): token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole_words))
    backend.pre_tokenizer = _cutter(cut)
    backend.decoder = decoders.ByteLevel()
    return backend, cut.add_bos


def _cutter(cut: Cut) -> pre_tokenizers.PreTokenizer:
    if cut.regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut.regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _in_byte_alphabet(token: str) -> str:
    """Tokens written plainly (some added ones are) are spelled like the others."""
    if set(token) <= _ALPHABET:
        return token
    table = character_of_byte()
    return "".join(table[byte] for byte in token.encode("utf-8"))


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    scores = _required(metadata, "tokenizer.ggml.scores")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges_of_scores(vocab, scores), fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def merges_of_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges a scored vocabulary implies: every way to make a token of two, best score first.

    Among equal scores the longer left part, then the longer right part comes first, as in `transformers`.
    """
    found = [
        (scores[token_id], left, right)
        for token, token_id in vocab.items()
        for left, right in sorted(_halves(token, vocab), key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _halves(token: str, vocab: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    for at in range(1, len(token)):
        left, right = token[:at], token[at:]
        if left in vocab and right in vocab:
            yield left, right


def _add_marked_tokens(backend: Tokenizer, tokens: list[str], types: list[int], *, byte_level: bool) -> None:
    """Control tokens are special, user-defined ones only kept whole; both are found in text."""
    marked = list(zip(tokens, types, strict=False))
    # A control token outside the byte alphabet is a mislabelled one: it is in no such vocabulary as written.
    control = [t for t, kind in marked if kind == _CONTROL and not (byte_level and set(t) - _ALPHABET)]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    own = [t for t, kind in marked if kind == _USER_DEFINED and backend.token_to_id(t) is not None]
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in own])


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise TokenizerError(f"the GGUF file has no {key}")
    return metadata[key]
