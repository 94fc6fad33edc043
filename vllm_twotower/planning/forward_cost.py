"""Bytes and FLOPs of one forward of one tower, term by term, and the seconds they take at best.

Counted: weights (of the routed experts those that somebody chose), KV read and written, Mamba states, the head and its
logits, matrix products, attention and scan. Not counted: activations (about 4 MB per token, some 5% of a full pass) and
tiles that grouped products fill in part; both belong to the assumed fractions of the peaks.
"""

from dataclasses import dataclass, field

from vllm_twotower.planning.assumptions import Assumptions
from vllm_twotower.planning.gpus import Gpu
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.tower_sizes import FP8_PARTS, Part, Precision, TowerSizes, kv_shards

BYTES_OF_LOGIT = 8
"""Written once and read once in float32."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The shape of one forward."""

    rows: int
    """Requests."""
    tokens: int
    """Tokens of all rows together."""
    context_length: int
    """Tokens in the KV cache of a row, on average."""
    logit_rows: int
    """Tokens whose logits are wanted."""
    states: float
    """How often a row's Mamba states cross the memory bus, on average: 1 read, 2 read and written."""


def ar_step(rows: int, context_length: int) -> Forward:
    """One token for every row, by the context tower."""
    return Forward(rows=rows, tokens=rows, context_length=context_length, logit_rows=rows, states=2)


def denoise_pass(rows: int, context_length: int, canvas_length: int, masked_fraction: float) -> Forward:
    """One pass over a canvas per row; logits for the masked positions; states are read only."""
    tokens = rows * canvas_length
    wanted = round(tokens * masked_fraction)
    return Forward(rows=rows, tokens=tokens, context_length=context_length, logit_rows=wanted, states=1)


def context_step(rows: int, tokens: int, context_length: int) -> Forward:
    """Commits and prompt chunks, by the context tower; no logits."""
    return Forward(rows=rows, tokens=tokens, context_length=context_length, logit_rows=0, states=2)


