"""Metadata of a GGUF model: its tokenizer and chat template, among others. In parts, the first has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flume_common.gguf import GgufError, read_fields
from flume_common.gguf_parts import MissingParts, part_paths

__all__ = ["GgufError", "read_metadata"]


def read_metadata(path: Path) -> dict[str, Any]:
    """Every metadata key: numbers, booleans, strings and lists of them. Raises GgufError, OSError."""
    try:
        first = part_paths(path)[0]
    except MissingParts as error:
        raise GgufError(path, str(error)) from error
    return read_fields(first)
