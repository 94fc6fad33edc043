"""Checkpoints that are stored quantised: what ``quantization_config`` is read as, that every tensor of the real model
has a place in vLLM's layers whichever layout it has, and that a broken one is refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear as linear_kernels
from vllm.model_executor.layers.fused_moe import RoutedExperts, unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.oracle import int8, nvfp4, unquantized
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4,
    compressed_tensors_moe_w8a8_int8,
)
from vllm.platforms.interface import PlatformEnum

from tests.test_fp8 import gpu_modules, tower_of  # noqa: F401 - a fixture
from tests.test_loading import REAL_CONFIG
from vllm_twotower.commands.quantize import LEFT, quantize_checkpoint
from vllm_twotower.models.entry import NemotronHTwoTowerForCausalLM
from vllm_twotower.models.stored_quantization import EXPERT, StoredQuantization
from vllm_twotower.models.tensor_shapes import MATRIX_END, checkpoint_shapes, checkpoint_tensors
from vllm_twotower.models.weights import (
    CHECKPOINT_TO_MODULE,
    NOT_IN_CHECKPOINTS,
    check_filled,
    check_weights,
    find_checkpoint_name,
)
from vllm_twotower.planning.inspection import inspect
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.tower_sizes import Tower, TowerSizes

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


def compressed(layout, ignore=LEFT, **targets_of_presets):
    """What llm-compressor would write for compressed-tensors' presets."""
    config = QuantizationConfig(config_groups=targets_of_presets, format=layout, ignore=list(ignore))
    return config.model_dump(mode="json")


HEADS = ["lm_head", "context_lm_head"]
LAYOUTS = {
    "FP8 per channel": compressed("float-quantized", FP8_DYNAMIC=["Linear"]),
    # of experts vLLM compares numbers as it loads, which the meta device has not
    "FP8 per tensor, static inputs": compressed("float-quantized", [*LEFT, r"re:.*\.experts\."], FP8=["Linear"]),
    "INT8": compressed("int-quantized", W8A8=["Linear"]),
    "NVFP4 experts": compressed("nvfp4-pack-quantized", NVFP4=[r"re:.*\.experts\.\d+\.(up|down)_proj$"]),
    "NVFP4 experts, FP8 in one tower's Mamba": {
        **compressed("mixed-precision", NVFP4=[r"re:.*\.experts\."], FP8_DYNAMIC=[r"re:denoiser_tower\..*\.in_proj"]),
        "format": "mixed-precision",
    },
    "NVFP4 but for some, inputs as they are": compressed(
        "nvfp4-pack-quantized",
        [*LEFT, r"re:context_tower\..*\.[qkvo]_proj", "denoiser_tower.layers.0.mixer.in_proj"],
        NVFP4A16=["Linear"],
    ),
    "ModelOpt FP8": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": HEADS},
    "ModelOpt NVFP4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["*lm_head*", "context_tower.layers.5.mixer*", "denoiser_tower.layers.1.mixer.experts.*"],
    },
    "ModelOpt before 0.31": {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "denoiser_tower.layers.4.*"]},
    },
}
for group, layout in (("NVFP4", "nvfp4-pack-quantized"), ("FP8_DYNAMIC", "float-quantized")):
    LAYOUTS["NVFP4 experts, FP8 in one tower's Mamba"]["config_groups"][group]["format"] = layout


@pytest.fixture
def gpu_kernels(monkeypatch, gpu_modules):  # noqa: F811 - the fixture
    """Layers ask for the kernel that will run them when they are built, and a CPU has none for most: nothing runs."""
    emulation, marlin = linear_kernels.EmulationNvFp4LinearKernel, linear_kernels.MarlinNvFp4LinearKernel
    monkeypatch.setitem(linear_kernels._POSSIBLE_NVFP4_KERNELS, PlatformEnum.CPU, [emulation])
    monkeypatch.setattr(marlin, "is_supported", lambda *_: (True, None))
    backend = unquantized.UnquantizedMoeBackend.TRITON, None
    monkeypatch.setattr(unquantized_fused_moe_method, "select_unquantized_moe_backend", lambda *_, **__: backend)
    for module in (compressed_tensors_moe_w4a4_nvfp4, modelopt):
        monkeypatch.setattr(module, "select_nvfp4_moe_backend", lambda *_, **__: (nvfp4.NvFp4MoeBackend.MARLIN, None))
    triton = int8.Int8MoeBackend.TRITON, None
    monkeypatch.setattr(compressed_tensors_moe_w8a8_int8, "select_int8_moe_backend", lambda *_, **__: triton)


