"""Who drafts: nobody where it does not pay, everybody where it does, what it may lose, and what it learns from."""

import itertools
import random

import pytest

from vllm_twotower.runtime.draft_policy import (
    FIRST_CREDIT,
    LOOK_AGAIN,
    MAX_AGE,
    MAX_LOSS,
    MIN_LOSS,
    DraftPolicy,
    StepClass,
    StepCosts,
)


def memory_bound(draft=1.0, verify=1.05, decode=1.0):
    """Every step reads the weights, however many rows it has."""
    costs = StepCosts()
    for rows in (1, 2, 4, 8, 16, 32, 64) * 2:
        for kind, seconds in ((StepClass.DRAFT, draft), (StepClass.VERIFY, verify), (StepClass.DECODE, decode)):
            for verified in (1, 2, 4, 8, 16, 32, 64) if kind is StepClass.VERIFY else (0,):
                costs.record(kind, rows, seconds, verified)
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
            elapsed += costs.estimate(StepClass.VERIFY, total, len(chosen))
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


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_text_does_little_is_lost(seed):
    """Tokens a round that change as they like, most of all right after the policy has made up its mind."""
    source = random.Random(seed)
    num_requests, num_passes = source.choice([1, 2, 5, 16]), source.choice([1, 1, 3])
    policy = DraftPolicy(memory_bound(draft=source.uniform(0.8, 6), verify=source.uniform(1, 6)))
    ids = [str(i) for i in range(num_requests)]
    price = policy.costs.estimate
    easy, took, would_have_taken, dearest = False, 0.0, 0.0, 0.0
    for _ in range(2000):
        chosen = policy.choose(ids, num_passes, 0)
        if not chosen:
            policy.record_decode_step()
            took += 1
            would_have_taken += 1
            continue
        cost = num_passes * price(StepClass.DRAFT, len(chosen)) + price(StepClass.VERIFY, num_requests, len(chosen))
        took, dearest = took + cost, max(dearest, cost)
        easy = not easy if source.random() < 0.1 else easy
        tokens = {req_id: source.randint(8, 16) if easy else 1 for req_id in chosen}
        would_have_taken += 1 + sum(n - 1 for n in tokens.values()) / num_requests
        for req_id, num_tokens in tokens.items():
            policy.record_round(req_id, num_tokens)
        assert took <= (1 + MAX_LOSS) * would_have_taken + FIRST_CREDIT + 2 * dearest


def test_in_a_mixed_batch_those_draft_who_gain():
    policy = DraftPolicy(memory_bound())
    for _ in range(40):
        policy.costs.record(StepClass.DRAFT, 16, 1.4)  # so that more drafts than eight cost something
    assert simulate(policy, [10] * 8 + [1] * 8) < 0.5
    chosen = policy.choose([str(i) for i in range(16)], 1, 0)
    assert chosen >= {str(i) for i in range(8)}
    assert len(chosen) < 14, "no more than what is not known to cost more than eight"


def test_tries_grow_rarer_and_never_end():
    policy, tries = DraftPolicy(memory_bound()), []
    for step in range(6000):
        if policy.choose(["a"], 1, 0):
            tries.append(step)
            policy.record_round("a", 1)
        else:
            policy.record_decode_step()
    paid_in_advance = tries[next(i for i, (a, b) in enumerate(itertools.pairwise(tries)) if b - a > 1) :]
    waits = [b - a for a, b in itertools.pairwise(paid_in_advance)]
    assert len(paid_in_advance) > 4
    assert waits[-1] >= 1 / MIN_LOSS
    assert all(b > 0.9 * a for a, b in itertools.pairwise(waits))


def test_nobody_drafts_before_an_ar_step_was_measured_and_now_and_then_it_is_again():
    policy = DraftPolicy()
    policy.costs.record(StepClass.DRAFT, 4, 1.0)
    policy.costs.record(StepClass.VERIFY, 4, 1.0)
    for _ in range(2):
        assert not policy.choose(list("abcd"), 1, 0)
        policy.costs.record(StepClass.DECODE, 1, 1.0)
    assert not policy.choose(list("abcd"), 1, 0), "that was another batch size"
    for _ in range(2):
        assert not policy.choose(list("abcd"), 1, 0)
        policy.costs.record(StepClass.DECODE, 4, 1.0)
    assert policy.choose(list("abcd"), 1, 0)
    for _ in range(MAX_AGE):
        policy.costs.record(StepClass.VERIFY, 4, 1.0)
    assert not policy.choose(list("abcd"), 1, 0)


