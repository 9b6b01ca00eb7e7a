"""The tensors of a Hugging Face directory: one safetensors file, or several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flume_weight.model.errors import DamagedFile, MissingFile, UnsupportedDtype
from flume_weight.model.fields import Fields
from flume_weight.model.huggingface import read_json
from flume_weight.model.source import Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsSource:
    """The checkpoint of one directory. Opening it checks that every file of it is whole.

    Raises MissingFile or DamagedFile.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._dtypes: dict[str, str] = {}
        self.tensors: Mapping[str, Stored] = self._find(directory)

    def read(self, name: str, out: Tensor) -> None:
        stored = self.tensors[name]
        dtype = self._dtypes[name]
        if dtype not in ITEM_BYTES:
            raise UnsupportedDtype(stored.path, name, dtype, ", ".join(ITEM_BYTES))
        # Opened anew for each tensor: a file kept open stays mapped, and fills memory as it is read.
        with _open(stored.path) as file:
            out.copy_(file.get_tensor(name))

    def _find(self, directory: Path) -> dict[str, Stored]:
        if (directory / SINGLE).is_file():
            return self._list(directory / SINGLE)
        if (directory / INDEX).is_file():
            return self._list_shards(directory, directory / INDEX)
        others = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
        found = f"found {', '.join(others)}" if others else "found no other weights either"
        raise MissingFile(directory / SINGLE, f"nor {INDEX}; weights are read from safetensors only, {found}")

    def _list_shards(self, directory: Path, index: Path) -> dict[str, Stored]:
        names = read_json(index, "it lists the shards").sub("weight_map")
        if names is None:
            raise DamagedFile(index, "has no weight_map")
        shards = {name: directory / _shard(names, name) for name in names}
        found: dict[str, Stored] = {}
        for shard in sorted(set(shards.values())):
            if not shard.is_file():
                raise MissingFile(shard, f"{index.name} lists it")
            found |= self._list(shard)
        for name, shard in shards.items():
            if name not in found or found[name].path != shard:
                raise DamagedFile(index, f"says that {shard.name} has tensor {name}, which it has not")
        return found

    def _list(self, path: Path) -> dict[str, Stored]:
        found = {}
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                self._dtypes[name] = dtype
                found[name] = Stored(path, name, shape, math.prod(shape) * ITEM_BYTES.get(dtype, 1))
        return found


def _shard(names: Fields, tensor: str) -> str:
    shard = names.text(tensor)
    if Path(shard).name != shard:
        raise names.bad(tensor, "the name of a file in the same directory")
    return shard


def _open(path: Path) -> Any:  # the bindings have no types
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        found = path.stat().st_size
        raise DamagedFile(path, f"{error} (the file has {found} bytes{_promise(path)})") from error


def _promise(path: Path) -> str:
    """What the header of a damaged file says about the file's size, as far as it can be read."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, 100_000_000)))
        last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ", its header cannot be read"
    return f", its header says {8 + header_bytes + last}"
