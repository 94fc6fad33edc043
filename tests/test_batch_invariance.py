"""What a request gets does not depend on who shares the engine with it.

Random mixes of prompt lengths, settings, modes, arrivals and aborts (``request_mixes.py``); every request's tokens are
compared with those it gets alone, in fp32. A difference is legal only where two logits, two confidences or one and the
threshold are within 1e-5 (``near_ties.py``), and is printed. ``TWOTOWER_MIXES`` sets how many mixes the long run plays,
and ``TWOTOWER_FIRST_MIX`` the seed of its first.
"""

import contextlib
import itertools
import os
from dataclasses import dataclass

import pytest

from tests.harness.engine import start_engine
from tests.near_ties import can_replay, check_same, replay
from tests.request_mixes import alone, draw_mix, longest_queue_allowed, longest_wait_allowed, play, set_timing
from vllm_twotower.core import Mode
from vllm_twotower.oracle.plain_towers import PlainTwoTower

QUORUMS = (0, 0.4, 1)
PASSES_PER_STEP = (1, 4)
TIMINGS = list(itertools.product(QUORUMS, PASSES_PER_STEP))
CI_MIX = 131
NUM_MIXES = int(os.environ.get("TWOTOWER_MIXES", "60"))
FIRST_MIX = int(os.environ.get("TWOTOWER_FIRST_MIX", "1000"))


@pytest.fixture(scope="module")
def plain(tiny_moe):
    return PlainTwoTower.load(tiny_moe.path)


@contextlib.contextmanager
def roomy_engine(model, prefix_caching):
    """Room for everybody: nothing here is about budgets or memory (test_cache_pressure.py is)."""
    room = {"max_num_seqs": 16, "max_num_batched_tokens": 4096}
    diffusion = {"passes_per_step": 16, "draft_policy": "always"}
    with start_engine(model, diffusion, enable_prefix_caching=prefix_caching, **room) as e:
        yield e


@dataclass
class Seen:
    """What a run of mixes came across."""

    requests: int = 0
    replayed: int = 0
    """Requests that the plain reference answered too, with the same tokens as the engine alone."""
    ties_alone: int = 0
    """Those of them for which a near-tie had to fall the other way."""
    aborted: int = 0
    legal: int = 0
    """Requests whose tokens differ from those alone, by a near-tie."""
    longest_wait: int = 0
    longest_queue: int = 0


def check_mix(e, plain, seed, timings, seen):
    """One mix under several timings, every request as if alone, and alone what the plain reference writes."""
    mix = draw_mix(seed)
    print(f"mix {seed}: {len(mix)} requests", flush=True)
    may_queue = longest_queue_allowed(mix, e.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)
    set_timing(e, 0.4, 16)
    expected = [alone(e, request) for request in mix]
    for index, (request, tokens) in enumerate(zip(mix, expected, strict=True)):
        if can_replay(request):  # the judge of differences knows every setting that there is
            ties = replay(plain, request, tokens)
            assert ties is not None, f"mix {seed}: the reference does not write {tokens} to request {index}, {request}"
            seen.replayed += 1
            seen.ties_alone += bool(ties)
    for commit_quorum, passes_per_step in timings:
        set_timing(e, commit_quorum, passes_per_step)
        e.llm.reset_prefix_cache()
        stale = set(e.runner.model_state.request_options)  # it hears of finished ones with the next step
        played = play(e, mix)
        where = f"mix {seed}, commit_quorum={commit_quorum}, passes_per_step={passes_per_step}"
        for index, result in enumerate(zip(played.tokens, expected, played.left, strict=True)):
            seen.legal += not check_same(plain, mix[index], *result, f"{where}: request {index}")
        seen.requests += len(mix)
        seen.aborted += sum(played.left)
        seen.longest_wait = max(seen.longest_wait, played.longest_wait)
        seen.longest_queue = max(seen.longest_queue, played.longest_queue)
        allowed = longest_wait_allowed(mix, passes_per_step)
        print(f"{where}: {played.num_steps} steps, longest wait {played.longest_wait} of {allowed} allowed", flush=True)
        assert played.longest_wait <= allowed, f"{where}: a request waited {played.longest_wait} steps, not {allowed}"
        assert played.longest_queue <= may_queue, f"{where}: {played.longest_queue} steps in the queue, not {may_queue}"
        assert e.scheduler.kv_cache_manager.usage == pytest.approx(0), where
        assert not e.scheduler.requests, where
        assert not e.scheduler._progress, where
        assert not stale & set(e.runner.model_state.request_options), f"{where}: the worker keeps finished requests"
    assert e.num_preemptions == 0


def test_a_mix_of_requests_gets_what_each_gets_alone(tiny_moe, plain):
    mix = draw_mix(CI_MIX)
    assert {r.mode for r in mix} == set(Mode)
    assert any(0 < r.arrives < 25 for r in mix), "somebody comes while others run"
    seen = Seen()
    # in Triton's interpreter the states that prefix caching copies are most of a step; the long run has both
    with roomy_engine(tiny_moe.path, prefix_caching=False) as e:
        check_mix(e, plain, CI_MIX, TIMINGS, seen)
    assert seen.aborted, "nobody was aborted"
    assert seen.replayed > len(mix) // 2


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_many_mixes_of_requests_get_what_each_gets_alone(tiny_moe, plain, prefix_caching):
    failures, seen = [], Seen()
    with roomy_engine(tiny_moe.path, prefix_caching) as e:
        for seed in range(FIRST_MIX, FIRST_MIX + NUM_MIXES):
            try:
                check_mix(e, plain, seed, TIMINGS, seen)
            except AssertionError as problem:  # the others are worth knowing too
                failures.append(str(problem))
                print(problem, flush=True)
    print(f"{NUM_MIXES} mixes under {len(TIMINGS)} timings: {seen}, {len(failures)} failures")
    assert not failures
    assert seen.aborted
