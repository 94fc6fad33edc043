"""What fits: which placement of the towers on how many GPUs, how many requests remain beside the weights, and what
crosses between split towers."""

import math
from dataclasses import dataclass
from enum import StrEnum

from vllm_twotower.config import find_indivisible
from vllm_twotower.planning.gpus import GIB, Gpu
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.tower_sizes import Precision, Tower, TowerSizes, kv_shards

KV_BLOCK_ALIGNMENT = 16
"""vLLM makes a KV block a multiple of this many tokens."""

GPU_MEMORY_UTILIZATION = 0.92
"""Default of vLLM's option of that name."""

RESERVED_BYTES = 2 * GIB
"""Assumed per GPU: activations at the widest step, CUDA graphs, communication buffers."""

Towers = dict[Tower, TowerSizes]


class Placement(StrEnum):
    """Where the towers live."""

    AR = "ar"
    """The context tower alone, sharded over all GPUs: what an engine without ``--diffusion`` loads."""
    COLOCATED = "colocated"
    """Both towers sharded over all GPUs."""
    SPLIT = "split"
    """The context tower on the first half of the GPUs, the denoiser on the second; both halves hold the caches."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One placement on one kind of GPU."""

    gpu: str
    num_gpus: int
    placement: Placement
    precision: Precision
    weight_bytes_per_gpu: int
    """On the fuller kind of GPU."""
    cache_bytes_per_gpu: int
    """What is left there for KV and Mamba states; negative: the weights do not fit."""
    bytes_per_request_per_gpu: int
    """KV and Mamba states of one request of the stated length, in vLLM's blocks."""
    problem: str | None
    """Why this placement cannot be, or None."""

    @property
    def num_requests(self) -> int:
        """Requests of the stated length that fit at once."""
        if self.problem is not None:
            return 0
        return max(0, self.cache_bytes_per_gpu // max(1, self.bytes_per_request_per_gpu))


def fit_towers(
    towers: Towers,
    gpu: Gpu,
    num_gpus: int,
    placement: Placement,
    precision: Precision,
    tokens_per_request: int,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
) -> Fit:
    """Put the towers on GPUs and see what is left.

    Args:
        towers: both towers' sizes.
        gpu: kind of GPU.
        num_gpus: how many.
        placement: where the towers go.
        precision: how weights are held.
        tokens_per_request: prompt, output and one canvas of each request.
        gpu_memory_utilization: share of a GPU's memory that vLLM takes.

    """
    facts = towers[Tower.CONTEXT].facts
    ranks = max(1, ranks_per_tower(num_gpus, placement))
    problem = find_indivisible(facts, ranks)
    if placement is Placement.SPLIT and num_gpus % 2:
        problem = f"split needs an even number of GPUs, not {num_gpus}"
    loads = {tower: sizes.bytes_per_rank(ranks, precision) for tower, sizes in towers.items()}
    weights = {
        Placement.AR: loads[Tower.CONTEXT],
        Placement.COLOCATED: sum(loads.values()),
        Placement.SPLIT: max(loads.values()),
    }[placement]
    usable = int(gpu.memory_bytes * gpu_memory_utilization) - RESERVED_BYTES
    if problem is None and weights > usable:
        problem = "the weights do not fit"
    return Fit(
        gpu=gpu.name,
        num_gpus=num_gpus,
        placement=placement,
        precision=precision,
        weight_bytes_per_gpu=weights,
        cache_bytes_per_gpu=usable - weights,
        bytes_per_request_per_gpu=CachePages.of(facts, ranks).bytes_per_request(tokens_per_request),
        problem=problem,
    )


def ranks_per_tower(num_gpus: int, placement: Placement) -> int:
    """GPUs that share one tower's weights."""
    return num_gpus // 2 if placement is Placement.SPLIT else num_gpus


@dataclass(frozen=True)
class CachePages:
    """How vLLM cuts the cache of a hybrid model on one rank (``kv_cache_utils.py``, ``platforms/interface.py``).

    Every layer's page has one size: a KV block is made long enough to cover a Mamba state. Layers come in groups of
    equal size, and one block of a group has a page in each of its layers; the last group of a kind may be padded.
    """

    tokens_per_block: int
    page_bytes: int
    """Of one layer."""
    layers_per_group: int
    attention_groups: int
    mamba_groups: int

    @classmethod
    def of(cls, facts: ModelFacts, num_ranks: int) -> "CachePages":
        """The pages on each of ``num_ranks`` ranks."""
        attention, mamba = facts.layers("*"), facts.layers("M")
        shards = kv_shards(facts, num_ranks)
        token_bytes = 2 * facts.num_key_value_heads * facts.head_dim * facts.dtype_bytes // shards
        state_bytes = (facts.conv_bytes_per_layer + facts.ssm_bytes_per_layer) // num_ranks if mamba else 0
        aligned = KV_BLOCK_ALIGNMENT * token_bytes
        tokens = KV_BLOCK_ALIGNMENT * max(1, math.ceil(state_bytes / aligned))
        fewest, most = sorted((attention, mamba)) if attention and mamba else (attention + mamba,) * 2
        group = most if most < 1.5 * fewest else fewest
        per_group = max(1, group)
        return cls(
            tokens, tokens * token_bytes, per_group, math.ceil(attention / per_group), math.ceil(mamba / per_group)
        )

    def bytes_per_request(self, num_tokens: int) -> int:
        """Cache of one running request; with prefix caching it may hold a second Mamba state while it crosses a
        block."""
        blocks = self.attention_groups * math.ceil(num_tokens / self.tokens_per_block) + self.mamba_groups
        return blocks * self.layers_per_group * self.page_bytes


@dataclass(frozen=True)
class SplitTraffic:
    """Bytes between the two halves (``split/link.py``); with N ranks per tower each pair carries its share.
    ``tests/test_placement.py`` compares them with what is sent."""

    kv_bytes_per_token: int
    """To the denoiser, for every prompt token and every committed or verified token."""
    state_bytes_per_row: int
    """To the denoiser at a prompt's end: the request's conv and SSM states."""
    kept_bytes_per_token: int
    """To the denoiser for every committed or verified token: what the Mamba layers were fed, from which the states
    there are advanced."""
    bytes_per_canvas: int
    """To the denoiser when a canvas is committed or verified."""
    bytes_per_denoise_step_back: int
    """To the context tower for each canvas of a denoise step: its tokens and its pass count, int64."""

    @classmethod
    def of(cls, facts: ModelFacts, canvas_length: int) -> "SplitTraffic":
        """The traffic of one model."""
        token, row, kept = facts.kv_bytes_per_token, facts.mamba_bytes_per_request, facts.mamba_input_bytes_per_token
        return cls(token, row, kept, canvas_length * (token + kept), (canvas_length + 1) * 8)