def real_config(folder, quantization):
    content = {**REAL_CONFIG, "quantization_config": quantization}
    if "quantization" in quantization:  # where ModelOpt had it before 0.31
        content.pop("quantization_config")
        (folder / "hf_quant_config.json").write_text(json.dumps(quantization))
    (folder / "config.json").write_text(json.dumps(content))
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=4096,
        additional_config={"diffusion": True},
        kv_cache_memory_bytes=1 << 30,
    ).create_engine_config()


SLOW = ("INT8", "NVFP4 experts", "NVFP4 but for some, inputs as they are", "ModelOpt before 0.31")


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LAYOUTS])
def test_every_tensor_of_the_real_model_reaches_a_parameter(tmp_path, single_process_group, gpu_kernels, layout):
    """On the meta device: vLLM's own loaders run with the real shapes and dtypes. And vLLM quantises the layers that we
    think it does, of the size that ``inspect`` prints."""
    config = real_config(tmp_path, LAYOUTS[layout])
    with set_current_vllm_config(config), single_process_group(config), torch.device("meta"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = NemotronHTwoTowerForCausalLM(vllm_config=config)
            specs = checkpoint_tensors(config.model_config.hf_config)
            stored = ((n, torch.empty(s.shape, dtype=TORCH_DTYPES[s.dtypes[0]])) for n, s in specs.items())
            loaded = model.load_weights(stored)
        finally:
            torch.set_default_dtype(torch.float32)
    left = {n for n, _ in model.named_parameters() if not NOT_IN_CHECKPOINTS.search(n)} - loaded
    assert left == set()

    by_vllm = set()
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedExperts):
            if "Unquantized" not in type(layer.quant_method).__name__:
                by_vllm.add(find_checkpoint_name(name.removesuffix(".routed_experts")))
        elif isinstance(layer, LinearBase) and not isinstance(layer.quant_method, UnquantizedLinearMethod):
            by_vllm.add(find_checkpoint_name(name))
    stated = config.model_config.hf_config.quantization_config
    quantization = StoredQuantization.read(stated)
    matrices = [n for n in checkpoint_shapes(SimpleNamespace(**REAL_CONFIG)) if n.endswith(MATRIX_END)]
    modules = [n.removesuffix(".weight") for n in matrices]
    by_us = {m if (e := EXPERT.match(m)) is None else e[1] for m in modules if quantization.scheme_of(m) is not None}
    by_us = {
        n.replace(f".{part}_proj", ".qkv_proj") for n in by_us for part in "qkv" if n.endswith(f".{part}_proj")
    } | {n for n in by_us if not n.endswith((".q_proj", ".k_proj", ".v_proj"))}
    assert by_vllm == by_us
    assert by_us

    held = dict.fromkeys(Tower, 0)
    for name, parameter in model.named_parameters():
        if not NOT_IN_CHECKPOINTS.search(name):
            # the router is in bf16 on the GPUs that matter; here vLLM holds it in fp32
            width = 2 if name.endswith(".gate.weight") else parameter.itemsize
            held[tower_of(name)] += parameter.numel() * width
    facts = ModelFacts.from_config({**REAL_CONFIG, "quantization_config": stated})
    for tower in Tower:
        # layers that are packed from several hold a number for each, of which a checkpoint may have one
        assert held[tower] == pytest.approx(TowerSizes.of(facts, tower).resident_bytes(), abs=2e5), (
            "what inspect prints"
        )


def test_vllm_still_matches_patterns_with_its_own_names():
    """Death test of ``name_layers_as_checkpoint``; that it works, the test above shows."""
    config = CompressedTensorsConfig.from_config(LAYOUTS["NVFP4 experts, FP8 in one tower's Mamba"])
    config.apply_vllm_mapper(CHECKPOINT_TO_MODULE.get_rename_mapper())
    linear = torch.nn.Linear(1, 1)
    assert config.get_scheme_dict(linear, "denoiser.layers.0.mixer.in_proj") is None
    assert config.get_scheme_dict(linear, find_checkpoint_name("denoiser.layers.0.mixer.in_proj")) is not None


def test_what_each_layout_weighs(tmp_path):
    """The table in docs/quantization.md."""
    gigabytes = {}
    for layout in ("FP8 per channel", "NVFP4 experts", "ModelOpt FP8"):
        real_config(tmp_path, LAYOUTS[layout])
        report = inspect(str(tmp_path))
        gigabytes[layout] = round(sum(t["resident_bytes"]["stored"] for t in report["towers"].values()) / 1e9, 1)
        assert report["checkpoint"]["quantized_matrices"]
    assert gigabytes == {"FP8 per channel": 64.8, "NVFP4 experts": 41.9, "ModelOpt FP8": 64.6}


# ---- what is refused -------------------------------------------------------------------------------------------------


def changed(layout, **changes):
    return {**LAYOUTS[layout], **changes}


def grouped(**weights):
    config = json.loads(json.dumps(LAYOUTS["INT8"]))
    config["config_groups"]["W8A8"]["weights"] |= weights
    return config


