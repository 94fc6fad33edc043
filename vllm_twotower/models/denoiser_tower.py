"""The denoiser tower on vLLM's layers: one forward is one denoise pass over the canvases of a batch.

It owns weights only. Keys and values go through the aligned context layer's ``Attention`` module, into the lookahead
slots that the commit will overwrite; Mamba starts from the aligned context layer's states and writes nothing back. It
holds no ``Attention`` and no ``MambaMixer2`` (vLLM would allocate caches for them) and is never compiled as a whole (a
graph could replay in the wrong step).

Legend: T tokens of all canvases in batch order, R rows (requests), S widest canvas of the batch, D hidden, C conv
    channels.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models import nemotron_h
from vllm.model_executor.utils import set_weight_attrs

from vllm_twotower.models.conditioning import TimeConditioning
from vllm_twotower.models.mamba import add_recurrence, convolve, find_state_caches
from vllm_twotower.ops import (
    UNMODULATED,
    Modulation,
    gate_add,
    gated_norm,
    modulate_norm,
    norm_modulate,
    seeded_scan,
)
from vllm_twotower.runtime.step import CanvasLayout

LOGITS_TILE = 1024
"""Most rows whose logits exist at once: 0.5 GiB at a vocabulary of 131,072 where something needs them in fp32."""


class DenoiserAttention(nn.Module):
    """Projections of an attention layer; every canvas position sees the whole context and the whole canvas."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        common: dict[str, Any] = {"bias": False, "quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(
            hidden, config.head_dim, heads, kv_heads, prefix=f"{prefix}.qkv_proj", **common
        )
        self.o_proj = RowParallelLinear(heads * config.head_dim, hidden, prefix=f"{prefix}.o_proj", **common)

    def forward(self, x_TD: torch.Tensor, context_mixer: Any, layout: CanvasLayout) -> torch.Tensor:
        """Attend through the context layer's paged cache; the step's metadata says ``causal=False``."""
        qkv, _ = self.qkv_proj(x_TD)
        q, k, v = qkv.split([context_mixer.q_size, context_mixer.kv_size, context_mixer.kv_size], dim=-1)
        attended = context_mixer.attn(q, k, v)
        if layout.is_padding_T is not None:
            # no query, so no output: left there is whatever the memory held, and an FP8 scale is over all tokens
            attended = attended.masked_fill(layout.is_padding_T[:, None], 0)
        out, _ = self.o_proj(attended)
        return out


