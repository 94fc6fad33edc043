"""Weights before training: the context tower's, and the denoiser's made from it."""

import math

import torch

from vllm_twotower.core import TIMESTEP_FEATURES
from vllm_twotower.oracle.plain_towers import CONTEXT, DENOISER, TowerShape


class _Weights(dict[str, torch.Tensor]):
    def matrix(self, name: str, rows: int, columns: int, std: float | None = None) -> None:
        self[f"{name}.weight"] = torch.randn(rows, columns) * (std or columns**-0.5)


def context_weights(shape: TowerShape) -> dict[str, torch.Tensor]:
    """Mamba-2's own initialisation, scaled normal projections (docs/model.md#training)."""
    weights = _Weights()
    hidden, out_std = shape.hidden_size, 0.5 / math.sqrt(len(shape.hybrid_override_pattern))
    weights.matrix(f"{CONTEXT}.embeddings", shape.vocab_size, hidden, 0.5)
    weights.matrix("context_lm_head", shape.vocab_size, hidden, 0.02)
    weights[f"{CONTEXT}.norm_f.weight"] = torch.ones(hidden)
    for index, kind in enumerate(shape.hybrid_override_pattern):
        name = f"{CONTEXT}.layers.{index}"
        weights[f"{name}.norm.weight"] = torch.ones(hidden)
        add = {"M": _add_mamba, "*": _add_attention, "E": _add_experts}[kind]
        add(weights, f"{name}.mixer", shape, out_std)
    return dict(weights)


def _add_mamba(weights: _Weights, mixer: str, shape: TowerShape, out_std: float) -> None:
    inner, groups = shape.mamba_num_heads * shape.mamba_head_dim, shape.n_groups * shape.ssm_state_size
    channels, heads = inner + 2 * groups, shape.mamba_num_heads
    weights.matrix(f"{mixer}.in_proj", inner + channels + heads, shape.hidden_size)
    weights.matrix(f"{mixer}.out_proj", shape.hidden_size, inner, out_std * inner**-0.5)
    weights[f"{mixer}.conv1d.weight"] = torch.randn(channels, 1, shape.conv_kernel) * 0.4
    weights[f"{mixer}.conv1d.bias"] = torch.zeros(channels)
    dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
    weights[f"{mixer}.dt_bias"] = dt + torch.log(-torch.expm1(-dt))
    weights[f"{mixer}.A_log"] = torch.arange(1, heads + 1).float().log()
    weights[f"{mixer}.D"] = torch.ones(heads)
    weights[f"{mixer}.norm.weight"] = torch.ones(inner)


def _add_attention(weights: _Weights, mixer: str, shape: TowerShape, out_std: float) -> None:
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for projection, rows in (("q", queries), ("k", keys), ("v", keys)):
        weights.matrix(f"{mixer}.{projection}_proj", rows, shape.hidden_size)
    weights.matrix(f"{mixer}.o_proj", shape.hidden_size, queries, out_std * queries**-0.5)


def _add_experts(weights: _Weights, mixer: str, shape: TowerShape, out_std: float) -> None:
    weights.matrix(f"{mixer}.gate", shape.n_routed_experts, shape.hidden_size)
    weights[f"{mixer}.gate.e_score_correction_bias"] = torch.zeros(shape.n_routed_experts)
    widths = {f"experts.{e}": shape.moe_intermediate_size for e in range(shape.n_routed_experts)}
    for expert, width in {**widths, "shared_experts": shape.moe_shared_expert_intermediate_size}.items():
        weights.matrix(f"{mixer}.{expert}.up_proj", width, shape.hidden_size)
        weights.matrix(f"{mixer}.{expert}.down_proj", shape.hidden_size, width, out_std * width**-0.5)


def denoiser_weights(context: dict[str, torch.Tensor], shape: TowerShape) -> dict[str, torch.Tensor]:
    """A copy of the context tower, and fresh time conditioning that modulates little.

    Megatron starts the gates anywhere; starting them at 1 and shift and scale at 0 lets a short run keep what phase 1
    learned.
    """
    weights = _Weights({n.replace(CONTEXT, DENOISER): t.clone() for n, t in context.items() if n.startswith(CONTEXT)})
    weights["lm_head.weight"] = context["context_lm_head.weight"].clone()
    hidden = shape.hidden_size
    weights.matrix("t_embedder.mlp.0", hidden, TIMESTEP_FEATURES)
    weights.matrix("t_embedder.mlp.2", hidden, hidden)
    weights.matrix("t_block.1", 3 * hidden, hidden, 0.02)
    for name, rows in (("t_embedder.mlp.0", hidden), ("t_embedder.mlp.2", hidden), ("t_block.1", 3 * hidden)):
        weights[f"{name}.bias"] = torch.zeros(rows)
    for index in range(len(shape.hybrid_override_pattern)):
        still, open_ = torch.zeros(hidden), torch.ones(hidden)
        weights[f"scale_shift_tables.{index}"] = torch.stack([still, still, open_])
    return dict(weights)
