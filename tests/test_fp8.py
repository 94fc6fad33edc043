"""``--quantization fp8``: which layers of both towers it reaches, which it leaves alone, and what they then weigh.

For a bf16 checkpoint vLLM 0.32 reads ``fp8`` as ``fp8_per_tensor``: ``OnlineQuantizationConfig`` gives every
``LinearBase`` and ``RoutedExperts`` that was built with a ``quant_config`` a method that quantises as it loads.
"""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.quantization.online import fp8 as online_fp8
from vllm.model_executor.model_loader.reload import layerwise

from tests.harness.engine import start_engine
from tests.test_loading import REAL_CONFIG, real_engine_config
from vllm_twotower import diffusion_params
from vllm_twotower.models import entry, twotower
from vllm_twotower.models.tensor_shapes import checkpoint_shapes
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.tower_sizes import Precision, Tower, TowerSizes

FP8_METHODS = (online_fp8.Fp8PerTensorOnlineLinearMethod, online_fp8.Fp8PerTensorOnlineMoEMethod)
MIXER_LAYERS = {"M": ("in_proj", "out_proj"), "*": ("qkv_proj", "o_proj"), "E": ("up_proj", "down_proj", "experts")}


@pytest.fixture
def gpu_modules(monkeypatch):
    """Build the fused experts, as a GPU does: a platform check of vLLM's and our own experts keep them off a CPU."""
    from vllm.model_executor.layers.fused_moe import config as fused_moe_config
    from vllm.platforms import current_platform

    class LikeCuda:
        def __getattr__(self, name):
            return getattr(current_platform, name)

        def is_cuda_alike(self):
            return True

    monkeypatch.setattr(fused_moe_config, "current_platform", LikeCuda())
    monkeypatch.setattr(twotower, "running_on_cpu", nullcontext)


def tower_of(module_name):
    return Tower.DENOISER if module_name.startswith("denoiser.") else Tower.CONTEXT


@pytest.fixture
def complete(monkeypatch):
    """Layers of which the online loader had every element; it stops there, before the quantiser that a CPU lacks."""
    layers = []
    monkeypatch.setattr(layerwise, "_layerwise_process", lambda layer, _: layers.append(layer))
    return layers


def test_fp8_reaches_every_linear_and_expert_of_both_towers_and_nothing_else(
    tmp_path, single_process_group, gpu_modules, complete
):
    config = real_engine_config(tmp_path, quantization="fp8")
    with set_current_vllm_config(config), single_process_group(config), torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = entry.NemotronHTwoTowerForCausalLM(vllm_config=config)
            shapes = checkpoint_shapes(config.model_config.hf_config)
            loaded = model.load_weights((name, torch.empty(shape)) for name, shape in shapes.items())
        finally:
            torch.set_default_dtype(torch.float32)
    quantised = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "quant_method", None), FP8_METHODS)}
    expected = {
        f"{tower}layers.{index}.mixer.{'shared_experts.' if part in ('up_proj', 'down_proj') else ''}{part}"
        for tower in ("model.", "denoiser.")
        for index, kind in enumerate(REAL_CONFIG["hybrid_override_pattern"])
        for part in MIXER_LAYERS[kind]
    }
    assert {name.removesuffix(".routed_experts") for name in quantised} == expected
    assert {name for name, _ in model.named_parameters()} - loaded == set()
    assert {id(layer) for layer in complete} == {id(layer) for layer in quantised.values()}

    held = Counter()
    for name, parameter in model.named_parameters():
        layer, _, last = name.rpartition(".")
        width = parameter.itemsize
        if layer in quantised and last in ("weight", "w13_weight", "w2_weight"):
            width = 1
        elif name.endswith(".gate.weight"):
            width = 2  # bf16 on sm_90 and sm_100; elsewhere, as here, vLLM holds the router in fp32
        held[tower_of(name)] += parameter.numel() * width
    facts = ModelFacts.from_config(REAL_CONFIG)
    sizes = {tower: TowerSizes.of(facts, tower) for tower in Tower}
    assert held == {t: s.resident_bytes(Precision.FP8) for t, s in sizes.items()}, "what inspect prints"
    assert sum(held.values()) < 0.9 * 80e9, "both towers in vLLM's share of one 80 GB GPU"


def test_fp8_and_fp8_per_tensor_are_the_same(tmp_path):
    assert (
        real_engine_config(tmp_path, quantization="fp8").quant_config.args
        == real_engine_config(tmp_path, quantization="fp8_per_tensor").quant_config.args
    )


def quantise(x, scale):
    """What vLLM's CPU build lacks of ``torch.ops._C.static_scaled_fp8_quant``, one scale for all."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


CHECKPOINT_NAME = {"model": "context_tower", "denoiser": "denoiser_tower"}


@pytest.mark.usefixtures("without_amx")
def test_a_checkpoint_is_quantised_as_it_loads_and_still_answers(monkeypatch, tiny_moe):
    """The engine in bf16 on a CPU, dense layers in FP8 (the portable experts stay as they are)."""
    monkeypatch.setattr(online_fp8, "ops", SimpleNamespace(scaled_fp8_quant=quantise))
    tensors = load_file(tiny_moe.path / "model.safetensors")
    with start_engine(tiny_moe.path, dtype="bfloat16", quantization="fp8") as e:
        checked = Counter()
        for name, module in e.model.named_modules():
            if not name.endswith((".in_proj", ".out_proj", ".o_proj", ".up_proj", ".down_proj")):
                continue
            assert module.weight.dtype == torch.float8_e4m3fn, name
            tower, _, rest = name.partition(".")
            stored = tensors[f"{CHECKPOINT_NAME[tower]}.{rest}.weight"].float()
            read = module.weight.t().float() * module.weight_scale
            # 3 mantissa bits; below the smallest normal number, half of the smallest step
            bound = (stored.abs() * 2**-4).clamp_min(2**-10 * float(module.weight_scale)) + stored.abs() * 2**-8
            assert bool(((read - stored).abs() <= bound).all()), name
            checked[tower] += 1
        assert checked["model"] == checked["denoiser"] > 10
        for name, parameter in e.model.denoiser.conditioning.named_parameters():
            assert torch.equal(parameter, tensors[name].bfloat16()), name
        for name, head in (("context_lm_head", e.model.lm_head), ("lm_head", e.model.denoiser.lm_head)):
            assert torch.equal(head.weight, tensors[f"{name}.weight"].bfloat16())
        params = diffusion_params(max_tokens=16, temperature=0.0, ignore_eos=True, detokenize=False)
        assert [len(t) for t in e.tokens([[5, 6, 7, 8]], params)] == [16]
