"""The step policy on the real scheduler class, priced and scripted: what benchmarks/policy.py claims, in small."""

import json
import pathlib

import pytest

from vllm_twotower.core import Mode
from vllm_twotower.planning.canvas_passes import PassCounts

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def policy(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from benchmarks import policy as module

    monkeypatch.setattr(module, "CANVASES_PER_ROW", 10)
    monkeypatch.setattr(module, "MIN_CANVASES", 200)
    return module


def times(policy, ar=False):
    (study,) = policy.studies_of(policy.REFERENCE, [], everything=False)
    return study.times(ar)


@pytest.mark.parametrize("batch", [16, *(pytest.param(b, marks=pytest.mark.slow) for b in (8, 100))])
def test_waiting_for_a_quorum_beats_committing_at_once_and_lockstep(policy, batch):
    prices, (_, serving) = times(policy), policy.LOADS
    rate = {name: policy.measure(prices, batch, serving, name, seed=0) for name in policy.POLICIES}
    for name in ("quorum 0.4", "auto"):
        assert rate[name]["tokens_per_s"] > 1.02 * rate["commit at once"]["tokens_per_s"], name
        assert rate[name]["tokens_per_s"] > 1.02 * rate["lockstep"]["tokens_per_s"], name
        assert rate[name]["of_perfect"] < 1


def test_a_batch_of_64_reaches_78_percent_of_perfect_sharing(policy):
    """With prompts arriving; `benchmarks/results/policy.md` has the other load, with a bound on what is possible."""
    run = policy.measure(times(policy), 64, policy.LOADS[1], "quorum 0.4", seed=0)
    assert run["of_perfect"] >= 0.78
    assert run["worst_wait_ms"] < 16 * 1000 * times(policy).denoise_s(64), "T passes of the slowest neighbour at most"


def test_alone_nothing_is_shared_and_nothing_waits(policy):
    run = policy.measure(times(policy), 1, policy.Load("short", 32, 64), "quorum 0.4", seed=0)
    assert run["of_perfect"] == pytest.approx(1, abs=0.05)
    assert run["worst_wait_ms"] == 0


def test_a_run_does_the_work_it_is_given(policy, monkeypatch):
    """Every client's requests end, with as many commits, passes and prompt tokens as they need."""
    drawn = []
    draw = PassCounts.next
    monkeypatch.setattr(PassCounts, "next", lambda counts: drawn.append(draw(counts)) or drawn[-1])
    load, prices = policy.Load("short", 40, 48), times(policy)
    run = policy.ScriptedRun(policy.make_scheduler(str(policy.MODEL), 4, {}), prices, 4, 40, load.output_tokens)
    run.run_until(2000)
    done = run.tally
    assert done.tokens == 16 * done.canvases
    assert done.canvases - done.commits >= len(done.first_tokens_s) - 4, "a request's last canvas is not committed"
    assert done.prompt_tokens % 40 == 0
    assert done.passes == sum(drawn) - sum(run.passes_left.values())


def test_ar_through_the_same_scheduler_is_one_token_per_row_and_step(policy):
    prices = times(policy, ar=True)
    run = policy.ScriptedRun(policy.make_scheduler(str(policy.MODEL), 4, {}), prices, 4, 8, 400, mode=Mode.AR)
    run.run_until(200)
    before, steps = run.tally.tokens, run.tally.steps
    run.run_until(400)
    assert run.tally.tokens - before == 4 * (run.tally.steps - steps)
    rate = policy.measure_ar(prices, 4, policy.Load("long", 8, 400))["tokens_per_s"]
    assert rate == pytest.approx(4 / prices.ar_s(4), rel=0.02)


def test_the_committed_results_say_what_is_claimed():
    result = json.loads((ROOT / "benchmarks" / "results" / "policy.json").read_text())
    rows = next(iter(result["studies"].values()))
    figures = {(r["load"], r["batch"], r["policy"]): r for r in rows}
    for load, batch in {(r["load"], r["batch"]) for r in rows if 8 <= r["batch"] <= 100}:
        best_simple = max(figures[load, batch, p]["tokens_per_s"] for p in ("lockstep", "commit at once"))
        for ours in ("quorum 0.4", "auto"):
            assert figures[load, batch, ours]["tokens_per_s"] > best_simple, (load, batch, ours)
    assert figures["serving", 64, "quorum 0.4"]["of_perfect"] >= 0.78
