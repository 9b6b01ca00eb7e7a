"""Text to token ids and token ids to bytes, for the model that is served.

A thin face over `tokenizers`; where it comes from is in `gguf_tokenizer.py` and `hf_tokenizer.py`.
Decoding here is by bytes: each token id stands for a fixed byte string, whatever its neighbours, which
is what makes incremental decoding exact (`detokenizer.py`). Not kept from `tokenizers`' decoders: the
dropping of one leading space in SentencePiece vocabularies, as our text continues a prompt.

* TokenizerError     the tokenizer files are missing, broken or of a kind we do not know
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any

import tokenizers

from flume_router.control_tokens import ControlTokens, ShieldedText
from flume_router.plain_backend import PlainBackend
from flume_router.token_floor import token_floor

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(Exception):
    """The tokenizer cannot be built; the message names the file or field."""


class Spelling(Enum):
    """How a vocabulary writes bytes."""

    BYTE_LEVEL = "byte level"  # every byte is one printable character (GPT-2's table)
    SENTENCEPIECE = "sentencepiece"  # "▁" is a space, <0xAB> a byte, all else is itself


def written_tokens(backend: tokenizers.Tokenizer, spelling: Spelling) -> dict[int, str]:
    """Added tokens by id: text is matched against them as they are written, so that is what they stand for.

    Not the few in GPT-2's table of bytes that merges lead to as well: they are spelled like the others.
    """
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    if spelling is Spelling.SENTENCEPIECE:
        return added
    doubtful = {
        i for i, token in added.items() if not token.isascii() and set(token) <= set(byte_of_character())
    }
    if not doubtful & set(backend.get_vocab(with_added_tokens=False).values()):
        return added
    spelled = _merged(backend)
    return {i: token for i, token in added.items() if i not in doubtful or token not in spelled}


def _merged(backend: tokenizers.Tokenizer) -> set[str]:
    """Tokens of one byte, and those that merges make."""
    merges = json.loads(backend.to_str())["model"].get("merges", ())
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return {"".join(pair) for pair in pairs} | set(byte_of_character())


class Tokenizer:
    """Encodes prompts and spells tokens. Safe to share between tasks."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        written: Mapping[int, str] | None = None,
        end_token_ids: Iterable[int] = (),
    ) -> None:
        """`special_tokens`: bos_token, eos_token, unk_token, pad_token, those the model has.

        `written`: tokens that stand for the text they are written as, beside the backend's added ones.
        `end_token_ids`: of a turn, beside `eos_token`.
        """
        self._backend = backend
        self._spelling = spelling_of(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._special = frozenset(special)
        self._special_texts = frozenset(special.values())
        self.control = ControlTokens(self._special_texts)
        self._bytes = {
            token_id: token.encode("utf-8")
            for token_id, token in {**written_tokens(backend, self._spelling), **(written or {})}.items()
        }
        self._plain: PlainBackend | None = None
        self._plain_lock = threading.Lock()
        self.special_tokens = special_tokens
        eos = self.special_token_id("eos_token")
        self.end_token_ids = tuple(dict.fromkeys([*([] if eos is None else [eos]), *end_token_ids]))
        """Tokens that end an answer, as far as the tokenizer's files say."""
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        byte_level = self._spelling is Spelling.BYTE_LEVEL
        self.floor = token_floor(backend, self.token_bytes, byte_of_character() if byte_level else None)

    def encode_now(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens`: BOS and EOS as the model's tokenizer is set; off for rendered chats."""
        # The batch form, as it is the one that lets go of the interpreter while it works.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def encode_shielded(self, text: ShieldedText) -> list[int]:
        """As `encode_now` without ends; only the parts that are control tokens are read as such."""
        with self._plain_lock:
            if self._plain is None:
                self._plain = PlainBackend(self._backend)
        return self._plain.encode(text)

    def special_token_id(self, name: str) -> int | None:
        """The id of bos_token and so on; None where the model has none."""
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def document_start(self) -> list[int]:
        """What an empty text is continued from: BOS, or the end of the document before. Empty: neither."""
        starts = (self.special_token_id(name) for name in ("bos_token", "eos_token"))
        return [token for token in starts if token is not None][:1]

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of the control tokens."""
        return self._special_texts

    def is_special(self, token_id: int) -> bool:
        """Control tokens, which are not part of any answer's text."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for; empty for an id that has no token (a padded vocabulary)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text, without control tokens unless told otherwise; bytes that are no UTF-8 become U+FFFD."""
        kept = (self.token_bytes(i) for i in token_ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(kept).decode("utf-8", "replace")

    def _spell(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._spelling is Spelling.BYTE_LEVEL:
            return _spell_byte_level(token)
        return _spell_sentencepiece(token)


def _spell_byte_level(token: str) -> bytes:
    table = byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8")  # written plainly


def _spell_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte:
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode("utf-8")


def spelling_of(decoder: dict[str, Any] | None) -> Spelling:
    """From a tokenizer.json's `decoder`. Raises TokenizerError for one we cannot spell by bytes."""
    kinds = _decoder_kinds(decoder)
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL
    if "Metaspace" in kinds or {"Replace", "ByteFallback"} <= set(kinds):
        return Spelling.SENTENCEPIECE
    raise TokenizerError(
        f"decoder {'+'.join(kinds) or 'none'} is not supported; byte-level and SentencePiece BPE are"
    )


def _decoder_kinds(decoder: dict[str, Any] | None) -> Sequence[str]:
    if decoder is None:
        return ()
    if decoder["type"] == "Sequence":
        return [part["type"] for part in decoder["decoders"]]
    return [decoder["type"]]


@cache
def character_of_byte() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 bytes are themselves, the other 68 follow from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def byte_of_character() -> dict[str, int]:
    """The table above, backwards."""
    return {character: byte for byte, character in character_of_byte().items()}