class DenoiserMamba(nn.Module):
    """A Mamba-2 layer that starts from the context tower's state and leaves no state behind; causal within the
    canvas."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.heads = config.mamba_num_heads // tp_size
        inner, groups = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
        self.inner, self.conv_channels = inner // tp_size, (inner + 2 * groups) // tp_size
        common: dict[str, Any] = {"bias": False, "quant_config": quant_config}
        sizes = [inner, inner, groups, groups, config.mamba_num_heads]
        self.in_proj = MergedColumnParallelLinear(config.hidden_size, sizes, prefix=f"{prefix}.in_proj", **common)
        add_recurrence(self, config)
        self.num_groups, self.eps = config.n_groups // tp_size, config.layer_norm_epsilon
        weight_C = nn.Parameter(torch.empty(self.inner), requires_grad=False)
        set_weight_attrs(weight_C, {"weight_loader": sharded_weight_loader(0)})
        self.norm = nn.ParameterDict({"weight": weight_C})
        self.out_proj = RowParallelLinear(inner, config.hidden_size, prefix=f"{prefix}.out_proj", **common)

    def forward(self, x_TD: torch.Tensor, context_mixer: Any, layout: CanvasLayout) -> torch.Tensor:
        """One canvas per row, seeded from ``context_mixer``'s cache."""
        projected, _ = self.in_proj(x_TD)
        gate_TC, xbc_TC, dt_TH = projected.split([self.inner, self.conv_channels, self.heads], dim=-1)
        caches, slot_R = self._find_seeds(context_mixer, layout, xbc_TC)
        scan_inputs = convolve(self, layout.pad(xbc_TC), layout.pad(dt_TH), caches, slot_R)
        y_RSHP = seeded_scan(scan_inputs, out_dtype=gate_TC.dtype)
        y_TC = layout.unpad(y_RSHP.flatten(2))
        out, _ = self.out_proj(gated_norm(y_TC, gate_TC, self.norm["weight"], self.eps, self.num_groups))
        return out

    def _find_seeds(
        self, context_mixer: Any, layout: CanvasLayout, like: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The caches of conv inputs, [Z, K - 1, C], and of SSM states, and each row's slot in them."""
        if not layout.mamba_slots:  # profile run: no cache yet
            head_dim, state_size = context_mixer.head_dim, context_mixer.ssm_state_size
            conv = like.new_zeros(1, context_mixer.conv_kernel_size - 1, like.shape[-1])
            ssm = like.new_zeros(1, self.heads, head_dim, state_size, dtype=torch.float32)
            return (conv, ssm), torch.zeros(layout.num_rows, dtype=torch.int64, device=like.device)
        return find_state_caches(context_mixer), layout.mamba_slots[context_mixer.prefix]


class DenoiserLayer(nn.Module):
    """Residual, modulation, norm, mixer, gate; where the modulation goes depends on the layer's kind."""

    def __init__(self, kind: str, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        quant_config, mixer_prefix = vllm_config.quant_config, f"{prefix}.mixer"
        if kind == "*":
            self.mixer: nn.Module = DenoiserAttention(config, quant_config, mixer_prefix)
        elif kind == "M":
            self.mixer = DenoiserMamba(config, quant_config, mixer_prefix)
        elif kind == "E":
            # looked up in vLLM's module: on a CPU another class stands there
            self.mixer = nemotron_h.NemotronHMoE(config, quant_config, vllm_config.parallel_config, mixer_prefix)
        else:
            sizes = (config.hidden_size, config.intermediate_size)
            self.mixer = nemotron_h.NemotronHMLP(config, *sizes, quant_config, config.mlp_bias, prefix=mixer_prefix)

    def forward(
        self, hidden_TD: torch.Tensor, modulation: Modulation, context_mixer: Any, layout: CanvasLayout
    ) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        weight_D, eps = self.norm.weight, self.norm.variance_epsilon
        if self.kind in "*M":
            # trained with the norm fused into the projection, hence after the modulation (docs/model.md#denoiser-pass)
            out_TD = self.mixer(modulate_norm(hidden_TD, weight_D, eps, modulation), context_mixer, layout)
        else:
            out_TD = self.mixer(norm_modulate(hidden_TD, weight_D, eps, modulation))
        return gate_add(out_TD, hidden_TD, modulation)


class DenoiserTower(nn.Module):
    """Embedding, layers, final norm, head and time conditioning of the denoiser."""

    def __init__(self, vllm_config: VllmConfig, max_canvas_length: int, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            vocab, hidden, quant_config=quant_config, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            DenoiserLayer(kind, config, vllm_config, f"{prefix}.layers.{index}")
            for index, kind in enumerate(config.hybrid_override_pattern)
        )
        self.norm_f = RMSNorm(hidden, eps=config.layer_norm_epsilon)
        self.lm_head = ParallelLMHead(vocab, hidden, quant_config=quant_config, prefix=f"{prefix}.lm_head")
        self.logits_processor = LogitsProcessor(vocab)
        self.conditioning = TimeConditioning(config, max_canvas_length)

    def forward(
        self, token_T: torch.Tensor, level_index_R: torch.Tensor, layout: CanvasLayout, context_layers: nn.ModuleList
    ) -> torch.Tensor:
        """One denoise pass (reference: ``_run_denoiser_step_diffusion``).

        Args:
            token_T: int64 [T], canvas tokens, the mask id where undecided.
            level_index_R: int64 [R], noise level of each row, see ``decoding.noise_level.level_index``.
            layout: how the canvases lie in T.
            context_layers: the context tower's layers; layer i of this tower reads layer i's caches.

        Returns:
            Final hidden states, model dtype [T, D]; row t is about the token **at** position t.

        """
        level_R = level_index_R
        if layout.unmodulated_R is not None:
            level_R = torch.where(layout.unmodulated_R, UNMODULATED, level_index_R)
        hidden_TD = self.embed_tokens(token_T)
        for index, layer in enumerate(self.layers):
            modulation = self.conditioning.modulation(index, level_R, layout.row_T)
            hidden_TD = layer(hidden_TD, modulation, context_layers[index].mixer, layout)
        return self.norm_f(hidden_TD)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits of the denoiser's own head, [N, V] in the model's dtype, all-gathered: the same on every
        tensor-parallel rank. Whatever sums over them does so in fp32."""
        return self.logits_processor(self.lm_head, hidden_ND)
