"""The step policy and the draft policy on the real scheduler class, priced and scripted: what benchmarks.policy and
benchmarks.draft_policy claim, in small.
"""

import json

import pytest

from benchmarks import draft_policy, policy
from benchmarks.machine import described, environment
from benchmarks.roofline_parts.self_speculation import ContextRows
from benchmarks.scripted_worker import DraftingRun, make_scheduler
from vllm_twotower.core import Mode
from vllm_twotower.planning.canvas_passes import CanvasPasses
from vllm_twotower.runtime.draft_policy import DraftPolicy


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(policy, "CANVASES_PER_ROW", 10)
    monkeypatch.setattr(policy, "MIN_CANVASES", 200)


def times(ar=False):
    (study,) = policy.list_studies(policy.REFERENCE, [], everything=False)
    return study.times(ar)


@pytest.mark.parametrize("batch", [16, *(pytest.param(b, marks=pytest.mark.slow) for b in (8, 100))])
def test_waiting_for_a_quorum_beats_committing_at_once_and_lockstep(batch):
    prices, (_, serving) = times(), policy.LOADS
    rate = {name: policy.measure(prices, batch, serving, name, seed=0) for name in policy.POLICIES}
    for other in ("commit at once", "lockstep"):
        assert rate["quorum 0.4"]["tokens_per_s"] > 1.02 * rate[other]["tokens_per_s"], other
    assert rate["quorum 0.4"]["of_perfect"] < 1


def test_a_batch_of_64_reaches_78_percent_of_perfect_sharing():
    """With prompts arriving; `benchmarks/results/policy.md` has the other load."""
    run = policy.measure(times(), 64, policy.LOADS[1], "quorum 0.4", seed=0)
    assert run["of_perfect"] >= 0.78
    assert run["worst_wait_ms"] < 16 * 1000 * times().denoise_s(64), "T passes of the slowest neighbour at most"


def test_alone_nothing_is_shared_and_nothing_waits():
    run = policy.measure(times(), 1, policy.Load("short", 32, 64), "quorum 0.4", seed=0)
    assert run["of_perfect"] == pytest.approx(1, abs=0.05)
    assert run["worst_wait_ms"] == 0


def test_a_run_does_the_work_it_is_given(monkeypatch):
    """Every client's requests end, with as many commits, passes and prompt tokens as they need."""
    drawn = []
    draw = CanvasPasses.draw_counts
    noted = lambda *args: (drawn.append(count) or count for count in draw(*args))
    monkeypatch.setattr(CanvasPasses, "draw_counts", noted)
    load, prices = policy.Load("short", 40, 48), times()
    run = policy.ScriptedRun(policy.make_scheduler(str(policy.REAL_MODEL), 4, {}), prices, 4, 40, load.output_tokens)
    run.run_until(2000)
    done = run.tally
    assert done.tokens == 16 * done.canvases
    assert done.canvases - done.commits >= len(done.first_tokens_s) - 4, "a request's last canvas is not committed"
    assert done.prompt_tokens % 40 == 0
    assert done.passes == sum(drawn) - sum(run.passes_left.values())


def test_ar_through_the_same_scheduler_is_one_token_per_row_and_step():
    prices = times(ar=True)
    run = policy.ScriptedRun(policy.make_scheduler(str(policy.REAL_MODEL), 4, {}), prices, 4, 8, 400, mode=Mode.AR)
    run.run_until(200)
    before, steps = run.tally.tokens, run.tally.steps
    run.run_until(400)
    assert run.tally.tokens - before == 4 * (run.tally.steps - steps)
    rate = policy.measure_ar(prices, 4, policy.Load("long", 8, 400))["tokens_per_s"]
    assert rate == pytest.approx(4 / prices.ar_s(4), rel=0.02)


def test_the_committed_results_say_what_is_claimed():
    result = json.loads((policy.RESULTS / "policy.json").read_text())
    rows = next(iter(result["studies"].values()))
    figures = {(r["load"], r["batch"], r["policy"]): r for r in rows}
    for load, batch in {(r["load"], r["batch"]) for r in rows if 8 <= r["batch"] <= 100}:
        best_simple = max(figures[load, batch, p]["tokens_per_s"] for p in ("lockstep", "commit at once"))
        assert figures[load, batch, "quorum 0.4"]["tokens_per_s"] > best_simple, (load, batch)
    assert figures["serving", 64, "quorum 0.4"]["of_perfect"] >= 0.78


