"""Both towers over whole batches, differentiable: the context tower causally, the denoiser over many canvases at once.

Same weights under the same names as ``plain_towers.py``, which the training test compares with. The denoiser runs only
where it runs at inference, over the canvases of answers, each seeded from the context states at its own start (as
Megatron's training, docs/model.md#training, with the canvas grid of each row starting where its prompt ends).

Legend: as in ``layers.py``; A canvases of a batch, S canvas length.
"""

from dataclasses import dataclass, field

import torch

from tools.demo_training import layers
from tools.demo_training.config import CANVAS
from tools.demo_training.layers import Weights, grouped_attention, linear, rms_norm
from vllm_twotower.oracle.plain_towers import CONTEXT, DENOISER, PlainTwoTower, TowerShape

_compiled = {"mamba": layers.mamba, "experts": layers.experts, "attention": grouped_attention}


@dataclass
class ContextStates:
    """What the denoiser reads, by layer."""

    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """[B, J, L, d] each."""
    conv_inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, L, C]."""
    before_canvas: dict[int, torch.Tensor] = field(default_factory=dict)
    """[B, n, H, P, N]."""
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    """How often each expert was chosen."""


class TrainingTowers:
    """Forward passes over one mapping of fp32 weights."""

    def __init__(self, weights: Weights, shape: TowerShape) -> None:
        self.weights, self.shape = weights, shape
        self.plain = PlainTwoTower(weights, shape)

    def layer(self, tower: str, index: int) -> Weights:
        """A layer's weights under short names, its experts side by side."""
        prefix = f"{tower}.layers.{index}.mixer."
        own = {n[len(prefix) :]: t for n, t in self.weights.items() if n.startswith(prefix)}
        if "gate.weight" in own:
            names = [*(f"experts.{e}" for e in range(self.shape.n_routed_experts)), "shared_experts"]
            return {
                "gate": own["gate.weight"],
                "correction_bias": own["gate.e_score_correction_bias"],
                "up_proj": torch.cat([own[f"{n}.up_proj.weight"] for n in names]),
                "down_proj": torch.cat([own[f"{n}.down_proj.weight"] for n in names], dim=1),
                "shared_size": own["shared_experts.up_proj.weight"].shape[0],
            }
        return {n.replace(".weight", "").replace(".bias", "_bias"): t for n, t in own.items()}

    def attention_projections(self, own: Weights, x_BLD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries [B, L, Q*d], keys and values [B, J, L, d]."""
        s = self.shape
        keys = s.num_key_value_heads * s.head_dim
        qkv = linear(x_BLD, torch.cat([own["q_proj"], own["k_proj"], own["v_proj"]]))
        q, k, v = qkv.split([s.num_attention_heads * s.head_dim, keys, keys], dim=-1)
        return q, *(t.unflatten(-1, (s.num_key_value_heads, -1)).transpose(1, 2) for t in (k, v))

    def context(self, tokens_BL: torch.Tensor, valid_BL: torch.Tensor) -> tuple[torch.Tensor, ContextStates]:
        """Final hidden states [B, L, D] before the head, and what the denoiser needs."""
        w, states = self.weights, ContextStates()
        length = tokens_BL.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = (causal & valid_BL[:, None]) | torch.eye(length, dtype=torch.bool)
        hidden = self.plain.embed(CONTEXT, tokens_BL)
        for index, kind in enumerate(self.shape.hybrid_override_pattern):
            own = self.layer(CONTEXT, index)
            x = rms_norm(hidden, w[f"{CONTEXT}.layers.{index}.norm.weight"], self.shape.layer_norm_epsilon)
            if kind == "*":
                queries, keys, values = self.attention_projections(own, x)
                states.keys_values[index] = (keys, values)
                out = _compiled["attention"](queries, keys, values, visible[:, None, None])
                out = linear(out, own["o_proj"]).float()
            elif kind == "M":
                out, conv, before = _compiled["mamba"](own, self.shape, x, valid_BL, None, None, CANVAS)
                states.conv_inputs[index], states.before_canvas[index] = conv, before
            else:
                out, states.chosen[index] = _compiled["experts"](own, self.shape, x)
            hidden = hidden + out
        return rms_norm(hidden, w[f"{CONTEXT}.norm_f.weight"], self.shape.layer_norm_epsilon), states

    def context_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits in fp32."""
        return linear(hidden, self.weights["context_lm_head.weight"]).float()

    def denoiser(
        self,
        canvas_AS: torch.Tensor,
        level_A: torch.Tensor,
        row_A: torch.Tensor,
        canvas_index_A: torch.Tensor,
        valid_BL: torch.Tensor,
        states: ContextStates,
        wanted_AS: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Logits of canvases, each in place of its row's canvas ``canvas_index_A``; experts chosen per layer.

        Logits are [A, S, V], or [number wanted, V] where only ``wanted_AS`` asks for them.
        """
        w, chosen = self.weights, {}
        start_A = canvas_index_A * CANVAS
        length = valid_BL.shape[1]
        seen = (torch.arange(length) < start_A[:, None]) & valid_BL[row_A]
        visible = torch.cat([seen, torch.ones_like(canvas_AS, dtype=torch.bool)], dim=1)[:, None, None, None]
        history = start_A[:, None] + torch.arange(1 - self.shape.conv_kernel, 0)
        time_A3D = self.plain.time_vector(level_A)
        hidden = self.plain.embed(DENOISER, canvas_AS)
        for index, kind in enumerate(self.shape.hybrid_override_pattern):
            own, norm = self.layer(DENOISER, index), w[f"{DENOISER}.layers.{index}.norm.weight"]
            shift, scale, gate = (v[:, None] for v in (time_A3D + w[f"scale_shift_tables.{index}"]).unbind(1))
            if kind == "E":
                x = rms_norm(hidden, norm, self.shape.layer_norm_epsilon) * (1 + scale) + shift
            else:
                x = rms_norm(hidden * (1 + scale) + shift, norm, self.shape.layer_norm_epsilon)
            if kind == "*":
                queries, *new = self.attention_projections(own, x)
                keys, values = (
                    torch.cat([old[row_A], n], dim=2) for old, n in zip(states.keys_values[index], new, strict=True)
                )
                out = _compiled["attention"](queries, keys, values, visible)
                out = linear(out, own["o_proj"]).float()
            elif kind == "M":
                conv = states.conv_inputs[index][row_A[:, None], history]
                before = states.before_canvas[index][row_A, canvas_index_A]
                out, _, _ = _compiled["mamba"](own, self.shape, x, None, conv, before, CANVAS)
            else:
                out, chosen[index] = _compiled["experts"](own, self.shape, x)
            hidden = hidden + gate * out
        hidden = hidden if wanted_AS is None else hidden[wanted_AS]
        hidden = rms_norm(hidden, w[f"{DENOISER}.norm_f.weight"], self.shape.layer_norm_epsilon)
        return linear(hidden, w["lm_head.weight"]).float(), chosen
