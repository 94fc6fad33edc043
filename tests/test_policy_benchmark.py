"""The step policy on the real scheduler class, priced and scripted: what benchmarks.policy claims, in small."""

import json

import pytest

from benchmarks import policy
from benchmarks.roofline_parts.canvas_passes import CanvasPasses
from vllm_twotower.core import Mode


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