def test_who_has_not_drafted_for_long_is_taken_for_one_of_those_who_do():
    policy = DraftPolicy(memory_bound())
    for _ in range(40):
        policy.costs.record(StepClass.DRAFT, 2, 1.3)  # a second draft pays from 2.5 tokens a round
    for _ in range(60):
        policy.record_round("hard", 1)
    for _ in range(60):
        policy.record_round("easy", 9)
    tried = 0
    for _ in range(300):
        chosen = policy.choose(["easy", "hard"], 1, 0)
        assert "easy" in chosen
        for req_id in chosen:
            policy.record_round(req_id, 9 if req_id == "easy" else 1)
        tried += "hard" in chosen
    assert 1 <= tried < 30


def test_a_text_that_turns_easy_is_found():
    policy = DraftPolicy(memory_bound())
    simulate(policy, [1.0] * 4)
    assert simulate(policy, [9.0] * 4, num_rounds=3000) < 0.5


def test_a_newcomer_is_taken_for_what_the_others_are():
    policy = DraftPolicy(memory_bound())
    simulate(policy, [1] * 4)
    assert policy.expect_tokens("new") == pytest.approx(1, abs=0.4)
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
    assert costs.estimate(StepClass.DECODE, 12) == costs.estimate(StepClass.DECODE, 8)


def test_a_round_is_credited_whoever_asks_while_it_runs():
    """Drafts of several passes: requests without drafts take AR steps in between, and ask again after each."""
    policy = DraftPolicy(memory_bound())
    for _ in range(60):
        policy.record_round("hard", 1)
    rounds = 0
    for _ in range(50):
        chosen = policy.choose(["easy"], 2, 1)
        policy.choose([], 2, 2)
        policy.record_decode_step()
        for req_id in chosen:
            policy.record_round(req_id, 12)
            rounds += 1
    assert rounds > 40


def test_what_never_ran_is_taken_for_as_cheap_as_it_can_be():
    costs = StepCosts()
    assert costs.estimate(StepClass.DECODE, 3) == 1.0
    costs.record(StepClass.DECODE, 128, 17.0)
    assert costs.estimate(StepClass.DRAFT, 128) == costs.estimate(StepClass.VERIFY, 128, 5) == 17.0
    costs.record(StepClass.DRAFT, 128, 28.0)
    costs.record(StepClass.VERIFY, 128, 33.0, num_verified=128)
    assert costs.estimate(StepClass.DRAFT, 64) == pytest.approx(14)
    assert costs.estimate(StepClass.DRAFT, 256) == pytest.approx(28)
    assert costs.estimate(StepClass.VERIFY, 128, 64) == pytest.approx(17 + 16 / 2)


def test_fewer_draft_where_all_drafts_cost_twice_what_half_of_them_do():
    """Half a batch has nothing to gain; what fewer drafts cost is not known before they are tried."""
    policy, ids = DraftPolicy(), [str(i) for i in range(128)]
    for _ in range(2):
        policy.costs.record(StepClass.DECODE, 128, 17.0)
    counts = []
    for _ in range(200):
        chosen = policy.choose(ids, 1, 0)
        policy.costs.record(StepClass.DRAFT, len(chosen), max(15.0, 28.0 * len(chosen) / 128))
        policy.costs.record(StepClass.VERIFY, 128, 17 + 16 * len(chosen) / 128, len(chosen))
        for req_id in chosen:
            policy.record_round(req_id, 8 if int(req_id) < 64 else 1)
        counts.append(len(chosen))
    assert max(counts[:3]) > 100
    assert sum(counts[100:]) / 100 < 85


def test_who_waits_for_credit_sees_within_some_steps_that_drafts_have_become_cheap():
    policy = DraftPolicy(memory_bound(draft=6.0))
    while policy.choose(["a"], 1, 0):
        policy.record_round("a", 1)
    for _ in range(40):
        policy.costs.record(StepClass.DRAFT, 1, 0.1)
    assert [policy.rest_one_step() for _ in range(LOOK_AGAIN + 1)] == [True] * LOOK_AGAIN + [False]
    assert policy.choose(["a"], 1, 0)


def test_a_newcomer_ends_a_rest():
    policy = DraftPolicy(memory_bound(draft=6.0))
    while policy.choose(["a"], 1, 0):
        policy.record_round("a", 1)
    assert policy.rest_one_step()
    policy.look_again()
    assert not policy.rest_one_step()
