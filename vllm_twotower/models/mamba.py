"""A canvas through a Mamba-2 layer, from states that stay as they are: what a denoise pass, a verification and a replay
share.

Legend: R rows, S widest canvas, C conv channels, K conv kernel, H heads, P head dim, G groups, N state, Z cache slots.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_v2_sharded_weight_loader
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.model_loader.weight_utils import composed_weight_loader, sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from vllm_twotower.ops import ConvInputs, ScanInputs, seeded_conv


def list_mamba_mixers(context_layers: Iterable[Any]) -> list[Any]:
    """The Mamba mixers among the context tower's layers, or those that mirror their caches."""
    return [layer.mixer for layer in context_layers if hasattr(layer.mixer, "ssm_state_size")]


def find_state_caches(mixer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A context mixer's caches of conv inputs, [Z, K - 1, C], and of SSM states, [Z, H, P, N]."""
    conv, ssm = mixer.kv_cache[:2]
    return (conv.transpose(1, 2) if is_conv_state_dim_first() else conv), ssm


class ShardedConv(nn.Module):
    """Weights of the depthwise convolution, sharded like the channels x, B, C that it runs over."""

    def __init__(self, sizes: Sequence[int], kernel: int, use_bias: bool) -> None:
        super().__init__()
        tp_size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        loader = mamba_v2_sharded_weight_loader([(size, 0, False) for size in sizes], tp_size, rank)
        channels = sum(sizes) // tp_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel), requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": loader})
        self.bias = None
        if use_bias:
            self.bias = nn.Parameter(torch.empty(channels), requires_grad=False)
            set_weight_attrs(self.bias, {"weight_loader": loader})


RECURRENCE_TENSORS = (".conv1d.weight", ".conv1d.bias", ".A_log", ".D", ".dt_bias")
"""Ends of the names of the tensors that ``add_recurrence`` is loaded from."""


def add_recurrence(mixer: nn.Module, config: Any) -> None:
    """Give a mixer the parameters that a state is advanced with, sharded: ``conv1d``, ``A``, ``D`` and ``dt_bias``."""
    heads = config.mamba_num_heads // get_tensor_model_parallel_world_size()
    inner, groups = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
    mixer.conv1d = ShardedConv([inner, groups, groups], config.conv_kernel, config.use_conv_bias)
    mixer.A = nn.Parameter(torch.empty(heads, dtype=torch.float32), requires_grad=False)
    mixer.D = nn.Parameter(torch.empty(heads), requires_grad=False)
    mixer.dt_bias = nn.Parameter(torch.empty(heads), requires_grad=False)
    by_head = sharded_weight_loader(0)
    set_weight_attrs(mixer.A, {"weight_loader": composed_weight_loader(by_head, lambda a: -torch.exp(a.float()))})
    set_weight_attrs(mixer.D, {"weight_loader": by_head})
    set_weight_attrs(mixer.dt_bias, {"weight_loader": by_head})


def convolve(
    weights: Any,
    raw_RSC: torch.Tensor,
    dt_RSH: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    slot_R: torch.Tensor,
) -> ScanInputs:
    """What the layer's scan reads, after its convolution.

    Args:
        weights: of either tower's layer: ``conv1d``, ``A``, ``D`` and ``dt_bias``.
        raw_RSC: inputs of the convolution.
        dt_RSH: raw step sizes.
        caches: of conv inputs, [Z, K - 1, C], and of SSM states, [Z, H, P, N].
        slot_R: int64, each row's slot in them.

    """
    conv_cache_ZKC, ssm_cache_ZHPN = caches
    heads, head_dim, state_size = ssm_cache_ZHPN.shape[1:]
    inner = heads * head_dim
    of_groups = (raw_RSC.shape[-1] - inner) // 2
    conv_inputs = ConvInputs(
        x_RSC=raw_RSC,
        weight_CK=_conv_weight(weights),
        bias_C=weights.conv1d.bias,
        cache_ZKC=conv_cache_ZKC,
        slot_R=slot_R,
    )
    x, b, c = seeded_conv(conv_inputs).split([inner, of_groups, of_groups], dim=-1)
    return ScanInputs(
        x_RSHP=x.unflatten(-1, (heads, head_dim)),
        dt_RSH=dt_RSH,
        a_H=weights.A,
        b_RSGN=b.unflatten(-1, (-1, state_size)),
        c_RSGN=c.unflatten(-1, (-1, state_size)),
        skip_H=weights.D,
        dt_bias_H=weights.dt_bias,
        state_ZHPN=ssm_cache_ZHPN,
        slot_R=slot_R,
    )


def _conv_weight(weights: Any) -> torch.Tensor:
    """[C, K]. vLLM's layer keeps a buffer of it, because on a CPU its linear layer's own is packed in place in bf16."""
    return weights.conv_weights if hasattr(weights, "conv_weights") else weights.conv1d.weight.squeeze(1)
