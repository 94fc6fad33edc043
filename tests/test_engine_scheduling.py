"""The same tokens whatever the engine does around them: quorum, passes per step, budgets, queues, preemption, caching
off.

Every test runs under a step bound, so nothing can wait for ever.
"""

import pytest

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params

NUM_CASES = 16


@pytest.fixture(scope="module")
def cases(tiny_moe):
    """Sixteen cases, all prompt lengths and three different step rules among them."""
    return tiny_moe.cases(16)[:10] + tiny_moe.cases(16)[24:30]


def check(e, cases, max_steps=400):
    outputs = e.tokens([c["prompt"] for c in cases], [golden_params(c) for c in cases], max_steps)
    assert outputs == [c["output"] for c in cases]
    assert e.stats()["denoise_passes"] >= sum(c["nfe"] for c in cases)
    e.assert_one_tower_per_step()
    assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)


@pytest.mark.parametrize("commit_quorum", [0, 0.4, 1])
@pytest.mark.parametrize("passes_per_step", [1, 3, 16])
def test_quorum_and_passes_per_step_do_not_change_tokens(tiny_moe, cases, commit_quorum, passes_per_step):
    assert len(cases) == NUM_CASES
    options = {"commit_quorum": commit_quorum, "passes_per_step": passes_per_step}
    with start_engine(tiny_moe.path, options, enable_prefix_caching=False) as e:
        check(e, cases)


@pytest.mark.parametrize("budget", [48, 50])
def test_step_budgets_schedule_whole_canvases(tiny_moe, cases, budget):
    with start_engine(
        tiny_moe.path,
        {"passes_per_step": 16},
        enable_prefix_caching=False,
        max_num_batched_tokens=budget,
        max_num_seqs=16,
    ) as e:
        check(e, cases)


@pytest.mark.parametrize("prefix_caching", [pytest.param(True, marks=pytest.mark.slow), False])
def test_more_prompts_than_places(tiny_moe, cases, prefix_caching):
    with start_engine(
        tiny_moe.path, {"passes_per_step": 16}, enable_prefix_caching=prefix_caching, max_num_seqs=4
    ) as e:
        check(e, cases)


@pytest.mark.parametrize("prefix_caching", [pytest.param(True, marks=pytest.mark.slow), False])
def test_preemption_when_kv_memory_is_short(tiny_moe, cases, prefix_caching):
    with start_engine(
        tiny_moe.path,
        {"passes_per_step": 3},
        enable_prefix_caching=prefix_caching,
        max_num_seqs=16,
        kv_cache_memory_bytes=2 << 20,
        max_model_len=256,
    ) as e:
        check(e, cases, max_steps=1500)
        assert e.num_preemptions > 0
