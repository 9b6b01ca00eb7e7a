"""The fewest tokens that a text can have, from its length: a text too long for any context is refused
before it is tokenised.

Every token stands for at most so many bytes, so a text of B bytes has at least B / that many tokens. This
holds only where each byte ends in some token. Bytes that the vocabulary lacks are left out of the count, as
is white space where a token swallows the white space beside it; for a tokenizer that may drop or shrink
text in a way not known here there is no floor (it is 0), and its texts are tokenised to be counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import tokenizers
from tokenizers import models

_NFC_SHRINKS = 4
"""Composing characters makes UTF-8 shorter by a factor of at most 3 (three Hangul letters into one)."""

_KEEPS_TEXT = frozenset({"ByteLevel", "Metaspace", "Digits", "UnicodeScripts"})
_KEEPS_UNLESS_REMOVED = frozenset({"Split", "Punctuation"})
_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


class TokenFloor(msgspec.Struct, frozen=True):
    """How bytes of text and tokens relate in one vocabulary."""

    bytes_per_token: int
    """At most so many bytes of text in one token; 0: there is no bound."""
    dropped: bytes = b""
    """Byte values that make no token."""
    counts_space: bool = True
    """False: a token may swallow any amount of white space."""

    def of(self, text: str) -> int:
        """The fewest tokens that `text` can have."""
        if not self.bytes_per_token:
            return 0
        if not self.counts_space:
            text = "".join(text.split())
        data = text.encode("utf-8", "surrogatepass")
        if self.dropped:
            data = data.translate(None, self.dropped)
        return -(-len(data) // self.bytes_per_token)


NO_FLOOR = TokenFloor(0)


def token_floor(
    backend: tokenizers.Tokenizer, spell: Callable[[int], bytes], byte_of_character: Mapping[str, int] | None
) -> TokenFloor:
    """The floor of a tokenizer.

    `spell`: the bytes a token id stands for. `byte_of_character`: how a byte-level vocabulary writes each
    byte; None for one that writes text as it is.
    """
    shrinks = _normalizer_shrinks(_described(backend.normalizer))
    if not shrinks or not _keeps_text(_described(backend.pre_tokenizer)):
        return NO_FLOOR
    dropped = _dropped(backend, byte_of_character)
    if dropped is None:
        return NO_FLOOR
    swallows = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    longest = _longest(backend.get_vocab(with_added_tokens=True), spell)
    return TokenFloor(longest * shrinks, dropped, not swallows)


def _described(part: Any) -> Mapping[str, Any] | None:
    """A normalizer or pre-tokenizer as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__())


def _dropped(backend: tokenizers.Tokenizer, byte_of_character: Mapping[str, int] | None) -> bytes | None:
    """Byte values without a token; None where text may vanish in other ways, or become one unknown token."""
    vocab = backend.get_vocab(with_added_tokens=False)
    if byte_of_character is not None and isinstance(backend.model, models.BPE):
        return bytes(byte for character, byte in byte_of_character.items() if character not in vocab)
    falls_back = getattr(backend.model, "byte_fallback", False)
    return b"" if falls_back and all(token in vocab for token in _BYTE_TOKENS) else None


def _normalizer_shrinks(normalizer: Mapping[str, Any] | None) -> int:
    """The factor by which it can shorten a text; 0: unknown."""
    match normalizer:
        case None | {"type": "Prepend"}:
            return 1
        case {"type": "NFC"}:
            return _NFC_SHRINKS
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return 1 if len(new.encode()) >= len(old.encode()) else 0
        case {"type": "Sequence", "normalizers": list(parts)}:
            factor = 1
            for part in parts:
                factor *= _normalizer_shrinks(part)
            return factor
        case _:
            return 0


def _keeps_text(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """True if it only cuts."""
    if pre_tokenizer is None or pre_tokenizer["type"] in _KEEPS_TEXT:
        return True
    if pre_tokenizer["type"] in _KEEPS_UNLESS_REMOVED:
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] == "Sequence" and all(map(_keeps_text, pre_tokenizer["pretokenizers"]))


def _longest(vocab: Mapping[str, int], spell: Callable[[int], bytes]) -> int:
    """Bytes of the longest token. Those whose written form is longest are looked at first, as no token
    stands for more bytes than it is written with."""
    written = sorted(((len(token.encode()), token_id) for token, token_id in vocab.items()), reverse=True)
    return _longest_of(written, spell)


def _longest_of(written: Iterable[tuple[int, int]], spell: Callable[[int], bytes]) -> int:
    longest = 1
    for written_bytes, token_id in written:
        if written_bytes <= longest:
            break
        longest = max(longest, len(spell(token_id)))
    return longest