REFUSED = {
    "unknown method": ({"quant_method": "awq", "bits": 4}, "quant_method='awq' does not load here: use FP8"),
    "no method": ({"config_groups": {}}, "quant_method=''"),
    "no groups": (changed("INT8", config_groups={}), "has no config_groups with targets"),
    "four bits": (grouped(num_bits=4, strategy="group", group_size=128), "W8A8: weights of num_bits=4, type='int'"),
    "asymmetric": (grouped(symmetric=False), "symmetric=False"),
    "another format": (changed("INT8", format="marlin-24"), "in format 'marlin-24' do not load here"),
    "unknown algorithm": (changed("ModelOpt FP8", quant_algo="W4A8_AWQ"), "quant_algo='W4A8_AWQ' does not load here"),
    "another group": (changed("ModelOpt NVFP4", group_size=32), "quant_algo='NVFP4' with group_size=32"),
    "a head": (changed("ModelOpt FP8", ignore=["context_lm_head"]), "does not ignore lm_head.*add 'lm_head'"),
    "a cache": (changed("FP8 per channel", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme=.*set it to null"),
    "a transform": (changed("INT8", transform_config={"R1": {}}), "transform_config=.*set it to null"),
    "half of a layer": (
        changed("FP8 per channel", ignore=[*LEFT, "context_tower.layers.5.mixer.k_proj"]),
        "q_proj is FP8 per channel.*k_proj is not quantised.*qkv_proj is one layer",
    ),
    "one expert": (
        changed("FP8 per channel", ignore=[*LEFT, "re:.*layers.1.mixer.experts.7.up_proj"]),
        "experts.7.up_proj is not quantised, but .*layers.1.mixer.experts is one layer",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_quantisation_that_does_not_load_is_named(what):
    quantization, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        checkpoint_tensors(SimpleNamespace(**REAL_CONFIG, quantization_config=quantization))


def test_columns_that_nvfp4_cannot_group_are_named():
    config = SimpleNamespace(**{**REAL_CONFIG, "hidden_size": 2680}, quantization_config=LAYOUTS["NVFP4 experts"])
    with pytest.raises(ValueError, match=r"experts.0.up_proj has 2680 columns, and NVFP4 needs a multiple of 16"):
        checkpoint_tensors(config)


@pytest.fixture
def broken(tmp_path, tiny_moe):
    """An INT8 copy of a golden checkpoint with its tensors changed."""

    def make(change):
        folder = tmp_path / "int8"
        quantize_checkpoint(tiny_moe.path, folder, "int8", report=lambda _: None)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


WEIGHT = "denoiser_tower.layers.3.mixer.q_proj.weight"
SCALE = f"{WEIGHT}_scale"
BROKEN = {
    "scale missing": (lambda t: t.pop(SCALE), f"lacks {SCALE}, which INT8 per channel, dynamic inputs needs"),
    "weight missing": (lambda t: t.pop(WEIGHT), f"lacks {WEIGHT}, which INT8"),
    "scale of another shape": (
        lambda t: t.update({SCALE: t[SCALE].flatten()}),
        rf"{SCALE} has shape \[128\], but config.json asks for \[128, 1\] \(INT8 per channel",
    ),
    "not quantised": (
        lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}),
        rf"{WEIGHT} holds BF16: INT8 per channel, dynamic inputs asks for I8",
    ),
    "quantised too much": (
        lambda t: t.update({"t_block.1.weight": t["t_block.1.weight"].to(torch.int8)}),
        "t_block.1.weight holds I8: weights have to be floating point",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_quantised_checkpoint_is_named_before_anything_starts(broken, what):
    change, message = BROKEN[what]
    args = EngineArgs(model=str(broken(change)), skip_tokenizer_init=True, additional_config={"diffusion": True})
    with pytest.raises(ValueError, match=message):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALE), f"1 missing: {SCALE}"),
        (
            lambda t: t.update({"lm_head.weight_scale": t[SCALE].clone()}),
            "1 not part of the model: lm_head.weight_scale",
        ),
    ],
)
def test_loading_is_as_strict_without_a_folder_to_look_into(broken, change, message):
    """As for a name on the hub, whose files nobody looks at beforehand."""
    folder = broken(change)
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match=message):
        list(check_weights(load_file(folder / "model.safetensors").items(), config, with_denoiser=True))


def test_a_layer_that_got_no_values_is_named():
    filled = {"model.layers.0.mixer.in_proj.weight", "model.layers.3.mixer.qkv_proj.weight"}
    scale = "model.layers.3.mixer.attn.k_scale"
    check_filled([*filled, scale], filled)
    with pytest.raises(ValueError, match=r"in_proj.weight_scale got no values; name the layers in the list"):
        check_filled([*filled, "model.layers.0.mixer.in_proj.weight_scale"], filled)
