"""What a request gets does not depend on who shares the engine with it.

Random mixes of prompt lengths, settings, modes, arrivals and aborts (``request_mixes.py``); every request's tokens are
compared with those it gets alone, in fp32. ``TWOTOWER_MIXES`` sets how many mixes the long run plays, and
``TWOTOWER_FIRST_MIX`` the seed of its first.
"""

import contextlib
import itertools
import os

import pytest
from engine_harness import engine
from request_mixes import alone, draw_mix, longest_wait_allowed, play, set_timing

from vllm_twotower.core import Mode

QUORUMS = (0, 0.4, 1)
PASSES_PER_STEP = (1, 4)
TIMINGS = list(itertools.product(QUORUMS, PASSES_PER_STEP))
CI_MIX = 131
NUM_MIXES = int(os.environ.get("TWOTOWER_MIXES", "60"))
FIRST_MIX = int(os.environ.get("TWOTOWER_FIRST_MIX", "1000"))


@contextlib.contextmanager
def roomy_engine(model, prefix_caching):
    """Room for everybody: nothing here is about budgets or memory (test_cache_pressure.py is)."""
    room = {"max_num_seqs": 16, "max_num_batched_tokens": 4096}
    with engine(model, {"passes_per_step": 16}, enable_prefix_caching=prefix_caching, **room) as e:
        yield e


def check_mix(e, seed, timings):
    """One mix under several timings, every request as if alone; returns how many were aborted in the middle."""
    num_aborted = 0
    mix = draw_mix(seed)
    print(f"mix {seed}: {len(mix)} requests", flush=True)
    set_timing(e, 0.4, 16)
    expected = [alone(e, request) for request in mix]
    for commit_quorum, passes_per_step in timings:
        set_timing(e, commit_quorum, passes_per_step)
        e.llm.reset_prefix_cache()
        stale = set(e.runner.model_state.request_options)  # it hears of finished ones with the next step
        played = play(e, mix)
        where = f"mix {seed}, commit_quorum={commit_quorum}, passes_per_step={passes_per_step}"
        for index, (tokens, wanted, left) in enumerate(zip(played.tokens, expected, played.left, strict=True)):
            wanted = wanted[: len(tokens)] if left else wanted
            assert tokens == wanted, f"{where}: request {index}, {mix[index]}"
        num_aborted += sum(played.left)
        allowed = longest_wait_allowed(mix, passes_per_step)
        print(f"{where}: {played.num_steps} steps, longest wait {played.longest_wait} of {allowed} allowed", flush=True)
        assert played.longest_wait <= allowed, f"{where}: a request waited {played.longest_wait} steps, not {allowed}"
        assert e.scheduler.kv_cache_manager.usage == pytest.approx(0), where
        assert not e.scheduler.requests, where
        assert not e.scheduler._request_options, where
        assert not stale & set(e.runner.model_state.request_options), f"{where}: the worker keeps finished requests"
    assert e.num_preemptions == 0
    return num_aborted


def test_a_mix_of_requests_gets_what_each_gets_alone(tiny_moe):
    mix = draw_mix(CI_MIX)
    assert {r.mode for r in mix} == set(Mode)
    assert any(0 < r.arrives < 25 for r in mix), "somebody comes while others run"
    # in Triton's interpreter the states that prefix caching copies are most of a step; the long run has both
    with roomy_engine(tiny_moe.path, prefix_caching=False) as e:
        assert check_mix(e, CI_MIX, TIMINGS), "nobody was aborted"


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_many_mixes_of_requests_get_what_each_gets_alone(tiny_moe, prefix_caching):
    failures, num_aborted = [], 0
    with roomy_engine(tiny_moe.path, prefix_caching) as e:
        for seed in range(FIRST_MIX, FIRST_MIX + NUM_MIXES):
            try:
                num_aborted += check_mix(e, seed, TIMINGS)
            except AssertionError as problem:  # the others are worth knowing too
                failures.append(str(problem))
                print(problem, flush=True)
    assert not failures
    assert num_aborted
