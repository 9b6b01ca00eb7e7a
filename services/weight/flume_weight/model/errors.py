"""What can be wrong with a model file. Every error names the file and what was expected and found.

* ModelError
  + UnknownArchitecture   a model family, or a task, that the forward pass does not compute
  + UnsupportedFeature    a known family with a setting that is not computed: named, never approximated
  + BadConfig             a field is missing, has the wrong type, or disagrees with another one
  + MissingFile           a file that must be there is not
  + DamagedFile           a file that is truncated or is not what its name says
  + MissingTensor         the config asks for a tensor that no file has
  + UnexpectedTensor      a file has a tensor that the config leaves no place for
  + TensorShape           a tensor's shape disagrees with the config
  + UnsupportedDtype      a tensor is stored in a type, or a quantisation, that cannot be converted
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class ModelError(Exception):
    """Base of every refusal to load a model."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class UnknownArchitecture(ModelError):
    """The model belongs to a family (or is built for a task) that is not implemented."""

    def __init__(self, path: Path, field: str, found: object, known: Sequence[str]) -> None:
        super().__init__(path, f"{field} is {found!r}; known are {', '.join(known)}")
        self.field = field
        self.found = found
        self.known = tuple(known)


class UnsupportedFeature(ModelError):
    """A field asks for something that the forward pass does not compute."""

    def __init__(self, path: Path, field: str, found: object, supported: str) -> None:
        super().__init__(path, f"{field} = {found!r} is not supported; supported: {supported}")
        self.field = field
        self.found = found
        self.supported = supported


class BadConfig(ModelError):
    """A field is missing or makes no sense."""

    def __init__(self, path: Path, field: str, expected: str, found: object) -> None:
        super().__init__(path, f"field {field}: expected {expected}, found {found!r}")
        self.field = field
        self.expected = expected
        self.found = found


class MissingFile(ModelError):
    """A file that must be there is not."""

    def __init__(self, path: Path, wanted_by: str) -> None:
        super().__init__(path, f"no such file; {wanted_by}")
        self.wanted_by = wanted_by


class DamagedFile(ModelError):
    """A file ends too early, or its bytes are not what its name promises."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason


class MissingTensor(ModelError):
    """The config asks for a tensor that is not there."""

    def __init__(self, path: Path, tensor: str, shape: Sequence[int]) -> None:
        super().__init__(path, f"tensor {tensor} of shape {list(shape)} is missing")
        self.tensor = tensor
        self.shape = tuple(shape)


class UnexpectedTensor(ModelError):
    """A tensor for which this architecture and config have no place."""

    def __init__(self, path: Path, tensor: str, shape: Sequence[int], architecture: str) -> None:
        super().__init__(
            path, f"tensor {tensor} of shape {list(shape)} has no place in this {architecture} model"
        )
        self.tensor = tensor
        self.shape = tuple(shape)


class TensorShape(ModelError):
    """A tensor's shape disagrees with the config."""

    def __init__(self, path: Path, tensor: str, expected: Sequence[int], found: Sequence[int]) -> None:
        super().__init__(path, f"tensor {tensor}: the config says {list(expected)}, found {list(found)}")
        self.tensor = tensor
        self.expected = tuple(expected)
        self.found = tuple(found)


class UnsupportedDtype(ModelError):
    """A tensor's storage type cannot be converted."""

    def __init__(self, path: Path, tensor: str, found: str, supported: str) -> None:
        super().__init__(path, f"tensor {tensor} is stored as {found}; supported: {supported}")
        self.tensor = tensor
        self.found = found
        self.supported = supported