def expected_experts(num_experts: int, per_token: int, tokens: float) -> float:
    """Distinct experts that at least one of ``tokens`` tokens chooses: E (1 - (1 - k / E)^tokens).

    Independent, uniform choices; real tokens of one text agree more often, so a pass over few rows touches fewer.
    """
    if not num_experts:
        return 0.0
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** tokens)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Bytes on each GPU and FLOPs of all GPUs together."""

    dense_bytes: float
    """Everything read whole in every pass: projections, routers, norms, convolutions."""
    expert_bytes: float
    """Routed experts that were chosen."""
    head_bytes: float
    """The head's weights."""
    logit_bytes: float
    embedding_bytes: float
    kv_bytes: float
    state_bytes: float
    """Conv and SSM states."""
    fp8_flops: float
    """Products that FP8 covers (counted here at BF16 too)."""
    other_flops: float
    all_reduce_bytes: float
    """Bytes that one all-reduce carries; there is one per layer and one for the embedding."""
    num_all_reduces: int

    @property
    def num_bytes(self) -> float:
        """All bytes of memory traffic on each GPU."""
        weights = self.dense_bytes + self.expert_bytes + self.head_bytes
        return weights + self.logit_bytes + self.embedding_bytes + self.kv_bytes + self.state_bytes

    @property
    def flops(self) -> float:
        """All FLOPs."""
        return self.fp8_flops + self.other_flops


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs that run a tower together by tensor parallelism, and how the weights are held."""

    gpu: Gpu
    num_gpus: int = 1
    precision: Precision = Precision.BF16
    assumed: Assumptions = field(default_factory=Assumptions)

    def cost(self, sizes: TowerSizes, forward: Forward) -> Cost:
        """Bytes and FLOPs of one forward of one tower on these GPUs."""
        facts, n = sizes.facts, self.num_gpus
        of = lambda part: sizes.bytes_of(part, self.precision)
        independent = forward.rows + (forward.tokens - forward.rows) * self.assumed.independent_share
        touched = expected_experts(facts.n_routed_experts, facts.num_experts_per_tok, independent)
        kv_bytes = facts.kv_bytes_per_token * (forward.rows * forward.context_length + forward.tokens)
        state_bytes = facts.mamba_bytes_per_request * forward.rows * forward.states
        fp8_flops, other_flops = _flops(sizes, forward)
        width = facts.dtype_bytes
        return Cost(
            dense_bytes=(of(Part.LINEAR) + of(Part.MIXER)) / n + of(Part.REPLICATED),
            expert_bytes=of(Part.EXPERT) * touched / max(1, facts.n_routed_experts) / n,
            head_bytes=of(Part.HEAD) / n if forward.logit_rows else 0.0,
            logit_bytes=forward.logit_rows * facts.vocab_size * BYTES_OF_LOGIT / n,
            embedding_bytes=forward.tokens * facts.hidden_size * width / n,
            kv_bytes=kv_bytes / kv_shards(facts, n),
            state_bytes=state_bytes / n,
            fp8_flops=fp8_flops,
            other_flops=other_flops,
            all_reduce_bytes=forward.tokens * facts.hidden_size * width if n > 1 else 0.0,
            num_all_reduces=len(facts.hybrid_override_pattern) + 1 if n > 1 else 0,
        )

    def memory_s(self, cost: Cost) -> float:
        """Seconds of memory traffic."""
        return cost.num_bytes / (self.gpu.bandwidth_Bps * self.assumed.memory_fraction)

    def compute_s(self, cost: Cost) -> float:
        """Seconds of arithmetic."""
        peak = self.gpu.fp8_flops if self.precision is Precision.FP8 else self.gpu.bf16_flops
        seconds = cost.fp8_flops / peak + cost.other_flops / self.gpu.bf16_flops
        return seconds / self.num_gpus / self.assumed.compute_fraction

    def link_s(self, cost: Cost) -> float:
        """Seconds of all-reduces over NVLink; a ring moves 2 (n - 1) / n of the data over each link."""
        if not cost.num_all_reduces:
            return 0.0
        moved = cost.all_reduce_bytes * 2 * (self.num_gpus - 1) / self.num_gpus
        one = self.assumed.message_s + moved / (self.gpu.nvlink_Bps * self.assumed.link_fraction)
        return cost.num_all_reduces * one

    def seconds(self, sizes: TowerSizes, forward: Forward) -> float:
        """Time of one forward: the slower of memory and arithmetic, then the links, then what is fixed."""
        cost = self.cost(sizes, forward)
        return max(self.memory_s(cost), self.compute_s(cost)) + self.link_s(cost) + self.assumed.fixed_s


def _flops(sizes: TowerSizes, forward: Forward) -> tuple[float, float]:
    """FLOPs of what FP8 covers, and of the rest: two per weight and token, attention, scan."""
    facts, p = sizes.facts, sizes.parameters
    chosen = facts.num_experts_per_tok / max(1, facts.n_routed_experts)
    covered = sum(p[part] * (chosen if part is Part.EXPERT else 1) for part in FP8_PARTS)
    rest = p[Part.MIXER] + p[Part.REPLICATED]
    per_token = 2 * rest + _attention_flops(facts, forward.context_length) + _scan_flops(facts)
    return 2 * covered * forward.tokens, per_token * forward.tokens + 2 * p[Part.HEAD] * forward.logit_rows


def _attention_flops(facts: ModelFacts, context_length: int) -> int:
    """Scores and weighted values of one token over its context."""
    return facts.layers("*") * 4 * facts.num_attention_heads * facts.head_dim * context_length


def _scan_flops(facts: ModelFacts) -> int:
    """One step of the recurrence: decay, outer product, read-out."""
    return facts.layers("M") * 6 * facts.mamba_num_heads * facts.mamba_head_dim * facts.ssm_state_size
