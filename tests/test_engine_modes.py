"""Mask diffusion, AR and mock-AR in one engine and one batch, each equal to NVIDIA's reference."""

import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params, greedy_params
from vllm_twotower.core import MASK_TOKEN_ID


@pytest.mark.parametrize("name", ["tiny_moe", pytest.param("tiny_mlp", marks=pytest.mark.slow)])
def test_mock_ar_is_the_references(name, request):
    golden = request.getfixturevalue(name)
    with start_engine(golden.path) as e:
        outputs = e.tokens([c["prompt"] for c in golden.mock_ar], greedy_params("mock_ar", 8))
        assert outputs == [c["output"][:8] for c in golden.mock_ar]
        e.assert_one_tower_per_step()
        stats = e.stats()
        assert stats["denoise_passes"] == stats["committed_tokens"] == 8 * len(golden.mock_ar)
        assert stats["canvases"] == 0
        case = golden.mock_ar[0]  # and never the mask id, which NVIDIA's plain argmax would write here
        assert e.tokens([case["prompt"]], greedy_params("mock_ar", 8, logit_bias={MASK_TOKEN_ID: 100.0})) == outputs[:1]


@pytest.mark.parametrize("prefix_caching", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_modes_in_one_batch_and_none_starves(tiny_moe, prefix_caching):
    diffusion, ar, mock_ar = tiny_moe.cases(16)[5:9], tiny_moe.ar[5:9], tiny_moe.mock_ar[5:9]
    cases = [*diffusion, *ar, *mock_ar]
    params = [golden_params(c) for c in diffusion] + [greedy_params("ar", 10)] * 4 + [greedy_params("mock_ar", 10)] * 4
    with start_engine(tiny_moe.path, {"passes_per_step": 2}, enable_prefix_caching=prefix_caching) as e:
        outputs = e.tokens([c["prompt"] for c in cases], params, max_steps=150)
        assert outputs == [c["output"][: len(o)] for c, o in zip(cases, outputs, strict=True)]
        assert [len(o) for o in outputs] == [64] * 4 + [10] * 8
        e.assert_one_tower_per_step()
        # what mock-AR left in the prefix cache is clean: the same prompts and their continuations, from the cache
        continued = [c["prompt"] + c["output"][:16] for c in diffusion]
        again = e.tokens(continued, [golden_params(c) for c in diffusion], max_steps=150)
        assert [o[:48] for o in again] == [c["output"][16:] for c in diffusion]
        assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)


def test_mock_ar_leaves_no_noise_in_the_prefix_cache(tiny_moe):
    """A request that ends on a KV block's last slot, then one that would hit that block."""
    case = tiny_moe.mock_ar[7]
    length = len(case["prompt"])
    assert length == 120
    filled = 128 - length
    longer = case["prompt"] + case["output"][: filled + 4]
    with start_engine(tiny_moe.path, enable_prefix_caching=False) as e:
        expected = e.tokens([longer], greedy_params("ar", 8))
    with start_engine(tiny_moe.path, enable_prefix_caching=True) as e:
        for max_tokens in (filled, filled + 1, filled + 4):
            e.tokens([case["prompt"]], greedy_params("mock_ar", max_tokens))
            assert e.tokens([longer], greedy_params("ar", 8)) == expected


def test_a_one_token_prompt_is_refused_in_mock_ar(tiny_moe):
    with start_engine(tiny_moe.path) as e:
        with pytest.raises(VLLMValidationError, match="send 2 tokens or more"):
            e.tokens([[7]], greedy_params("mock_ar", 4))
        assert len(e.tokens([[7]], greedy_params("ar", 4))[0]) == 4
        assert len(e.tokens([[7, 3]], greedy_params("mock_ar", 4))[0]) == 4
