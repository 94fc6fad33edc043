"""What the denoiser's passes run on, in words, from what vLLM has chosen for its layers."""

from collections.abc import Iterable
from typing import Any

from vllm_twotower.models.denoiser_tower import DenoiserTower
from vllm_twotower.ops.backend import select_backend


def describe_kernels(denoiser: DenoiserTower, context_layers: Iterable[Any]) -> str:
    """The kernels of a pass: attention (the context tower's layers run it), experts, and this package's own."""
    attention = next((layer.mixer.attn for layer in context_layers if hasattr(layer.mixer, "attn")), None)
    experts = next((layer.mixer for layer in denoiser.layers if layer.kind == "E"), None)
    parts = {
        "attention": name_attention(attention) if attention is not None else "none",
        "experts": name_experts(experts) if experts is not None else "none",
        "this package's ops": select_backend(denoiser.norm_f.weight).value,
    }
    return ", ".join(f"{part} {name}" for part, name in parts.items())


def name_attention(attention: Any) -> str:
    """The backend of one of vLLM's attention layers; of FlashAttention also its version."""
    version = getattr(attention.impl, "vllm_flash_attn_version", None)
    name = attention.attn_backend.get_name()
    return f"{name} (version {version})" if version is not None else name


def name_experts(experts: Any) -> str:
    """The kernel within one of vLLM's mixtures of experts, and the layout of its weights; without one its class."""
    for module in experts.modules():
        method = getattr(module, "quant_method", None)
        if (kernel := getattr(method, "moe_kernel", None)) is not None:
            return f"{type(kernel.fused_experts).__name__} ({type(method).__name__})"
    return type(experts).__name__
