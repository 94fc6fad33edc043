"""``vllm-twotower inspect``: what a checkpoint is, what it needs and what it fits on, before anything is loaded.

Everything comes from ``config.json`` and the headers of the shards; the arithmetic is in ``planning/``. ``inspect``
returns plain data (``--json``), ``inspection_text.describe`` the same for a person.
"""

import itertools
import math
from collections import Counter
from typing import Any

from vllm_twotower.core import DEFAULT_CANVAS_LENGTH, MAX_CANVAS_LENGTH
from vllm_twotower.models.tensor_shapes import checkpoint_shapes, checkpoint_tensors, list_names
from vllm_twotower.planning.assumptions import WITH_OVERHEAD
from vllm_twotower.planning.checkpoint_folder import CheckpointFolder
from vllm_twotower.planning.gpus import GPUS
from vllm_twotower.planning.model_facts import ARCHITECTURE, LAYER_KINDS, ModelFacts
from vllm_twotower.planning.placement import (
    GPU_MEMORY_UTILIZATION,
    RESERVED_BYTES,
    CachePages,
    Placement,
    SplitTraffic,
    fit_towers,
)
from vllm_twotower.planning.speed import estimate_speeds, expected_passes
from vllm_twotower.planning.tower_sizes import Precision, Tower, TowerSizes, tower_of

Report = dict[str, Any]

GPU_COUNTS = (1, 2, 4)
DEFAULT_TOKENS = 4096
NUM_NAMES_SHOWN = 5


def inspect(
    path: str,
    *,
    tokens_per_request: int | None = None,
    canvas_length: int = DEFAULT_CANVAS_LENGTH,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
) -> Report:
    """Everything about a checkpoint folder or a ``config.json``, as plain data.

    Args:
        path: the folder or the file.
        tokens_per_request: prompt and output of each request; 4,096 by default, or the model's longest.
        canvas_length: S, tokens per canvas.
        gpu_memory_utilization: vLLM's option of that name.

    Raises:
        ValueError: no such folder, unreadable files, not a two-tower model, or an option out of range.

    """
    folder = CheckpointFolder.read(path)
    facts = ModelFacts.from_config(folder.config, str(folder.config_file))
    longest = facts.max_position_embeddings
    tokens = min(DEFAULT_TOKENS, longest) if tokens_per_request is None else tokens_per_request
    _check_range("--tokens-per-request", tokens, longest)
    _check_range("--canvas-length", canvas_length, MAX_CANVAS_LENGTH)
    if not 0 < gpu_memory_utilization <= 1:
        raise ValueError(
            f"--gpu-memory-utilization {gpu_memory_utilization} is not allowed: use a number above 0 and at most 1"
        )
    towers = {tower: TowerSizes.of(facts, tower) for tower in Tower}
    fits = [
        fit_towers(towers, gpu, num_gpus, placement, precision, tokens + canvas_length, gpu_memory_utilization)
        for gpu, num_gpus, placement, precision in itertools.product(
            GPUS.values(), GPU_COUNTS, Placement, _precisions(facts)
        )
        if placement is not Placement.SPLIT or num_gpus > 1
    ]
    return {
        "model": _model(folder, facts),
        "checkpoint": _checkpoint(folder, facts),
        "towers": {tower.value: _tower(sizes) for tower, sizes in towers.items()},
        "cache": _cache(facts, tokens, canvas_length),
        "split_traffic": vars(SplitTraffic.of(facts, canvas_length)),
        "assumptions": {
            "canvas_length": canvas_length,
            "gpu_memory_utilization": gpu_memory_utilization,
            "reserved_bytes": RESERVED_BYTES,
            "passes_per_canvas": expected_passes(canvas_length).mean,
            "fixed_s_per_forward": WITH_OVERHEAD.fixed_s,
        },
        "fits": [
            {**vars(one), "precision": _precisions(facts)[one.precision], "requests": one.num_requests} for one in fits
        ],
        "speeds": [
            {**one, "precision": _precisions(facts)[one["precision"]]}
            for one in estimate_speeds(towers, fits, tokens, canvas_length)
        ],
    }


