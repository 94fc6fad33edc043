"""``vllm-twotower quantize``: a BF16 checkpoint written again with its linear layers and experts in eight bits.

Shard by shard, so that memory holds one quantised shard and one matrix. What is written is what compressed-tensors
calls ``FP8_DYNAMIC`` or ``W8A8``: a scale for each row of a matrix, inputs quantised as they come, so nothing has to be
calibrated. Heads, embeddings, routers, norms, convolutions and time conditioning stay as they are.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_twotower.models.stored_quantization import MODULES_LEFT
from vllm_twotower.models.tensor_shapes import MATRIX_END, checkpoint_tensors, list_names
from vllm_twotower.planning.checkpoint_folder import INDEX_FILE, CheckpointFolder
from vllm_twotower.planning.model_facts import ModelFacts

PRESETS = {"fp8": ("FP8_DYNAMIC", "float-quantized"), "int8": ("W8A8", "int-quantized")}
"""By ``--scheme``: compressed-tensors' names of the scheme and of the format it is stored in."""

LEFT = (*MODULES_LEFT, "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1")
"""Linear layers that stay as they are: heads and time conditioning. Routers are no linear layers to NVIDIA's code."""

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Ends of files that may hold the weights once more."""


@dataclass(frozen=True)
class Written:
    """What ``quantize_checkpoint`` has written."""

    num_matrices: int
    """Matrices that were quantised."""
    bytes_before: int
    """Of all shards."""
    bytes_after: int


def quantize_checkpoint(
    source: pathlib.Path, target: pathlib.Path, scheme: str = "fp8", report: Callable[[str], None] = print
) -> Written:
    """Write a quantised copy of a checkpoint folder.

    Args:
        source: the folder, with all of its shards.
        target: a folder that does not exist or is empty.
        scheme: ``fp8`` or ``int8``.
        report: is told of each shard that is written.

    Raises:
        ValueError: the source is incomplete, not a two-tower model or quantised already, a matrix is not finite, or the
            target is not empty.

    """
    if scheme not in PRESETS:
        raise ValueError(f"--scheme {scheme} is not allowed: use {' or '.join(PRESETS)}")
    folder = _read_source(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not an empty folder: name one that does not exist")
    target.mkdir(parents=True, exist_ok=True)
    preset, layout = PRESETS[scheme]
    how = preset_name_to_scheme(preset, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(layout)
    num_matrices, before, after = 0, 0, 0
    weight_map: dict[str, str] = {}
    for number, file in enumerate(folder.shards, 1):
        written: dict[str, torch.Tensor] = {}
        with safe_open(source / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - no mapping
                tensor = shard.get_tensor(name)
                before += tensor.nbytes
                if not name.endswith(MATRIX_END):
                    written[name] = tensor
                    continue
                num_matrices += 1
                module = name.removesuffix("weight")
                parts = _quantize_matrix(name, tensor, how, compressor)
                written |= {module + last: part for last, part in parts.items()}
        after += sum(tensor.nbytes for tensor in written.values())
        weight_map |= dict.fromkeys(written, file)
        save_file(written, target / file, metadata={"format": "pt"})
        shutil.copymode(source / file, target / file)
        report(f"{file}: {number} of {len(folder.shards)}, {before / 1e9:.2f} GB read, {after / 1e9:.2f} GB written")
    if (source / INDEX_FILE).is_file():
        _write_json(target / INDEX_FILE, {"metadata": {"total_size": after}, "weight_map": weight_map})
    for other in sorted(path for path in source.iterdir() if path.is_file()):
        if other.name not in (INDEX_FILE, "config.json") and not other.name.endswith(NOT_COPIED):
            shutil.copyfile(other, target / other.name)
    # last: without it the folder is no checkpoint, so one that was interrupted is not taken for whole
    quantization = QuantizationConfig(
        config_groups={"group_0": how}, format=layout, ignore=list(LEFT), quantization_status="compressed"
    )
    _write_json(target / "config.json", folder.config | {"quantization_config": quantization.model_dump(mode="json")})
    return Written(num_matrices, before, after)


def _read_source(source: pathlib.Path) -> CheckpointFolder:
    """The folder, if all of it is there and as released."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: name the one that holds config.json and the shards")
    folder = CheckpointFolder.read(source)
    facts = ModelFacts.from_config(folder.config, str(folder.config_file))
    if facts.quantization_config is not None:
        raise ValueError(f"{folder.config_file} has a quantization_config: quantise the BF16 checkpoint it came from")
    expected = checkpoint_tensors(facts)
    folder.check_tensors(expected)
    if folder.tensors is None:
        raise ValueError(f"{source} has no weights: {list_names(folder.shards)} is not there")
    for name in folder.tensors:
        if name not in expected:
            raise ValueError(f"{source} has a tensor {name}, which is not part of the model: is it this config's?")
    return folder


def _quantize_matrix(
    name: str, matrix_NK: torch.Tensor, how: QuantizationScheme, compressor: type[BaseCompressor]
) -> dict[str, torch.Tensor]:
    """A matrix in eight bits: ``weight`` [N, K] and ``weight_scale``, float32 [N, 1]."""
    low_N1, high_N1 = matrix_NK.float().aminmax(dim=1, keepdim=True)
    if not (low_N1.isfinite().all() and high_N1.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinite weights: download its shard again")
    scale_N1, _ = calculate_qparams(low_N1, high_N1, how.weights)
    return compressor.compress({"weight": matrix_NK.float(), "weight_scale": scale_N1}, how)


def _write_json(file: pathlib.Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
