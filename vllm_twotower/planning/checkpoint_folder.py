"""A checkpoint folder, read without loading it: ``config.json`` and the headers of its safetensors files, so 126 GB of
shards take a second.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_twotower.models.stored_schemes import TensorSpec
from vllm_twotower.models.tensor_shapes import check_tensor, list_names

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

OLDER_QUANTIZATION_FILE = "hf_quant_config.json"
"""Where ModelOpt before 0.31 put what now is ``quantization_config``; vLLM reads it too."""

LFS_POINTER = b"version "
"""What stands where a header should be when ``git clone`` fetched pointers and not files."""

BITS_OF_DTYPE = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
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
    shards: tuple[str, ...]
    """Files with weights that there should be: those that the index names, or the one."""
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
        if config.get("quantization_config") is None and (older := file.parent / OLDER_QUANTIZATION_FILE).is_file():
            config["quantization_config"] = {"quant_method": "modelopt", **_read_json(older)}
        if not pathlib.Path(path).is_dir():
            return cls(file, config, None, (), ())
        return cls(file, config, *_read_shards(file.parent))

    def check_tensors(self, expected: Mapping[str, TensorSpec]) -> None:
        """Check that all shards are there, and of the tensors in them those that are expected.

        Raises:
            ValueError: shards are missing, or a tensor is not what it has to be; by name.

        """
        if self.missing_shards:
            folder, missing = self.config_file.parent, self.missing_shards
            raise ValueError(f"{folder} lacks {len(missing)} of the files that its index names: {list_names(missing)}")
        for name, stored in (self.tensors or {}).items():
            if name in expected:
                check_tensor(name, stored.shape, stored.dtype, expected)


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


def _read_shards(
    folder: pathlib.Path,
) -> tuple[dict[str, StoredTensor] | None, tuple[str, ...], tuple[str, ...]]:
    """The tensors of the shards that are there, the names of all shards, and of those that are not there."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: download it again")
        files = tuple(sorted({str(name) for name in weight_map.values()}))
    else:
        files = (SINGLE_FILE,)
    present = [name for name in files if (folder / name).is_file()]
    missing = tuple(name for name in files if name not in present) if index.is_file() else ()
    if not present:
        return None, files, missing
    tensors: dict[str, StoredTensor] = {}
    for name in present:
        for tensor, stored in read_header(folder / name).items():
            if tensor in tensors:
                raise ValueError(f"{folder / name} holds {tensor}, and so does an earlier shard: remove the wrong file")
            tensors[tensor] = stored
    return tensors, files, missing


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """Every tensor that a safetensors file describes.

    Raises:
        ValueError: the file is a git-lfs pointer, cut short, or no safetensors file at all.

    """
    with open(file, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a git-lfs pointer, not weights: run git lfs pull in its folder")
    try:
        with safe_open(file, framework="numpy") as stored:
            parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            return {name: _describe(part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as problem:
        size = file.stat().st_size
        raise ValueError(
            f"{file} is not a whole safetensors file ({size:,} bytes; {problem}): download it again"
        ) from None


def _describe(dtype: str, shape: list[int]) -> StoredTensor:
    return StoredTensor(dtype, tuple(shape), math.prod(shape) * BITS_OF_DTYPE[dtype] // 8)