def _check_range(option: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise ValueError(f"{option} {number} is not allowed: use an integer from 1 to {most}")


def _precisions(facts: ModelFacts) -> dict[Precision, str]:
    """How the weights can be held, and what the report calls it: what is quantised is so once and for all."""
    if facts.quantization_config is not None:
        return {Precision.BF16: "stored"}
    return {precision: precision.value for precision in Precision}


def _model(folder: CheckpointFolder, facts: ModelFacts) -> Report:
    given = folder.config.get("mask_token_id")
    return {
        "config": str(folder.config_file),
        "architecture": ARCHITECTURE,
        "dtype": facts.dtype,
        "layers_per_tower": len(facts.hybrid_override_pattern),
        "layer_pattern": facts.hybrid_override_pattern,
        "layers_by_kind": {name: facts.layers(kind) for kind, name in LAYER_KINDS.items() if facts.layers(kind)},
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "experts": {"routed": facts.n_routed_experts, "per_token": facts.num_experts_per_tok},
        "max_position_embeddings": facts.max_position_embeddings,
        "mask_token_id": facts.mask_token_id,
        "mask_token_id_from": "config.json" if given is not None else "the model card's default",
    }


def _checkpoint(folder: CheckpointFolder, facts: ModelFacts) -> Report:
    """Tensors by the config, and by the headers where there are shards; and whether they agree."""
    expected = checkpoint_tensors(facts)
    schemes = Counter(s.scheme for n, s in expected.items() if s.scheme and n.endswith((".weight", ".weight_packed")))
    report: Report = {
        "tensors_by_config": len(expected),
        "parameters_by_config": _sum_by_tower({n: math.prod(shape) for n, shape in checkpoint_shapes(facts).items()}),
        "quantized_matrices": dict(schemes),
        "source": "config.json",
        "agrees": None,
        "differences": [f"shard {name} is missing" for name in folder.missing_shards],
    }
    if folder.tensors is None:
        return report
    stored = folder.tensors
    report["source"] = "headers"
    report["tensors_by_headers"] = len(stored)
    report["parameters_by_headers"] = _sum_by_tower({name: math.prod(t.shape) for name, t in stored.items()})
    report["bytes_by_headers"] = _sum_by_tower({name: t.num_bytes for name, t in stored.items()})
    report["tensors_by_dtype"] = dict(Counter(t.dtype for t in stored.values()))
    absent = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    misshapen = [name for name in stored if name in expected and not expected[name].fits(stored[name].shape)]
    odd = [name for name in stored if name in expected and stored[name].dtype not in expected[name].dtypes]
    for what, names in (
        ("missing", absent),
        ("not part of the model", unknown),
        ("of another shape", misshapen),
        ("of another dtype", odd),
    ):
        if names:
            report["differences"].append(f"{len(names)} tensors {what}: {list_names(sorted(names), NUM_NAMES_SHOWN)}")
    report["agrees"] = not report["differences"]
    return report


def _sum_by_tower(counts: dict[str, int]) -> dict[str, int]:
    """Numbers by tensor, added up."""
    return {tower.value: sum(n for name, n in counts.items() if tower_of(name) is tower) for tower in Tower}


def _tower(sizes: TowerSizes) -> Report:
    return {
        "parameters": sizes.num_parameters,
        "active_parameters_per_token": sizes.active_parameters,
        "parameters_by_part": {part.value: count for part, count in sizes.parameters.items()},
        "resident_bytes": {name: sizes.resident_bytes(p) for p, name in _precisions(sizes.facts).items()},
    }


def _cache(facts: ModelFacts, tokens: int, canvas_length: int) -> Report:
    pages = CachePages.of(facts, 1)
    return {
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "mamba_bytes_per_request": facts.mamba_bytes_per_request,
        "conv_bytes_per_request": facts.layers("M") * facts.conv_bytes_per_layer,
        "ssm_bytes_per_request": facts.layers("M") * facts.ssm_bytes_per_layer,
        "vllm_block_tokens": pages.tokens_per_block,
        "tokens_per_request": tokens,
        "bytes_per_request_in_vllm_blocks": pages.bytes_per_request(tokens + canvas_length),
    }
