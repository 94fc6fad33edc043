"""``vllm-twotower inspect``: what a checkpoint is, what it needs and what it could give, before anything is loaded.

Everything comes from ``config.json`` and the headers of the shards; the arithmetic is in ``planning/``. ``inspect``
returns plain data (``--json``), ``inspection_text.describe`` the same for a person.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_twotower.config import MAX_CANVAS_LENGTH
from vllm_twotower.models.tensor_shapes import checkpoint_shapes, list_names
from vllm_twotower.planning.canvas_passes import MEAN_PASSES, CanvasPasses
from vllm_twotower.planning.checkpoint_folder import CheckpointFolder
from vllm_twotower.planning.gpus import GPUS, Assumptions
from vllm_twotower.planning.model_facts import ARCHITECTURE, LAYER_KINDS, ModelFacts
from vllm_twotower.planning.placement import CachePages, Placement, Towers, fit
from vllm_twotower.planning.throughput import StepTimes, Workload, ar_tokens_per_s, diffusion_tokens_per_s
from vllm_twotower.planning.tower_sizes import Precision, Tower, TowerSizes, tower_of
from vllm_twotower.planning.traffic import SplitTraffic

Report = dict[str, Any]

GPU_COUNTS = (1, 2, 4)
BATCHES = (1, 8, 32, 64, 128)
DEFAULT_TOKENS = 4096
NUM_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What the user may say about requests and GPUs."""

    tokens_per_request: int | None = None
    """Prompt and output of each request, for memory and for KV reads; 4,096 by default, or the model's longest."""
    canvas_length: int = 16
    passes_per_canvas: float = MEAN_PASSES
    assumed: Assumptions = field(default_factory=Assumptions)

    @property
    def tokens_at_most(self) -> int:
        """Tokens of a request with the canvas it works on."""
        return (self.tokens_per_request or DEFAULT_TOKENS) + self.canvas_length

    def __post_init__(self) -> None:
        if not 1 <= self.canvas_length <= MAX_CANVAS_LENGTH:
            raise ValueError(
                f"--canvas-length {self.canvas_length} is not allowed: use an integer from 1 to {MAX_CANVAS_LENGTH}"
            )
        if not 1 <= self.passes_per_canvas <= self.canvas_length:
            raise ValueError(
                f"--passes-per-canvas {self.passes_per_canvas} is not allowed: use a number from 1 to the canvas "
                f"length, {self.canvas_length}"
            )
        if not 0 < self.assumed.gpu_memory_utilization <= 1:
            raise ValueError(
                f"--gpu-memory-utilization {self.assumed.gpu_memory_utilization} is not allowed: use a number above 0 "
                "and at most 1"
            )


def inspect(path: str, options: InspectOptions | None = None) -> Report:
    """Everything about a checkpoint folder or a ``config.json``, as plain data.

    Raises:
        ValueError: no such folder, unreadable files, or not a two-tower model.

    """
    folder = CheckpointFolder.read(path)
    facts = ModelFacts.from_config(folder.config, str(folder.config_file))
    options = _filled_in(options or InspectOptions(), facts)
    towers = {tower: TowerSizes.of(facts, tower) for tower in Tower}
    return {
        "model": _model(folder, facts),
        "checkpoint": _checkpoint(folder, facts),
        "towers": {tower.value: _tower(sizes) for tower, sizes in towers.items()},
        "cache": _cache(facts, options),
        "split_traffic": _traffic(facts, options),
        "assumptions": {
            "passes_per_canvas": options.passes_per_canvas,
            "canvas_length": options.canvas_length,
            **vars(options.assumed),
        },
        "fits": _fits(towers, options),
        "throughput_estimate": _throughput(towers, options),
    }


