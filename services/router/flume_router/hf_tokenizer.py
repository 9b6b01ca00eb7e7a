"""A tokenizer and chat template out of a Hugging Face model directory.

Reads `tokenizer.json` (the `tokenizers` library's own format), `tokenizer_config.json`,
`special_tokens_map.json` and `chat_template.jinja`. A bare SentencePiece `tokenizer.model` is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from flume_router.gguf_tokenizer import ends_template
from flume_router.tokenizer import TokenizerError

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def build(directory: Path) -> Tokenizer:
    """Raises TokenizerError naming the file that is missing or broken."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path} does not exist; transformers' AutoTokenizer reads older files and saves it"
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every defect
        raise TokenizerError(f"{path}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    _set_ends(backend, tokenizer_config(directory), special_tokens(directory))
    return backend


def _set_ends(backend: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """BOS and EOS as `tokenizer_config.json` says, where it says; else tokenizer.json's post-processor."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    ends = {
        name: named.get(f"{name}_token") if config.get(f"add_{name}_token") else None
        for name in ("bos", "eos")
    }
    for name, token in ends.items():
        if token is not None and backend.token_to_id(token) is None:
            raise TokenizerError(
                f"tokenizer_config.json: {name}_token {token!r} is not in the vocabulary of tokenizer.json"
            )
    backend.post_processor = ends_template(backend, **ends)


def special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token, those the directory names."""
    places = (tokenizer_config(directory), _json(directory / "special_tokens_map.json"))
    contents = {name: next(filter(None, (_content(p.get(name)) for p in places)), None) for name in _NAMES}
    return {name: content for name, content in contents.items() if content is not None}


def _content(token: Any) -> str | None:
    """A token is written as a string or as an object with its `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def chat_template(directory: Path) -> str | None:
    """`chat_template.jinja`, else `chat_template` of tokenizer_config.json or chat_template.json.

    A text, or several named ones: of those `default`, or the only one. Raises TokenizerError where that
    does not tell which.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = tokenizer_config(directory).get("chat_template")
    if template is None:
        template = _json(directory / "chat_template.json").get("chat_template")
    return _of_several(directory, template) if isinstance(template, list) else _content(template)


def _of_several(directory: Path, templates: list[Any]) -> str | None:
    try:
        named = {str(entry["name"]): _content(entry["template"]) for entry in templates}
    except (TypeError, KeyError) as error:
        raise TokenizerError(
            f"{directory}: chat_template is a list of other things than name and template"
        ) from error
    if "default" in named or len(named) < 2:
        return named.get("default", next(iter(named.values()), None))
    raise TokenizerError(
        f"{directory}: none of its chat templates ({', '.join(named)}) is called default; "
        "keep the one to use as chat_template.jinja"
    )


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """Empty when the directory has none."""
    return _json(directory / "tokenizer_config.json")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: {error}") from error
    except RecursionError:
        raise TokenizerError(f"{path}: is JSON that is nested too deeply") from None
