"""Shims of vLLM's layers, for towers on different ranks and for quantised ones."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.quantization import QuantizationConfig


def record_kv_updates(attention: "Attention", record: "Callable[[str, torch.Tensor, torch.Tensor], None]") -> None:
    """``record(layer_name, key, value)`` sees what a layer is about to write into its cache.

    Symptom: the denoiser's ranks need the same keys and values, and a cache's layout is its backend's own affair.
    Upstream: vllm.model_executor.layers.attention.Attention.impl,
        vllm.v1.attention.backends.flash_attn.FlashAttentionImpl.do_kv_cache_update
    Removed when: a KV connector can follow every step of a layer within one engine.
    Test: tests/test_placement.py::test_split_towers_write_the_references_tokens
    """
    impl: Any = attention.impl
    update = impl.do_kv_cache_update

    @functools.wraps(update)
    def record_and_update(layer: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        record(layer.layer_name, key, value)
        update(layer, key, value, *args, **kwargs)

    impl.do_kv_cache_update = record_and_update


def name_layers_as_checkpoint(quant_config: "QuantizationConfig", find_checkpoint_name: Callable[[str], str]) -> None:
    """A quantisation finds layers by their names in the checkpoint, which its lists and expressions are written in.

    Symptom: vLLM renames the entries of those lists, but no regular expression and no pattern, and a name that a
        pattern means is another one in each of two towers. Where a mixture of experts has no gate, compressed-tensors
        looks for a projection named None, and for expressions finds none.
    Upstream: vllm.model_executor.layers.quantization.base_config.QuantizationConfig.get_quant_method,
        vllm.model_executor.layers.quantization.base_config.QuantizationConfig.apply_vllm_mapper,
        vllm.model_executor.layers.fused_moe.RoutedExperts
    Removed when: vLLM matches by checkpoint names.
    Test: tests/test_stored_quantization.py::test_vllm_still_matches_patterns_with_its_own_names

    Args:
        quant_config: the engine's; changed in place, once.
        find_checkpoint_name: vLLM's name of a layer -> the checkpoint's.

    """
    from vllm.model_executor.models.utils import WeightsMapper

    if "get_quant_method" in vars(quant_config):
        return
    config: Any = quant_config
    upstream, apply_mapper = config.get_quant_method, config.apply_vllm_mapper

    def get_quant_method(layer: "nn.Module", prefix: str) -> Any:
        gate, up = (getattr(layer, f"ckpt_{part}_proj_name", "") for part in ("gate", "up"))
        if up is not None:
            return upstream(layer, find_checkpoint_name(prefix))
        named: Any = layer
        named.ckpt_up_proj_name = gate
        try:
            return upstream(layer, find_checkpoint_name(prefix))
        finally:
            named.ckpt_up_proj_name = None

    config.get_quant_method = get_quant_method
    # it also prepares the patterns, so it runs, and renames nothing
    config.apply_vllm_mapper = lambda _mapper: apply_mapper(WeightsMapper())


def initialize_without_constructor(module: "nn.Module", **fields: Any) -> None:
    """A module of a vLLM class gets these fields instead of what its constructor makes.

    Symptom: the constructors of Nemotron-H and of its Mamba layer make weights, and a rank that only mirrors the
        context tower's caches has no room for them.
    Upstream: vllm.model_executor.models.nemotron_h.NemotronHForCausalLM,
        vllm.model_executor.layers.mamba.mamba_mixer2.MambaMixer2
    Removed when: a cache can be declared without its layer.
    Test: tests/test_placement.py::test_split_towers_write_the_references_tokens
    """
    from torch import nn

    nn.Module.__init__(module)
    for name, value in fields.items():
        setattr(module, name, value)


def register_layer(vllm_config: "VllmConfig", prefix: str, layer: "nn.Module") -> None:
    """The engine asks a layer for its cache and binds it there, under this name.

    Symptom: layers enter themselves in vLLM's table in their constructors, which a mirrored Mamba layer does without.
    Upstream: vllm.config.CompilationConfig.static_forward_context
    Removed when: a cache can be declared without its layer.
    Test: tests/test_placement.py::test_split_towers_write_the_references_tokens
    """
    vllm_config.compilation_config.static_forward_context[prefix] = layer
