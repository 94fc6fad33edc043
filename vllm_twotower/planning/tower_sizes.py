"""Parameters and bytes of both towers, part by part, and how tensor parallelism and FP8 divide them.

A *part* is what a tensor is for, because that decides how often it is read, whether FP8 covers it and whether ranks
share it. Byte counts equal the real module tree's: ``tests/test_loading.py``, and of quantised checkpoints
``tests/test_stored_quantization.py``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from vllm_twotower.models.tensor_shapes import CONTEXT_PREFIXES, checkpoint_shapes, checkpoint_tensors
from vllm_twotower.planning.checkpoint_folder import BITS_OF_DTYPE
from vllm_twotower.planning.model_facts import ModelFacts


class Tower(StrEnum):
    """The two halves of the model; each has an embedding and a head of its own."""

    CONTEXT = "context"
    DENOISER = "denoiser"


class Part(StrEnum):
    """What a tensor is for."""

    EXPERT = "expert"
    """Routed experts: a pass reads those that its tokens chose."""
    LINEAR = "linear"
    """Projections of Mamba, attention, shared experts, dense MLPs: read whole in every pass."""
    REPLICATED = "replicated"
    """Routers, layer norms and modulation tables: read whole, on every rank."""
    MIXER = "mixer"
    """Convolutions, SSM constants and gated norms: read whole, sharded."""
    EMBEDDING = "embedding"
    """A pass reads one row per token."""
    HEAD = "head"
    """Read whole in a pass that wants logits."""
    TIME = "time"
    """The denoiser's time embedding: tabulated at load, then never read."""


class Precision(StrEnum):
    """How weights are held."""

    BF16 = "bf16"
    """As the checkpoint has them: in the config's dtype, or quantised if its ``quantization_config`` says so."""
    FP8 = "fp8"
    """With ``--quantization fp8``, of a checkpoint that is not quantised."""


FP8_PARTS = frozenset({Part.EXPERT, Part.LINEAR})
"""What ``--quantization fp8`` holds in one byte per weight. Routers, convolutions, norms, time conditioning, embeddings
and heads stay; the scales, four bytes per matrix, are not counted. ``tests/test_fp8.py`` holds this to vLLM."""

SHARDED_PARTS = frozenset({Part.EXPERT, Part.LINEAR, Part.MIXER, Part.EMBEDDING, Part.HEAD})
"""What tensor parallelism divides; the rest is on every rank."""

FLOAT32_SUFFIXES = ("A_log", "e_score_correction_bias")
"""Held in float32 whatever the model's dtype."""


def tower_of(name: str) -> Tower:
    """The tower that a checkpoint tensor belongs to."""
    return Tower.CONTEXT if name.startswith(CONTEXT_PREFIXES) else Tower.DENOISER


def part_of(name: str) -> Part:
    """What a checkpoint tensor is for."""
    if name.startswith(("t_embedder.", "t_block.")):
        return Part.TIME
    if "lm_head." in name:
        return Part.HEAD
    if ".embeddings." in name:
        return Part.EMBEDDING
    if ".experts." in name:
        return Part.EXPERT
    if name.endswith("_proj.weight"):
        return Part.LINEAR
    is_router = ".mixer.gate." in name
    return Part.MIXER if ".mixer." in name and not is_router else Part.REPLICATED


@dataclass(frozen=True)
class TowerSizes:
    """One tower: parameters and resident bytes by part.

    Resident bytes are those of the weights as the engine holds them, which for float32 odds and ends differs from the
    file's.
    """

    parameters: Mapping[Part, int]
    float32_parameters: Mapping[Part, int]
    """How many of them are held in float32."""
    kv_parameters: int
    """Parameters of the key and value projections, part of ``LINEAR``: more ranks than KV heads repeat them."""
    quantized_parameters: Mapping[Part, int]
    """How many of them the checkpoint stores quantised."""
    quantized_bytes: Mapping[Part, int]
    """What those take, scales included, once they are loaded."""
    facts: ModelFacts

    @classmethod
    def of(cls, facts: ModelFacts, tower: Tower) -> "TowerSizes":
        """Count the tensors that a checkpoint of this model has for a tower."""
        parameters, float32, kv = dict.fromkeys(Part, 0), dict.fromkeys(Part, 0), 0
        quantized, quantized_bytes = dict.fromkeys(Part, 0), dict.fromkeys(Part, 0)
        modules = set()
        for name, spec in checkpoint_tensors(facts).items():
            module = name.rpartition(".")[0]
            if spec.scheme is not None and tower_of(name) is tower:
                modules.add(module)
                # layers hold a scale in the first of the dtypes that a file may have it in
                size = math.prod(spec.shape) * BITS_OF_DTYPE[spec.dtypes[0]] // 8
                quantized_bytes[part_of(f"{module}.weight")] += size
        for name, shape in checkpoint_shapes(facts).items():
            if tower_of(name) is not tower:
                continue
            part, count = part_of(name), math.prod(shape)
            parameters[part] += count
            quantized[part] += count if name.removesuffix(".weight") in modules else 0
            float32[part] += count if name.endswith(FLOAT32_SUFFIXES) else 0
            kv += count if name.endswith((".k_proj.weight", ".v_proj.weight")) else 0
        return cls(parameters, float32, kv, quantized, quantized_bytes, facts)

    @property
    def num_parameters(self) -> int:
        """All parameters of the tower, its head included."""
        return sum(self.parameters.values())

    def bytes_of(self, part: Part, precision: Precision = Precision.BF16) -> int:
        """Bytes of one part's weights, all ranks together if none repeats another's."""
        width = 1 if precision is Precision.FP8 and part in FP8_PARTS else self.facts.dtype_bytes
        in_float32, quantized = self.float32_parameters[part], self.quantized_parameters[part]
        plain = self.parameters[part] - in_float32 - quantized
        return plain * width + in_float32 * 4 + self.quantized_bytes[part]

    def resident_bytes(self, precision: Precision = Precision.BF16) -> int:
        """Bytes of the whole tower on one GPU."""
        return sum(self.bytes_of(part, precision) for part in Part)

    def bytes_per_rank(self, num_ranks: int, precision: Precision = Precision.BF16) -> int:
        """Bytes on each of ``num_ranks`` tensor-parallel ranks."""
        total = 0
        for part in Part:
            share = self.bytes_of(part, precision)
            total += math.ceil(share / num_ranks) if part in SHARDED_PARTS else share
        linear = max(1, self.parameters[Part.LINEAR])
        kv_bytes = self.kv_parameters * self.bytes_of(Part.LINEAR, precision) // linear
        repeated = kv_bytes * (num_ranks // kv_shards(self.facts, num_ranks) - 1) // num_ranks
        return total + repeated

    @property
    def active_parameters(self) -> int:
        """Parameters that one token multiplies with: the chosen experts, all linears, routers and the head."""
        facts, p = self.facts, self.parameters
        experts = p[Part.EXPERT] * facts.num_experts_per_tok // max(1, facts.n_routed_experts)
        return experts + p[Part.LINEAR] + p[Part.MIXER] + p[Part.REPLICATED] + p[Part.HEAD]


def kv_shards(facts: ModelFacts, num_ranks: int) -> int:
    """Different shards of the KV cache over ``num_ranks`` ranks: with more ranks than KV heads, heads are repeated."""
    return min(num_ranks, facts.num_key_value_heads)
