"""A tokenizer out of GGUF metadata: `tokenizer.ggml.*`, as llama.cpp writes it.

Two families: `gpt2`, byte-level BPE whose text is first cut by the rules that `pre` names
(`pre_tokenizers.py`), and `llama`, SentencePiece BPE with byte fallback, whose merges follow from the
scores. Ids are those of the models' own tokenizer.json. Normal tokens of a byte-level vocabulary are
spelled in GPT-2's table of bytes; control and user-defined ones are written as the text they stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import structlog
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from flume_router.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from flume_router.tokenizer import TokenizerError, character_of_byte

log = structlog.get_logger(__name__)

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ALPHABET = frozenset(character_of_byte().values())


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
    _add_written_tokens(backend, metadata)
    named = special_tokens(metadata)
    backend.post_processor = ends_template(
        backend,
        bos=named.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None,
        eos=named.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None,
    )
    return backend


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those the file names. Raises TokenizerError."""
    tokens = _required(metadata, "tokenizer.ggml.tokens")
    ids = {name: _named_ids(metadata, (key,)) for name, key in _SPECIAL_TOKENS.items()}
    return {name: tokens[found[0]] for name, found in ids.items() if found}


def ends_template(backend: Tokenizer, *, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    """A post-processor that puts `bos` before and `eos` after a text, where given."""
    ends = [token for token in (bos, eos) if token is not None]
    single = " ".join([*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])])
    ids = [(token, backend.token_to_id(token)) for token in ends]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids)


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    rules = _pre_tokenizer(metadata)
    merges = [tuple(merge.split(" ")) for merge in _required(metadata, "tokenizer.ggml.merges")]
    backend = Tokenizer(
        models.BPE(
            vocab=_byte_level_vocab(tokens, written_tokens(metadata)),
            merges=merges,
            ignore_merges=rules.ignore_merges,
        )
    )
    rules.apply_to(backend)
    backend.decoder = decoders.ByteLevel()
    return backend, rules.add_bos


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    kind = metadata.get("tokenizer.ggml.pre")
    if kind is None:
        log.warning("pre_tokenizer_unnamed", used="default", detail="tokenizer.ggml.pre is missing")
        kind = "default"
    if kind not in PRE_TOKENIZERS:
        raise TokenizerError(f"tokenizer.ggml.pre {kind!r} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    return PRE_TOKENIZERS[kind]


def _byte_level_vocab(tokens: list[str], written: Mapping[int, str]) -> dict[str, int]:
    """Every id has an entry. A written token that reads like a spelled one gives way to it."""
    vocab = {_in_byte_alphabet(token): i for i, token in enumerate(tokens) if i not in written}
    for token_id, token in written.items():
        vocab[f"{token}\0{token_id}" if token in vocab else token] = token_id
    return vocab


def _in_byte_alphabet(token: str) -> str:
    """Spell like the others a normal token that is written plainly, as some files have it."""
    if set(token) <= _ALPHABET:
        return token
    table = character_of_byte()
    return "".join(table[byte] for byte in token.encode("utf-8"))


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.get(f"tokenizer.ggml.{key}"):
            raise TokenizerError(f"tokenizer.ggml.{key} of a llama tokenizer is not supported")
    scores = _required(metadata, "tokenizer.ggml.scores")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of_scores(_pieces(metadata, vocab), scores),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # As in Llama 2's tokenizer.json: text at the start, or after an added token, gets a space.
    spaces = normalizers.Replace(" ", "▁")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _pieces(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, int]:
    """Tokens that merges may lead to: never to control tokens or bytes, whatever their halves."""
    types = _types(metadata)
    return {t: i for t, i in vocab.items() if i >= len(types) or types[i] in (_NORMAL, _USER_DEFINED)}


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


def written_tokens(metadata: Mapping[str, Any]) -> dict[int, str]:
    """Control and user-defined tokens by id: they are matched and shown as they are written."""
    tokens, types = _required(metadata, "tokenizer.ggml.tokens"), _types(metadata)
    marked = {i for i, kind in enumerate(types[: len(tokens)]) if kind in (_CONTROL, _USER_DEFINED)}
    return {token_id: tokens[token_id] for token_id in sorted(marked | _special_ids(metadata))}


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """End of text, of a turn and of a message to a tool, those the file names."""
    return tuple(_named_ids(metadata, ("eos_token_id", "eot_token_id", "eom_token_id")))


def _special_ids(metadata: Mapping[str, Any]) -> set[int]:
    types, tokens = _types(metadata), _required(metadata, "tokenizer.ggml.tokens")
    control = {i for i, kind in enumerate(types[: len(tokens)]) if kind == _CONTROL}
    fillers = _named_ids(metadata, ("unknown_token_id", "padding_token_id"))
    return (
        control
        | set(_named_ids(metadata, ("bos_token_id",)))
        | set(end_token_ids(metadata))
        # Some files name an ordinary word here.
        | {i for i in fillers if i >= len(types) or types[i] != _NORMAL}
    )


def _named_ids(metadata: Mapping[str, Any], keys: Iterable[str]) -> list[int]:
    """Raises TokenizerError for an id that has no token."""
    ids = {key: metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata}
    num_tokens = len(_required(metadata, "tokenizer.ggml.tokens"))
    for key, token_id in ids.items():
        if not 0 <= token_id < num_tokens:
            raise TokenizerError(
                f"tokenizer.ggml.{key} is {token_id}, outside the {num_tokens} tokens of the file"
            )
    return list(ids.values())


def _types(metadata: Mapping[str, Any]) -> list[int]:
    return list(metadata.get("tokenizer.ggml.token_type", ()))


def _add_written_tokens(backend: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Control tokens are special, user-defined ones only kept whole; both are found in text."""
    special = _special_ids(metadata)
    for token_id, token in written_tokens(metadata).items():
        if not token or backend.token_to_id(token) != token_id:
            continue  # another token is written alike, and is the one that text is read as
        if token_id in special:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        else:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise TokenizerError(f"the GGUF file has no {key}")
    return metadata[key]


def chat_template(metadata: Mapping[str, Any]) -> str | None:
    """The unnamed one, else the only named one."""
    key = "tokenizer.chat_template"
    named = {name: text for name, text in metadata.items() if name.startswith(f"{key}.")}
    template = metadata.get(key)
    if template is None and len(named) == 1:
        template = next(iter(named.values()))
    return template if isinstance(template, str) else None
