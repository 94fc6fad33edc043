"""The engine against NVIDIA's reference: token for token and pass for pass, all cases of a checkpoint in one call."""

import pytest
from vllm import SamplingParams
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import diffusion_stats
from vllm_twotower.runtime.sampler import CanvasSampler
from vllm_twotower.runtime.scheduler import BlockCommitScheduler

KV_BLOCK = 128


@pytest.mark.parametrize(
    ("name", "canvas_length"), [("tiny_moe", 16), ("tiny_mlp", 16), ("tiny_mlp", 8), ("tiny_mlp", 32)]
)
def test_all_golden_cases_in_one_generate_call(name, canvas_length, request):
    golden = request.getfixturevalue(name)
    cases = golden.cases(canvas_length)
    options = {"canvas_length": canvas_length, "passes_per_step": 16}
    with start_engine(golden.path, options, enable_prefix_caching=True) as e:
        outputs = e.llm.generate(
            [{"prompt_token_ids": c["prompt"]} for c in cases], [golden_params(c) for c in cases], use_tqdm=False
        )
        assert [list(o.outputs[0].token_ids) for o in outputs] == [c["output"] for c in cases]
        stats = diffusion_stats(e.llm)
        assert stats["denoise_passes"] == sum(c["nfe"] for c in cases)
        assert stats["canvases"] == sum(len(c["output"]) // canvas_length for c in cases)
        e.assert_one_tower_per_step()
        # the runner, sampler and scheduler that ran are the ones this project is about
        assert isinstance(e.runner, GPUModelRunner)
        assert isinstance(e.runner.sampler, CanvasSampler)
        assert isinstance(e.scheduler, BlockCommitScheduler)
        assert {g.kv_cache_spec.block_size for g in e.runner.kv_cache_config.kv_cache_groups} == {KV_BLOCK}
    crossings = [
        start
        for c in cases
        for start in range(len(c["prompt"]), len(c["prompt"]) + len(c["output"]), canvas_length)
        if start // KV_BLOCK != (start + canvas_length - 1) // KV_BLOCK
    ]
    assert crossings, "no canvas crossed a KV block"


@pytest.mark.parametrize("name", ["tiny_moe", pytest.param("tiny_mlp", marks=pytest.mark.slow)])
def test_without_diffusion_the_engine_decodes_autoregressively(name, request):
    golden = request.getfixturevalue(name)
    with start_engine(golden.path, diffusion=None) as e:
        assert e.model.denoiser is None
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
        outputs = e.tokens([c["prompt"] for c in golden.ar], params)
        assert outputs == [c["output"][:16] for c in golden.ar]
