"""A GGUF model in parts: NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split names them.

The parts are found by name, beside each other. Metadata is in the first; tensors are in all of them.

* MissingParts    a part that the name speaks of is not there
"""

from __future__ import annotations

import re
from pathlib import Path

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class MissingParts(Exception):
    """Some parts of a model are not beside the others."""

    def __init__(self, path: Path, missing: list[Path]) -> None:
        names = ", ".join(part.name for part in missing)
        super().__init__(f"its name says that it is one part of a model; missing in {path.parent}: {names}")
        self.path = path
        self.missing = missing


def part_paths(path: Path) -> tuple[Path, ...]:
    """All parts of the model that `path` is a part of, in order; `path` alone where its name names none.

    Raises MissingParts.
    """
    match = _PART.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or not 1 <= int(match["number"]) <= count:
        return (path,)
    paths = [path.with_name(f"{match['name']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [part for part in paths if not part.is_file()]
    if missing:
        raise MissingParts(path, missing)
    return tuple(paths)


def whole_name(path: Path) -> str:
    """The file's name without `.gguf`, and without the number of a part."""
    match = _PART.fullmatch(path.name)
    return match["name"] if match else path.stem
