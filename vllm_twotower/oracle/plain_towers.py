"""Both towers in plain torch, batch first, no vLLM: the oracle for the engine and the model that
``tools/demo_training`` trains.

Written for reading and differentiable throughout. Weights are a flat mapping in the released layout's names, so what is
trained here is saved as it is. Source of every formula: ``modeling_nemotron_twotower.py`` over
``modeling_nemotron_h.py``; in words, ``docs/model.md``.

Legend: B batch, L tokens, S canvas positions, D hidden, V vocabulary; Mamba: H heads, P head dim, G groups, N state,
    C = H*P + 2*G*N conv channels, K conv kernel; attention: Q query heads, J KV heads, d head dim.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vllm_twotower.core import TIMESTEP_FEATURES, TIMESTEP_MAX_PERIOD, TIMESTEP_SCALE
from vllm_twotower.oracle.reference import DecodingResult, MaskDiffusion, generate_mask_diffusion
from vllm_twotower.oracle.self_speculation import SelfSpeculation, SpeculationResult, generate_self_speculation

CONTEXT, DENOISER = "context_tower", "denoiser_tower"


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """The fields of the released ``config.json`` that a forward pass needs, under their own names."""

    hybrid_override_pattern: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    chunk_size: int = 128
    """Tokens per chunk of the Mamba scan, whose work is quadratic in a chunk."""
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    intermediate_size: int = 0
    routed_scaling_factor: float = 1.0
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TowerShape":
        """Read from a parsed ``config.json``; fields a forward pass does not need are ignored."""
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})


@dataclass
class AttentionCache:
    """Of one attention layer."""

    keys_BJLd: torch.Tensor
    values_BJLd: torch.Tensor


@dataclass
class MambaCache:
    """State of one Mamba layer after its last token: the K-1 newest raw conv inputs, and the SSM state in fp32."""

    conv_BKC: torch.Tensor
    ssm_BHPN: torch.Tensor


@dataclass
class ContextCache:
    """Everything the denoiser reads of the context, by layer index, and the Mamba states one token back (for
    mock-AR)."""

    attention: dict[int, AttentionCache] = field(default_factory=dict)
    mamba: dict[int, MambaCache] = field(default_factory=dict)
    previous: dict[int, MambaCache] = field(default_factory=dict)


@dataclass
class VerifiedCaches:
    """By layer index, the attention caches after the last token of a forward, and the Mamba states after each chunk."""

    attention: dict[int, AttentionCache] = field(default_factory=dict)
    mamba: dict[int, list[MambaCache]] = field(default_factory=dict)


class PlainTwoTower:
    """Both towers over one mapping of weights.

    Args:
        weights: released tensor name -> tensor, any float dtype; compute follows it (fp32 for parity).
        shape: sizes, from ``config.json``.

    """

    def __init__(self, weights: Mapping[str, torch.Tensor], shape: TowerShape) -> None:
        self.weights = weights
        self.shape = shape

    @classmethod
    def load(cls, folder: pathlib.Path) -> Self:
        """Load a checkpoint of one file, in fp32."""
        weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        return cls(weights, TowerShape.from_config(json.loads((folder / "config.json").read_text())))

    def extend_context(self, tokens_BL: torch.Tensor, cache: ContextCache) -> torch.Tensor:
        """Run the context tower causally over new tokens, advance ``cache``, return the final hidden states [B, L,
        D]."""
        hidden_BLD, kept = self._run_context(tokens_BL, cache)
        cache.previous = cache.mamba
        cache.attention, cache.mamba = kept.attention, {i: states[-1] for i, states in kept.mamba.items()}
        return hidden_BLD

    def verify(self, canvas_BS: torch.Tensor, cache: ContextCache) -> tuple[torch.Tensor, VerifiedCaches]:
        """Run the context tower causally over a draft; ``cache`` is only read.

        Returns:
            Next-token logits after each token, float32 [B, S, V], and what ``replay`` needs.

        """
        hidden_BSD, kept = self._run_context(canvas_BS, cache, chunk=1)
        return self.context_logits(hidden_BSD), kept

    def replay(self, kept: VerifiedCaches, cache: ContextCache, num_tokens: int) -> None:
        """Advance ``cache`` over the first ``num_tokens`` of a verified draft, at least 1, without another forward.

        The Mamba states after every token were kept. The engine has no memory for that: it keeps what the layers were
        fed, and computes the states from that (``ops.state_replay``).
        """
        num_rejected = len(next(iter(kept.mamba.values()))) - num_tokens
        for index, layer in kept.attention.items():
            end = layer.keys_BJLd.shape[2] - num_rejected
            cache.attention[index] = AttentionCache(layer.keys_BJLd[:, :, :end], layer.values_BJLd[:, :, :end])
        cache.previous = cache.mamba
        cache.mamba = {index: states[num_tokens - 1] for index, states in kept.mamba.items()}

    def _run_context(
        self, tokens_BL: torch.Tensor, cache: ContextCache, chunk: int | None = None
    ) -> tuple[torch.Tensor, VerifiedCaches]:
        """The context tower's final hidden states [B, L, D] over new tokens, and the caches after them."""
        kept = VerifiedCaches()
        hidden_BLD = self.embed(CONTEXT, tokens_BL)
        for index in range(len(self.shape.hybrid_override_pattern)):
            x_BLD = self.norm(f"{CONTEXT}.layers.{index}.norm", hidden_BLD)
            hidden_BLD = hidden_BLD + self._run_mixer(CONTEXT, index, x_BLD, cache, kept, chunk=chunk)
        return self.norm(f"{CONTEXT}.norm_f", hidden_BLD), kept

    def _run_mixer(
        self,
        tower: str,
        index: int,
        x_BLD: torch.Tensor,
        cache: ContextCache,
        kept: VerifiedCaches,
        *,
        causal: bool = True,
        chunk: int | None = None,
    ) -> torch.Tensor:
        """One layer's mixer over new tokens, [B, L, D]. ``cache`` is only read; what it becomes goes into ``kept``."""
        name, kind = f"{tower}.layers.{index}", self.shape.hybrid_override_pattern[index]
        has_context = index in cache.attention or index in cache.mamba
        assert tower == CONTEXT or kind not in "*M" or has_context, "the denoiser starts from a context"
        if kind == "*":
            out_BLD, kept.attention[index] = self._attention(name, x_BLD, cache.attention.get(index), causal)
        elif kind == "M":
            out_BLD, kept.mamba[index] = self.mamba(name, x_BLD, cache.mamba.get(index), chunk)
        else:
            out_BLD = self.feed_forward(name, kind, x_BLD)
        return out_BLD

    def context_logits(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """Next-token logits of the context tower, float32 [B, L, V]."""
        return F.linear(hidden_BLD, self.weights["context_lm_head.weight"]).float()

    def denoise(self, canvas_BS: torch.Tensor, level_B: torch.Tensor, cache: ContextCache) -> torch.Tensor:
        """One denoise pass: logits of the token **at** each canvas position, float32 [B, S, V]; ``cache`` is only read.

        Args:
            canvas_BS: int64, the mask id where undecided.
            level_B: float32, the masked fraction of each canvas.
            cache: the context's.

        """
        time_B3D = self.time_vector(level_B)
        hidden_BSD = self.embed(DENOISER, canvas_BS)
        for index, kind in enumerate(self.shape.hybrid_override_pattern):
            name = f"{DENOISER}.layers.{index}"
            shift, scale, gate = (
                v[:, None] for v in (time_B3D + self.weights[f"scale_shift_tables.{index}"]).unbind(1)
            )
            if kind in "*M":  # trained with the norm fused into the projection: modulate first
                x_BSD = self.norm(f"{name}.norm", hidden_BSD * (1 + scale) + shift)
            else:
                x_BSD = self.norm(f"{name}.norm", hidden_BSD) * (1 + scale) + shift
            out_BSD = self._run_mixer(DENOISER, index, x_BSD, cache, VerifiedCaches(), causal=False)
            hidden_BSD = hidden_BSD + gate * out_BSD
        return self.denoiser_logits(hidden_BSD)

    def mock_ar(self, last_B1: torch.Tensor, cache: ContextCache) -> torch.Tensor:
        """Next-token logits [B, 1, V] from the denoiser, run like a causal tower on the last token without modulation.

        It sees the keys and values of every token but the last, and the Mamba states from before it.
        """
        shorter = {
            index: AttentionCache(layer.keys_BJLd[:, :, :-1], layer.values_BJLd[:, :, :-1])
            for index, layer in cache.attention.items()
        }
        before, hidden = ContextCache(shorter, cache.previous), self.embed(DENOISER, last_B1)
        for index in range(len(self.shape.hybrid_override_pattern)):
            x = self.norm(f"{DENOISER}.layers.{index}.norm", hidden)
            hidden = hidden + self._run_mixer(DENOISER, index, x, before, VerifiedCaches())
        return self.denoiser_logits(hidden)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], max_tokens: int, settings: MaskDiffusion) -> DecodingResult:
        """The plain algorithm over these towers; see ``generate_mask_diffusion``."""
        cache = ContextCache()
        self.extend_context(torch.tensor([prompt]), cache)
        return generate_mask_diffusion(
            prompt,
            max_tokens,
            lambda canvas, level: self.denoise(torch.tensor([canvas]), torch.tensor([level]), cache)[0],
            lambda canvas: self.extend_context(torch.tensor([canvas]), cache),
            settings,
        )

    @torch.inference_mode()
    def speculate(self, prompt: Sequence[int], max_tokens: int, settings: SelfSpeculation) -> SpeculationResult:
        """The plain algorithm over these towers; see ``generate_self_speculation``."""
        cache = ContextCache()
        hidden_BLD = self.extend_context(torch.tensor([prompt]), cache)

        def verify(canvas: Sequence[int]) -> tuple[torch.Tensor, VerifiedCaches]:
            logits_BSV, kept = self.verify(torch.tensor([canvas]), cache)
            return logits_BSV[0], kept

        return generate_self_speculation(
            prompt,
            max_tokens,
            self.context_logits(hidden_BLD[:, -1])[0],
            lambda canvas, level: self.denoise(torch.tensor([canvas]), torch.tensor([level]), cache)[0],
            verify,
            lambda kept, num_tokens: self.replay(kept, cache, num_tokens),
            settings,
        )

    def time_vector(self, level_B: torch.Tensor) -> torch.Tensor:
        """The shift, scale and gate that all layers share, before each adds its own table: [B, 3, D]
        (``TimestepEmbedder``)."""
        w = self.weights
        dtype = w["t_embedder.mlp.0.weight"].dtype
        half = TIMESTEP_FEATURES // 2
        frequency = torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * torch.arange(half, device=level_B.device) / half)
        # t * 1000 is rounded in the model's dtype, as the reference does
        angle = (level_B.to(dtype) * TIMESTEP_SCALE).float()[:, None] * frequency
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        hidden = F.linear(features, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"])
        hidden = F.linear(F.silu(hidden), w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
        vector = F.linear(F.silu(hidden), w["t_block.1.weight"], w["t_block.1.bias"])
        return vector.view(-1, 3, self.shape.hidden_size)

    def embed(self, tower: str, tokens: torch.Tensor) -> torch.Tensor:
        """A tower's input embeddings."""
        return F.embedding(tokens, self.weights[f"{tower}.embeddings.weight"])

    def denoiser_logits(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """The denoiser's final norm and head, float32 [B, L, V]."""
        return F.linear(self.norm(f"{DENOISER}.norm_f", hidden_BLD), self.weights["lm_head.weight"]).float()

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm in fp32, result in the dtype of ``x``."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.shape.layer_norm_epsilon)
        return (x32 * self.weights[f"{name}.weight"].float()).to(x.dtype)

    def _attention(
        self, name: str, x_BLD: torch.Tensor, cache: AttentionCache | None, causal: bool
    ) -> tuple[torch.Tensor, AttentionCache]:
        """Grouped-query attention to the cache and to the new tokens, all of them or only those before each one; no
        position encoding. Returns the output [B, L, D] and the longer cache."""
        w, d = self.weights, self.shape.head_dim
        q, k, v = (
            F.linear(x_BLD, w[f"{name}.mixer.{p}_proj.weight"]).unflatten(-1, (-1, d)).transpose(1, 2) for p in "qkv"
        )
        if cache is not None:
            k, v = torch.cat([cache.keys_BJLd, k], dim=2), torch.cat([cache.values_BJLd, v], dim=2)
        num_new, num_all = x_BLD.shape[1], k.shape[2]
        visible = None
        if causal:
            visible = torch.ones(num_new, num_all, dtype=torch.bool, device=q.device).tril(num_all - num_new)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return F.linear(out.transpose(1, 2).flatten(2), w[f"{name}.mixer.o_proj.weight"]), AttentionCache(k, v)

    def mamba(
        self, name: str, x_BLD: torch.Tensor, cache: MambaCache | None, chunk: int | None = None
    ) -> tuple[torch.Tensor, list[MambaCache]]:
        """Mamba-2 over L tokens from a state, ``chunk`` tokens at a time (the shape's ``chunk_size`` by default).

        Returns the output [B, L, D] and the state after each chunk, of which the last is that after token L.
        """
        s, w, mixer = self.shape, self.weights, f"{name}.mixer"
        length = x_BLD.shape[1]
        chunk = min(chunk or s.chunk_size, length)
        inner, groups = s.mamba_num_heads * s.mamba_head_dim, s.n_groups * s.ssm_state_size
        z, xbc_BLC, dt = F.linear(x_BLD, w[f"{mixer}.in_proj.weight"]).split(
            [inner, inner + 2 * groups, s.mamba_num_heads], dim=-1
        )
        if cache is None:
            cache = empty_mamba_cache(s, x_BLD)
        history_BC = torch.cat([cache.conv_BKC.to(xbc_BLC.dtype), xbc_BLC], dim=1)
        conv_BLC = F.silu(
            F.conv1d(
                history_BC.transpose(1, 2),
                w[f"{mixer}.conv1d.weight"],
                w[f"{mixer}.conv1d.bias"],
                groups=xbc_BLC.shape[-1],
            )
        ).transpose(1, 2)
        x, b, c = conv_BLC.float().split([inner, groups, groups], dim=-1)
        y_BLHP, ssm_states = state_space_scan(
            x.unflatten(-1, (s.mamba_num_heads, -1)),
            F.softplus(dt.float() + w[f"{mixer}.dt_bias"].float()),
            -w[f"{mixer}.A_log"].float().exp(),
            b.unflatten(-1, (s.n_groups, -1)),
            c.unflatten(-1, (s.n_groups, -1)),
            cache.ssm_BHPN.float(),
            chunk,
        )
        y = y_BLHP + w[f"{mixer}.D"].float()[:, None] * x.unflatten(-1, (s.mamba_num_heads, -1))
        y = y.flatten(2).to(z.dtype).float() * F.silu(z.float())  # the gate comes before the norm
        y = y.unflatten(-1, (s.n_groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + s.layer_norm_epsilon)
        y = (y.flatten(2) * w[f"{mixer}.norm.weight"].float()).to(z.dtype)
        states = []
        for i, ssm in enumerate(ssm_states, start=1):
            end = min(i * chunk, length)
            states.append(MambaCache(history_BC[:, end : end + s.conv_kernel - 1], ssm))
        return F.linear(y, w[f"{mixer}.out_proj.weight"]), states

    def feed_forward(self, name: str, kind: str, x: torch.Tensor) -> torch.Tensor:
        """A mixture of experts or a dense MLP, per token."""
        if kind == "E":
            return self._mixture_of_experts(f"{name}.mixer", x)
        assert kind == "-", kind
        return self._mlp(f"{name}.mixer", x)

    def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(F.linear(x, self.weights[f"{name}.up_proj.weight"])).square()
        return F.linear(hidden, self.weights[f"{name}.down_proj.weight"])

    def _mixture_of_experts(self, name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        w, s = self.weights, self.shape
        x_TD = x_BLD.flatten(0, -2)
        # fp64 as in the reference, so that borderline choices fall the same way
        score_TE = F.linear(x_TD.double(), w[f"{name}.gate.weight"].double()).sigmoid()
        bias_E = w[f"{name}.gate.e_score_correction_bias"]
        chosen_Tk = (score_TE + bias_E).topk(s.num_experts_per_tok, dim=-1).indices
        weight_Tk = score_TE.gather(1, chosen_Tk)
        weight_Tk = (weight_Tk / (weight_Tk.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor).float()
        routed_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in range(s.n_routed_experts):
            token, slot = (chosen_Tk == expert).nonzero(as_tuple=True)
            out = self._mlp(f"{name}.experts.{expert}", x_TD[token]).float() * weight_Tk[token, slot, None]
            routed_TD = routed_TD.index_add(0, token, out)
        shared_TD = self._mlp(f"{name}.shared_experts", x_TD)
        return (routed_TD.to(x_TD.dtype) + shared_TD).view_as(x_BLD)


def empty_mamba_cache(shape: TowerShape, like: torch.Tensor) -> MambaCache:
    """The state before the first token, for a batch and device as ``like``."""
    channels = shape.mamba_num_heads * shape.mamba_head_dim + 2 * shape.n_groups * shape.ssm_state_size
    conv = like.new_zeros(like.shape[0], shape.conv_kernel - 1, channels)
    ssm_shape = (like.shape[0], shape.mamba_num_heads, shape.mamba_head_dim, shape.ssm_state_size)
    return MambaCache(conv, like.new_zeros(ssm_shape, dtype=torch.float32))


def state_space_scan(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    a_H: torch.Tensor,
    b_BLGN: torch.Tensor,
    c_BLGN: torch.Tensor,
    state_BHPN: torch.Tensor,
    chunk: int,
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The Mamba-2 recurrence, exactly, in its closed form per chunk (Mamba-2 paper, section 6, state-space duality).

    h_t = exp(a dt_t) h_(t-1) + dt_t x_t b_t^T and y_t = h_t c_t, all fp32. Tokens of all chunks are handled at once;
    only the states pass from chunk to chunk.

    Args:
        x_BLHP: inputs.
        dt_BLH: step sizes, positive.
        a_H: decay rates, negative.
        b_BLGN: input projections; head h uses group h // (H / G).
        c_BLGN: output projections.
        state_BHPN: state before the first token.
        chunk: tokens per chunk; the last may be shorter.

    Returns:
        y [B, L, H, P] without the skip term, and the states after each chunk, each [B, H, P, N].

    """
    length, heads = x_BLHP.shape[1], x_BLHP.shape[2]
    pad = -length % chunk  # a token with dt = 0 neither decays the state nor adds to it

    def chunked(t: torch.Tensor) -> torch.Tensor:  # [B, L, ...] -> [B, num_chunks, chunk, ...]
        t = torch.cat([t, t.new_zeros(t.shape[0], pad, *t.shape[2:])], dim=1) if pad else t
        return t.unflatten(1, (-1, chunk))

    repeat = heads // b_BLGN.shape[2]
    x, dt = chunked(x_BLHP), chunked(dt_BLH)
    b, c = (chunked(t).repeat_interleave(repeat, dim=3) for t in (b_BLGN, c_BLGN))
    # [B, chunks, chunk, H]: from the chunk's start up to and including t; in fp64, for differences of large sums count
    log_decay = (dt * a_H).double().cumsum(dim=2)
    # decay from token s (exclusive) to token t (inclusive), for s <= t; the difference is masked before exp, which
    # overflows
    between = (log_decay[:, :, :, None] - log_decay[:, :, None]).float()
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()[:, :, None]
    weight = torch.where(causal, between, float("-inf")).exp()
    scores = torch.einsum("bnthk,bnshk->bntsh", c, b) * weight
    inside = torch.einsum("bntsh,bnsh,bnshp->bnthp", scores, dt, x)
    to_end = (log_decay[:, :, -1:] - log_decay).float().exp() * dt
    gained = torch.einsum("bnsh,bnshp,bnshk->bnhpk", to_end, x, b)
    kept = log_decay[:, :, -1].float().exp()
    before, states = [], []
    for i in range(x.shape[1]):
        before.append(state_BHPN)
        state_BHPN = state_BHPN * kept[:, i, :, None, None] + gained[:, i]
        states.append(state_BHPN)
    carried = torch.einsum("bnthk,bnhpk->bnthp", c * log_decay.float().exp()[..., None], torch.stack(before, dim=1))
    return (inside + carried).flatten(1, 2)[:, :length], states
