"""Tells whether the files of a model's text side are still the same."""

from __future__ import annotations

from pathlib import Path

from flume_common.model_source import ModelSource

_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)


def identity(source: ModelSource) -> str:
    """Differs once a file that a tokenizer or template is loaded from was written again."""
    files = [source.path] if source.kind == "gguf" else [source.path / name for name in _TEXT_FILES]
    return " ".join(map(_stamp, files))


def _stamp(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "-"
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"