def prices(num_passes=1, name="1 x H200 bf16"):
    return draft_policy.make_prices(next(s for s in policy.SETUPS if s.name == name), num_passes)


def test_break_even_is_what_a_round_costs_in_ar_steps():
    """Figures of docs/self_speculation.md."""
    found = {batch: round(prices().break_even_tokens(batch, 1), 1) for batch in (1, 16, 64)}
    assert found == {1: 10.8, 16: 3.5, 64: 2.1}
    two = prices(name="2 x H100 bf16 colocated")
    assert [round(two.break_even_tokens(batch, 1), 1) for batch in (1, 16, 64)] == [7.9, 3.4, 2.2]
    assert round(prices(3).break_even_tokens(64, 3), 1) == 4.1
    for batch, ratio in ((1, 1.02), (32, 1.05), (64, 1.08)):
        verify = prices().context_s(ContextRows(verified=batch))
        assert verify / prices().times.commit_s(batch) == pytest.approx(ratio, abs=0.01)
        assert prices().context_s(ContextRows(plain=batch)) == pytest.approx(prices().times.ar_s(batch))


def test_split_towers_have_no_price():
    with pytest.raises(ValueError, match="use a colocated set-up"):
        prices(name="2 x H100 bf16 split")


@pytest.mark.parametrize(("name", "batch"), [("prose-like", 4), ("turning", 8), ("mixed", 8), ("demo-like", 1)])
def test_the_draft_policy_is_never_slower_than_ar(monkeypatch, name, batch):
    monkeypatch.setattr(draft_policy, "MIN_TOKENS", 2000)
    load = next(one for one in draft_policy.LOADS if one.name == name)
    everybody = range(batch)
    ar = draft_policy.run_load(prices(), load, batch, None).sum_over(everybody)
    assert draft_policy.run_load(prices(), load, batch, DraftPolicy()).sum_over(everybody) > 0.97 * ar


def test_the_draft_policy_gains_what_there_is_to_gain(monkeypatch):
    monkeypatch.setattr(draft_policy, "MIN_TOKENS", 2000)
    monkeypatch.setattr(draft_policy, "TOKENS_PER_CLIENT", 200)
    row = draft_policy.compare_policies(prices(), draft_policy.LOADS[0], 16)
    assert row["who"] == "all"
    assert row["policy"] > 0.95 * row["best constant"] > 2


def test_a_drafting_run_takes_the_tokens_and_the_time_it_is_given():
    """Five tokens a round for everybody: as many rounds, at the price of a draft and a verification each."""
    rounds = [lambda position: 5] * 4
    policy_of_all = draft_policy.FixedDrafters(range(4))
    run = DraftingRun(make_scheduler(str(policy.REAL_MODEL), 4, {}), prices(), rounds, 8, 2000, policy_of_all)
    run.run_until(400)
    before, began = run.tally.tokens, run.tally.now_s
    run.run_until(800)
    one_round = prices().draft_s(4) + prices().context_s(ContextRows(verified=4))
    assert run.tally.tokens - before == 20 * round((run.tally.now_s - began) / one_round)
    assert run.tally.now_s - began == pytest.approx(20 * one_round, rel=1e-6)


def test_the_committed_draft_policy_is_never_slower_than_ar():
    results = json.loads((policy.RESULTS / "draft-policy.json").read_text())["results"]
    rows = [row for of_setup in results.values() for row in of_setup]
    assert {row["load"] for row in rows} == {load.name for load in draft_policy.LOADS}
    assert {row["batch"] for row in rows} == set(draft_policy.BATCHES)
    assert min(row["policy"] for row in rows) >= draft_policy.TARGET


def test_what_figures_belong_to_can_be_said():
    found = environment()
    assert found["vllm"]
    assert f"vllm {found['vllm']}" in described(found)