def _filled_in(options: InspectOptions, facts: ModelFacts) -> InspectOptions:
    """Options with a length of requests that the model can take."""
    longest, tokens = facts.max_position_embeddings, options.tokens_per_request
    if tokens is None:
        return replace(options, tokens_per_request=min(DEFAULT_TOKENS, longest))
    if not 1 <= tokens <= longest:
        raise ValueError(f"--tokens-per-request {tokens} is not allowed: use an integer from 1 to {longest}")
    return options


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
    expected = checkpoint_shapes(facts)
    report: Report = {
        "tensors_by_config": len(expected),
        "parameters_by_config": _sum_by_tower({name: math.prod(shape) for name, shape in expected.items()}),
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
    misshapen = [name for name in stored if name in expected and stored[name].shape != expected[name]]
    for what, names in (("missing", absent), ("not part of the model", unknown), ("of another shape", misshapen)):
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
        "resident_bytes": {precision.value: sizes.resident_bytes(precision) for precision in Precision},
    }


def _cache(facts: ModelFacts, options: InspectOptions) -> Report:
    pages = CachePages.of(facts, 1)
    return {
        "kv_bytes_per_token": facts.kv_bytes_per_token,
        "mamba_bytes_per_request": facts.mamba_bytes_per_request,
        "conv_bytes_per_request": facts.layers("M") * facts.conv_bytes_per_layer,
        "ssm_bytes_per_request": facts.layers("M") * facts.ssm_bytes_per_layer,
        "vllm_block_tokens": pages.tokens_per_block,
        "tokens_per_request": options.tokens_per_request,
        "bytes_per_request_in_vllm_blocks": pages.bytes_per_request(options.tokens_at_most),
    }


def _traffic(facts: ModelFacts, options: InspectOptions) -> Report:
    traffic = SplitTraffic.of(facts, options.canvas_length)
    links: Report = {}
    for gpu in GPUS.values():
        for link, rate in (("NVLink", gpu.nvlink_Bps), ("PCIe", gpu.pcie_Bps)):
            links[f"{gpu.name} {link}"] = {
                "bytes_per_s": rate * options.assumed.link_fraction,
                "seconds_per_canvas": traffic.seconds(traffic.bytes_per_canvas, rate, options.assumed),
                "seconds_per_1000_prompt_tokens": traffic.seconds(traffic.prefill_bytes(1000), rate, options.assumed),
            }
    return {
        "formula": traffic.formula,
        "kv_bytes_per_token": traffic.kv_bytes_per_token,
        "state_bytes_per_row": traffic.state_bytes_per_row,
        "bytes_per_canvas": traffic.bytes_per_canvas,
        "bytes_per_denoise_step_back": traffic.bytes_per_denoise_step_back,
        "links": links,
    }


def _fits(towers: Towers, options: InspectOptions) -> list[Report]:
    rows = []
    for gpu, num_gpus, placement, precision in itertools.product(GPUS.values(), GPU_COUNTS, Placement, Precision):
        if placement is not Placement.SPLIT or num_gpus > 1:
            one = fit(towers, gpu, num_gpus, placement, precision, options.tokens_at_most, options.assumed)
            rows.append({**vars(one), "requests": one.num_requests})
    return rows


def _throughput(towers: Towers, options: InspectOptions) -> list[Report]:
    """One and two GPUs of each kind: tokens per second of those placements that hold the batch."""
    load = Workload(
        context_length=options.tokens_at_most,
        canvas_length=options.canvas_length,
        passes=CanvasPasses(mean=options.passes_per_canvas, max_steps=options.canvas_length),
    )
    rows = []
    for gpu, num_gpus, precision, batch in itertools.product(GPUS.values(), (1, 2), Precision, BATCHES):
        rows.append({"gpu": gpu.name, "num_gpus": num_gpus, "precision": precision, "batch": batch})
        for placement in Placement:
            one = fit(towers, gpu, num_gpus, placement, precision, options.tokens_at_most, options.assumed)
            if one.num_requests >= batch:
                times = StepTimes(
                    towers=towers, gpu=gpu, num_gpus=num_gpus, placement=placement, precision=precision,
                    workload=load, assumed=options.assumed,
                )  # fmt: skip
                estimate = ar_tokens_per_s if placement is Placement.AR else diffusion_tokens_per_s
                rows[-1][placement.value] = estimate(times, batch)
    return rows
