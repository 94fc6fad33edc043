"""The line at start-up that says what denoise passes run on."""

import logging
import types

from torch import nn

from tests.harness.engine import start_engine
from vllm_twotower.models.kernel_names import name_attention, name_experts


def test_start_up_says_which_kernels_the_denoiser_uses(tiny_moe, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.twotower")
    with start_engine(tiny_moe.path):
        pass
    said = [r.getMessage() for r in caplog.records if "Denoise passes run on" in r.getMessage()]
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
