"""A tokenizer that reads control tokens only where it is told to, and all other text as it always does."""

from __future__ import annotations

import secrets

import tokenizers
from tokenizers import AddedToken

from flume_router.control_tokens import ShieldedText


class PlainBackend:
    """A copy of a backend in which each control token goes by another name, that no client can know.

    So the library cuts and normalizes the text around control tokens as it does everywhere.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        secret = secrets.token_hex(16)
        special = {i: t for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._aliases = {token.content: f"{secret}-{token_id}-" for token_id, token in special.items()}
        self._backend.add_tokens(
            [
                AddedToken(
                    self._aliases[token.content],
                    special=False,
                    normalized=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                )
                for token in special.values()
            ]
        )
        self._meant = {
            self._backend.token_to_id(self._aliases[token.content]): token_id
            for token_id, token in special.items()
        }
        self._special = special

    def encode(self, text: ShieldedText) -> list[int]:
        """Token ids, without BOS and EOS but those that are parts of the text."""
        named = "".join(self._aliases.get(part, part) if control else part for part, control in text.parts)
        return [i for token_id in self._ids(named) for i in self._read(token_id)]

    def _read(self, token_id: int) -> list[int]:
        if token_id in self._meant:
            return [self._meant[token_id]]
        if token_id not in self._special:
            return [token_id]
        # Merges have led to a control token: take its text apart.
        text = self._special[token_id].content
        return [i for half in (text[:1], text[1:]) for i in self._ids(half) if i not in self._special]

    def _ids(self, text: str) -> list[int]:
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)
