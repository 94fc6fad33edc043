"""The context tower's caches almost without its weights, for ranks that hold the denoiser only.

The layers register with vLLM under the context tower's own names, so that every rank of the group asks for the same
caches and gets the same blocks and slots. ``split/link.py`` fills them. The few weights are those of the Mamba layers'
recurrence: states cross once a request and are then advanced here.
"""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from vllm_twotower import compat
from vllm_twotower.models.mamba import add_recurrence


class MirroredAttention(nn.Module):
    """What the denoiser uses of a context attention layer: its paged cache, and the sizes of its shard."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        num_heads, num_kv_heads = config.num_attention_heads // tp_size, max(1, config.num_key_value_heads // tp_size)
        self.q_size, self.kv_size = num_heads * config.head_dim, num_kv_heads * config.head_dim
        self.attn = Attention(
            num_heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )


class MirroredMamba(MambaMixer2):
    """A context Mamba layer's state cache, and what its states are advanced with."""

    @classmethod
    def of(cls, config: Any, vllm_config: VllmConfig, prefix: str) -> "MirroredMamba":
        """Make one without the base class's constructor, which would make all of its weights."""
        self = cls.__new__(cls)
        compat.initialize_without_constructor(
            self,
            tp_size=get_tensor_model_parallel_world_size(),
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            intermediate_size=config.mamba_num_heads * config.mamba_head_dim,
            n_groups=config.n_groups,
            ssm_state_size=config.ssm_state_size,
            conv_kernel_size=config.conv_kernel,
            num_spec=vllm_config.num_speculative_tokens,
            use_replayssm=False,
            model_config=vllm_config.model_config,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )
        add_recurrence(self, config)
        compat.register_layer(vllm_config, prefix, self)
        return self


class MirroredLayer(nn.Module):
    """A layer of the mirror; only attention and Mamba layers have anything to mirror."""

    def __init__(self, kind: str, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        mixers = {"*": MirroredAttention, "M": MirroredMamba.of}
        self.mixer = mixers[kind](config, vllm_config, f"{prefix}.mixer") if kind in mixers else None


class ContextMirror(nn.Module):
    """The context tower as a denoiser rank sees it: ``layers[i].mixer`` with its caches."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.layers = nn.ModuleList(
            MirroredLayer(kind, config, vllm_config, f"{prefix}.layers.{index}")
            for index, kind in enumerate(config.hybrid_override_pattern)
        )
