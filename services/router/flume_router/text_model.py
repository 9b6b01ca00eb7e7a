"""The text side of the served model: its tokenizer and its chat template, from one model source."""

from __future__ import annotations

from typing import Any

import msgspec
from flume_common.model_source import ModelSource

from flume_router import gguf_tokenizer, hf_tokenizer
from flume_router.chat_template import ChatTemplate
from flume_router.gguf_metadata import GgufError, read_metadata
from flume_router.tokenizer import Tokenizer, TokenizerError


class TextModel(msgspec.Struct, frozen=True):
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None: the model has none, and chat requests are refused."""


def load_text_model(source: ModelSource) -> TextModel:
    """Raises TokenizerError or TemplateBroken, naming the file, key or line."""
    if source.kind == "gguf":
        return _from_gguf(source)
    special = hf_tokenizer.special_tokens(source.path)
    tokenizer = Tokenizer(hf_tokenizer.build(source.path), special)
    return _text_model(tokenizer, hf_tokenizer.chat_template(source.path))


def _from_gguf(source: ModelSource) -> TextModel:
    metadata = _metadata(source)
    try:
        tokenizer = Tokenizer(
            gguf_tokenizer.build(metadata),
            gguf_tokenizer.special_tokens(metadata),
            gguf_tokenizer.written_tokens(metadata),
            gguf_tokenizer.end_token_ids(metadata),
        )
    except TokenizerError as error:
        raise TokenizerError(f"{source.path}: {error}") from error
    return _text_model(tokenizer, gguf_tokenizer.chat_template(metadata))


def _metadata(source: ModelSource) -> dict[str, Any]:
    try:
        return read_metadata(source.path)
    except (GgufError, OSError) as error:
        raise TokenizerError(str(error)) from error


def _text_model(tokenizer: Tokenizer, template: str | None) -> TextModel:
    chat = ChatTemplate(template, tokenizer.special_tokens) if template else None
    return TextModel(tokenizer, chat)
