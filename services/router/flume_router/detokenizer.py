"""Token ids into text, one at a time: every piece is final, and their sum is the whole decode.

A character's bytes may be spread over several tokens; they are kept back until it is complete. Bytes that
can become no character turn into U+FFFD as soon as that is certain, as `str(…, errors="replace")` does.
"""

from __future__ import annotations

import codecs

from flume_router.tokenizer import Tokenizer


class Detokenizer:
    """Of one sequence's answer. Control tokens add nothing, unless they are not to be skipped."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often one word, sometimes nothing."""
        if self.hides(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def hides(self, token_id: int) -> bool:
        """True for a token whose text is not part of the answer's."""
        return self._skip_special_tokens and self._tokenizer.is_special(token_id)

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that never got complete."""
        return self._decoder.decode(b"", final=True)
