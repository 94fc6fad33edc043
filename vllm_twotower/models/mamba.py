"""A canvas through a Mamba-2 layer, from states that stay as they are: what a denoise pass and a verification share.

Legend: R rows, S widest canvas, C conv channels, K conv kernel, H heads, P head dim, G groups, N state, Z cache slots.
"""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from vllm_twotower.ops import ConvInputs, ScanInputs, seeded_conv


def mamba_mixers(context_layers: Iterable[Any]) -> list[Any]:
    """The Mamba mixers among the context tower's layers, or those that mirror their caches."""
    return [layer.mixer for layer in context_layers if hasattr(layer.mixer, "ssm_state_size")]


def state_caches(mixer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A context mixer's caches of conv inputs, [Z, K - 1, C], and of SSM states, [Z, H, P, N]."""
    conv, ssm = mixer.kv_cache[:2]
    return (conv.transpose(1, 2) if is_conv_state_dim_first() else conv), ssm


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
