"""The line at start-up that says what denoise passes run on."""

import types

from torch import nn

from tests.harness.engine import start_engine
from vllm_twotower.models.kernel_names import name_attention, name_experts
from vllm_twotower.runtime import model_state


def test_start_up_says_which_kernels_the_denoiser_uses(tiny_moe, monkeypatch):
    said = []
    monkeypatch.setattr(model_state.logger, "info", lambda text, *args: said.append(text % args))
    with start_engine(tiny_moe.path):
        pass
    assert len(said) == 1
    assert said[0].startswith(
        "Denoise passes run on these kernels: attention CPU_ATTN, experts PortableMoE, this package's ops "
    )


class FlashExperts:
    """Named as a kernel of vLLM's would be."""


def test_names_are_those_of_what_vllm_has_put_in():
    backend = types.SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    versions = types.SimpleNamespace(vllm_flash_attn_version=3)
    assert name_attention(types.SimpleNamespace(impl=versions, attn_backend=backend)) == "FLASH_ATTN (version 3)"
    experts = nn.Module()
    assert name_experts(experts) == "Module"
    experts.routed = nn.Module()
    experts.routed.quant_method = types.SimpleNamespace(moe_kernel=types.SimpleNamespace(fused_experts=FlashExperts()))
    assert name_experts(experts) == "FlashExperts (SimpleNamespace)"
