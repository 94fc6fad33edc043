"""Who drafts: nobody where it does not pay, everybody where it does, and what it learns from."""

import itertools

import pytest

from vllm_twotower.runtime.draft_policy import FIRST_WAIT, LONGEST_WAIT, DraftPolicy, StepClass, StepCosts


def memory_bound(draft=1.0, verify=1.05, decode=1.0):
    """Every step reads the weights, however many rows it has."""
    costs = StepCosts()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for kind, seconds in ((StepClass.DRAFT, draft), (StepClass.VERIFY, verify), (StepClass.DECODE, decode)):
            costs.record(kind, rows, seconds)
    return costs


def simulate(policy, accepts, num_rounds=2000, num_passes=1):
    """Time per token over AR's of requests whose rounds give ``accepts[i]`` tokens each."""
    ids = [str(i) for i in range(len(accepts))]
    costs, elapsed, tokens = policy.costs, 0.0, 0.0
    for _ in range(num_rounds):
        chosen = policy.choose(ids, num_passes, 0)
        total = len(ids)
        if chosen:
            elapsed += num_passes * costs.estimate(StepClass.DRAFT, len(chosen))
            elapsed += costs.estimate(StepClass.VERIFY, total)
            for req_id in chosen:
                policy.record_round(req_id, accepts[int(req_id)])
                tokens += accepts[int(req_id)]
            tokens += total - len(chosen)
        else:
            elapsed += costs.estimate(StepClass.DECODE, total)
            tokens += total
            policy.record_decode_step()
    return elapsed / tokens / (costs.estimate(StepClass.DECODE, len(ids)) / len(ids))


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_where_drafts_are_right_everybody_drafts(batch):
    policy = DraftPolicy(memory_bound())
    assert simulate(policy, [8] * batch) < 0.3
    assert policy.choose([str(i) for i in range(batch)], 1, 0) == {str(i) for i in range(batch)}


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("accept", [1, 2])
def test_where_they_are_wrong_it_is_as_fast_as_ar(batch, accept):
    assert simulate(DraftPolicy(memory_bound()), [accept] * batch) < 1 / 0.97


def test_in_a_mixed_batch_those_draft_who_gain():
    policy = DraftPolicy(memory_bound())
    assert simulate(policy, [10] * 8 + [1] * 8) < 0.5
    assert policy.choose([str(i) for i in range(16)], 1, 0) == {str(i) for i in range(8)}


def test_tries_grow_rarer_and_never_stop():
    policy, tries, step = DraftPolicy(memory_bound()), [], 0
    for step in range(3000):
        if policy.choose(["a"], 1, 0):
            tries.append(step)
            policy.record_round("a", 1)
        else:
            policy.record_decode_step()
    waits = [b - a for a, b in itertools.pairwise(tries)]
    assert waits[-1] >= LONGEST_WAIT > FIRST_WAIT
    assert sorted(waits) == waits
    assert len(tries) > 5, step


def test_a_text_that_turns_easy_is_found():
    policy = DraftPolicy(memory_bound())
    simulate(policy, [1.0] * 4)
    assert simulate(policy, [9.0] * 4, num_rounds=3000) < 0.5


def test_a_newcomer_is_taken_for_what_the_others_are():
    policy = DraftPolicy(memory_bound())
    simulate(policy, [1] * 4)
    assert policy.expect_tokens("new") == pytest.approx(1, abs=0.2)
    assert not policy.choose(["new"], 1, 4)


def test_costs_follow_the_machine_and_not_one_slow_step():
    costs = StepCosts()
    costs.record(StepClass.DECODE, 8, 3.0)  # compiles
    costs.record(StepClass.DECODE, 8, 0.010)
    assert costs.estimate(StepClass.DECODE, 8) == pytest.approx(0.010)
    costs.record(StepClass.DECODE, 8, 5.0)  # waited for something
    assert costs.estimate(StepClass.DECODE, 8) == pytest.approx(0.011, abs=1e-4)
    for _ in range(40):
        costs.record(StepClass.DECODE, 8, 0.020)
    assert costs.estimate(StepClass.DECODE, 8) == pytest.approx(0.020, rel=0.02)
    assert (
        costs.estimate(StepClass.DECODE, 12)
        == costs.estimate(StepClass.DRAFT, 1)
        == costs.estimate(StepClass.DECODE, 8)
    )
