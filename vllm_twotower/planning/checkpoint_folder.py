"""A checkpoint folder, read without loading it: ``config.json`` and the headers of its safetensors files.

A safetensors file begins with eight bytes, the little-endian length of a JSON header that names every tensor with its
dtype, shape and byte range (safetensors' format description). Only that is read, so 126 GB of shards take a second.
"""

import json
import math
import os
import pathlib
import struct
from dataclasses import dataclass
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100 << 20
"""The format's own limit; a longer one means that the file is something else."""

LFS_POINTER = b"version "
"""What stands where a header should be when ``git clone`` fetched pointers and not files."""

BYTES_OF_DTYPE = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Safetensors' names of the dtypes."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a header describes it."""

    dtype: str
    """Safetensors' name: ``BF16``, ``F32``, ..."""
    shape: tuple[int, ...]
    num_bytes: int
    """Bytes it takes in its file."""


@dataclass(frozen=True)
class CheckpointFolder:
    """What a folder holds, or a ``config.json`` alone."""

    config_file: pathlib.Path
    """Where the config was read."""
    config: dict[str, Any]
    """Its content."""
    tensors: dict[str, StoredTensor] | None
    """Every tensor of every shard by name; None where there are no shards."""
    missing_shards: tuple[str, ...]
    """Files that the index names and the folder has not."""

    @classmethod
    def read(cls, path: str | pathlib.Path) -> "CheckpointFolder":
        """Read a folder, or a ``config.json`` alone.

        Raises:
            ValueError: nothing there, or a file that is not what its name says; the message says what to do.

        """
        file = config_file_of(pathlib.Path(path))
        config = _read_json(file)
        tensors, missing = _read_shards(file.parent) if pathlib.Path(path).is_dir() else (None, ())
        return cls(file, config, tensors, missing)


def config_file_of(path: pathlib.Path) -> pathlib.Path:
    """The ``config.json`` that ``path`` names, directly or as its folder."""
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise ValueError(f"{path} has no config.json: name the folder that holds config.json and the shards")
        return file
    if path.is_file():
        return path
    advice = "name a checkpoint folder or a config.json on this machine"
    if len(path.parts) == 2 and not path.is_absolute():
        advice += f"; if {path} is a name on the hub, download it first: hf download {path} --local-dir DIR"
    raise ValueError(f"{path} does not exist: {advice}")


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))  # takes the bare Infinity some copies carry
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{file} is not JSON ({problem}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object: download it again")
    return content


def _read_shards(folder: pathlib.Path) -> tuple[dict[str, StoredTensor] | None, tuple[str, ...]]:
    """The tensors of the shards that are there, and the names of those that are not."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: download it again")
        files = sorted({str(name) for name in weight_map.values()})
    else:
        files = [SINGLE_FILE]
    present = [name for name in files if (folder / name).is_file()]
    missing = tuple(name for name in files if name not in present) if index.is_file() else ()
    if not present:
        return None, missing
    tensors: dict[str, StoredTensor] = {}
    for name in present:
        for tensor, stored in read_header(folder / name).items():
            if tensor in tensors:
                raise ValueError(f"{folder / name} holds {tensor}, and so does an earlier shard: remove the wrong file")
            tensors[tensor] = stored
    return tensors, missing


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor that a safetensors file describes.

    Raises:
        ValueError: the file is a git-lfs pointer, cut short, or no safetensors file at all.

    """
    size = os.path.getsize(file)
    with open(file, "rb") as f:
        start = f.read(HEADER_LENGTH_BYTES)
        if start == LFS_POINTER:
            raise ValueError(f"{file} is a git-lfs pointer, not weights: run git lfs pull in its folder")
        length = struct.unpack("<Q", start)[0] if len(start) == HEADER_LENGTH_BYTES else size
        if length > min(MAX_HEADER_BYTES, size - HEADER_LENGTH_BYTES):
            raise ValueError(f"{file} is not a whole safetensors file ({size:,} bytes): download it again")
        try:
            header = json.loads(f.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{file} has no readable safetensors header: download it again") from None
    tensors = {name: _stored(file, name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = HEADER_LENGTH_BYTES + length + sum(t.num_bytes for t in tensors.values())
    if end != size:
        raise ValueError(f"{file} is {size:,} bytes long, its header describes {end:,}: download it again")
    return tensors


def _stored(file: pathlib.Path, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        first, last = entry["data_offsets"]
        consistent = last - first == math.prod(shape) * BYTES_OF_DTYPE[dtype]
    except (KeyError, TypeError, ValueError):
        consistent = False
    if not consistent:
        raise ValueError(f"{file}: the header's entry of {name} makes no sense ({entry!r:.120}): download it again")
    return StoredTensor(dtype, shape, last - first)
