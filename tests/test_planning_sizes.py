"""Sizes by arithmetic equal those of real tensors, of the real module tree and of vLLM's own cache arithmetic."""

import json

import pytest
from safetensors.torch import load_file

from tests.harness.goldens import GOLDENS
from tests.test_loading import REAL_CONFIG
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.planning.checkpoint_folder import CheckpointFolder
from vllm_twotower.planning.gpus import GPUS
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.placement import CachePages, Placement, SplitTraffic, fit_towers
from vllm_twotower.planning.tower_sizes import Part, Precision, Tower, TowerSizes, part_of, tower_of

REAL = ModelFacts.from_config(REAL_CONFIG)
TOWERS = {tower: TowerSizes.of(REAL, tower) for tower in Tower}


@pytest.mark.parametrize("folder", [GOLDENS / "tiny-moe", GOLDENS / "tiny-mlp", DEMO_MODEL], ids=lambda p: p.name)
def test_counts_equal_the_tensors_of_real_checkpoints(folder):
    tensors = load_file(folder / "model.safetensors")
    checkpoint = CheckpointFolder.read(folder)
    facts = ModelFacts.from_config(checkpoint.config)
    assert {n: t.num_bytes for n, t in checkpoint.tensors.items()} == {n: t.nbytes for n, t in tensors.items()}
    for tower in Tower:
        sizes = TowerSizes.of(facts, tower)
        own = {name: tensor for name, tensor in tensors.items() if tower_of(name) is tower}
        assert sizes.num_parameters == sum(t.numel() for t in own.values())
        assert sizes.resident_bytes() == sum(t.nbytes for t in own.values())
        for part in Part:
            assert sizes.parameters[part] == sum(t.numel() for n, t in own.items() if part_of(n) is part)


def test_the_real_model_has_the_published_sizes():
    """What the shapes give: ``docs/model.md#sizes``."""
    context, denoiser = TOWERS[Tower.CONTEXT], TOWERS[Tower.DENOISER]
    assert context.num_parameters == pytest.approx(31.578e9, rel=1e-4)
    assert context.num_parameters + denoiser.num_parameters == pytest.approx(63.19e9, rel=1e-4)
    assert context.resident_bytes() + denoiser.resident_bytes() == pytest.approx(126.4e9, rel=1e-3)
    assert context.active_parameters + context.parameters[Part.EMBEDDING] == pytest.approx(3.580e9, rel=1e-3)
    assert denoiser.parameters[Part.TIME] == pytest.approx(29.6e6, rel=1e-2)
    assert REAL.kv_bytes_per_token == 6144
    assert 23 * REAL.ssm_bytes_per_layer == pytest.approx(48.2e6, rel=1e-3)
    assert 23 * REAL.conv_bytes_per_layer == 23 * 6144 * 3 * 2


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("context_tower.layers.0.mixer.in_proj.weight", Part.LINEAR),
        ("context_tower.layers.0.mixer.conv1d.weight", Part.MIXER),
        ("context_tower.layers.0.mixer.norm.weight", Part.MIXER),
        ("context_tower.layers.0.norm.weight", Part.REPLICATED),
        ("context_tower.layers.1.mixer.gate.weight", Part.REPLICATED),
        ("context_tower.layers.1.mixer.experts.7.up_proj.weight", Part.EXPERT),
        ("context_tower.layers.1.mixer.shared_experts.up_proj.weight", Part.LINEAR),
        ("denoiser_tower.layers.5.mixer.k_proj.weight", Part.LINEAR),
        ("denoiser_tower.embeddings.weight", Part.EMBEDDING),
        ("lm_head.weight", Part.HEAD),
        ("t_block.1.weight", Part.TIME),
        ("scale_shift_tables.3", Part.REPLICATED),
    ],
)
def test_parts(name, part):
    assert part_of(name) is part


def test_fp8_covers_linears_and_experts_only():
    sizes = TOWERS[Tower.DENOISER]
    saved = sizes.resident_bytes() - sizes.resident_bytes(Precision.FP8)
    assert saved == sizes.parameters[Part.EXPERT] + sizes.parameters[Part.LINEAR]


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_ranks_share_what_is_sharded_and_repeat_the_rest(num_ranks):
    sizes = TOWERS[Tower.DENOISER]
    repeated = sum(sizes.bytes_of(part) for part in (Part.REPLICATED, Part.TIME)) * (num_ranks - 1)
    heads_repeated = sizes.kv_parameters * 2 * max(0, num_ranks // 2 - 1)
    together = sizes.bytes_per_rank(num_ranks) * num_ranks
    assert together == pytest.approx(sizes.resident_bytes() + repeated + heads_repeated, abs=len(Part) * num_ranks)


@pytest.mark.parametrize(
    ("gpu", "num_gpus", "placement", "precision", "fits"),
    [
        ("H100", 1, Placement.COLOCATED, Precision.BF16, False),
        ("H100", 1, Placement.COLOCATED, Precision.FP8, True),
        ("H100", 1, Placement.AR, Precision.BF16, True),
        ("H100", 2, Placement.SPLIT, Precision.BF16, True),
        ("H100", 2, Placement.COLOCATED, Precision.BF16, True),
        ("H200", 1, Placement.COLOCATED, Precision.BF16, True),
        ("H200", 1, Placement.SPLIT, Precision.BF16, False),
        ("B200", 4, Placement.SPLIT, Precision.FP8, True),
    ],
)
def test_what_fits(gpu, num_gpus, placement, precision, fits):
    one = fit_towers(TOWERS, GPUS[gpu], num_gpus, placement, precision, 4096)
    assert (one.num_requests > 0) is fits, one
    assert (one.problem is None) is fits


def test_a_cache_block_is_as_long_as_vllm_makes_it(tmp_path):
    """On a GPU, where attention takes blocks of 16 tokens; vLLM's CPU backend cuts the cache differently."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIG))
    args = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, max_model_len=4096, enable_prefix_caching=False)
    cache = (config := args.create_engine_config()).cache_config
    cache.block_size = 16
    type(current_platform)._align_hybrid_block_size(config, TritonAttentionBackend)
    pages = CachePages.of(REAL, 1)
    assert (cache.block_size, cache.mamba_page_size_padded) == (pages.tokens_per_block, pages.page_bytes)


def test_a_requests_cache_is_counted_in_whole_blocks():
    """23 Mamba layers beside 6 of attention: groups of 6, the fourth Mamba group padded by one."""
    pages = CachePages.of(REAL, 1)
    assert (pages.layers_per_group, pages.attention_groups, pages.mamba_groups) == (6, 1, 4)
    one_block = 6 * pages.page_bytes
    assert pages.bytes_per_request(1) == 5 * one_block
    assert pages.bytes_per_request(pages.tokens_per_block + 1) == 6 * one_block
    exact = REAL.mamba_bytes_per_request + 2 * 2096 * REAL.kv_bytes_per_token
    assert exact <= pages.bytes_per_request(2 * 2096) < 1.1 * exact


def test_traffic_when_split():
    traffic = SplitTraffic.of(REAL, 16)
    assert traffic.state_bytes_per_row == 23 * (64 * 64 * 128 * 4 + 6144 * 3 * 2)
    assert traffic.bytes_per_canvas == 16 * (6144 + 23 * (6144 + 64) * 2)
    assert traffic.bytes_per_denoise_step_back == 17 * 8
