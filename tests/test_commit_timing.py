"""When finished canvases are committed, on its own: worth waiting for each other, never for nothing."""

import pytest

from vllm_twotower.core import StepKind
from vllm_twotower.runtime.commit_timing import MarginalValue
from vllm_twotower.runtime.policy import RunnableRows, StepPolicy
from vllm_twotower.runtime.step_costs import MeasuredCosts, StepCosts

DENOISE, COMMIT = StepKind.DENOISE, StepKind.CONTEXT
PROPORTIONAL = StepCosts({kind: [(1, 1.0), (256, 256.0)] for kind in StepKind})
"""A machine bound by arithmetic: sharing a step saves nothing."""


def steps_until_commit(timing, finishing, rows):
    """Denoise steps until the canvases that ``finishing`` lists, so many per step, are committed."""
    finished = 0
    for step, more in enumerate(finishing):
        timing.denoised(rows - finished, finished)
        finished += more
        if finished and timing.is_due(finished, rows - finished):
            return step + 1
    raise AssertionError("never due")


def test_where_every_step_costs_the_same_canvases_wait_for_each_other():
    timing = MarginalValue(StepCosts.flat())
    assert steps_until_commit(timing, [1] * 60, rows=64) > 5


def test_where_steps_cost_by_the_row_nobody_waits():
    timing = MarginalValue(PROPORTIONAL)
    assert steps_until_commit(timing, [1] * 60, rows=64) == 1


def test_a_commit_that_costs_nothing_is_made_at_once_and_a_dear_one_late():
    waits = []
    for cost in (0.01, 1.0, 10.0):
        costs = StepCosts({DENOISE: [(1, 1.0)], COMMIT: [(1, cost)]})
        waits.append(steps_until_commit(MarginalValue(costs), [4] * 15, rows=64))
    assert waits[0] == 1
    assert waits[0] < waits[1] < waits[2]


@pytest.mark.parametrize("rows", [2, 3, 8, 64])
def test_it_is_due_before_everybody_is_idle(rows):
    """One canvas a step: the last ones are never waited for as in lockstep."""
    timing = MarginalValue(StepCosts.flat())
    assert steps_until_commit(timing, [1] * (rows - 1), rows) < rows


def test_a_context_step_for_a_prompt_starts_a_new_cycle():
    policy = StepPolicy("auto")
    for _ in range(6):
        policy.ran(DENOISE, RunnableRows(commits=20, canvases=44, urgent=0, admissible=False))
    policy.ran(COMMIT, RunnableRows(commits=20, canvases=44, urgent=1, admissible=False))
    fresh = RunnableRows(commits=1, canvases=63, urgent=0, admissible=False)
    policy.ran(DENOISE, fresh)
    assert policy.choose(fresh) is DENOISE


def test_costs_are_lines_between_points():
    costs = StepCosts({DENOISE: [(2, 10.0), (4, 20.0), (8, 24.0)], COMMIT: [(1, 5.0)]})
    assert [costs.cost(DENOISE, rows) for rows in (1, 2, 3, 4, 6, 8, 16)] == [10, 10, 15, 20, 22, 24, 32]
    assert costs.cost(COMMIT, 100) == 5


def test_a_table_of_costs_comes_as_lists_and_pairs_alike():
    """JSON has lists, and the engine option is JSON."""
    lists = StepCosts.from_option({"denoise": [[1, 1.0], [16, 16.0]], "commit": [[1, 9.0]]})
    pairs = StepCosts({DENOISE: [(1, 1.0), (16, 16.0)], COMMIT: [(1, 9.0)]})
    for rows in (1, 8, 16, 20):
        assert lists.cost(DENOISE, rows) == pairs.cost(DENOISE, rows) == rows
    assert lists.cost(COMMIT, 8) == 9.0


def test_measured_costs_follow_the_machine():
    now = [0.0]
    costs = MeasuredCosts(clock=lambda: now[0])
    assert costs.cost(DENOISE, 8) == costs.cost(COMMIT, 64), "nothing is known: flat"
    for rows in (1, 4, 16, 64):
        for _ in range(40):
            costs.step_started(DENOISE, rows)
            now[0] += 9.0 + 0.1 * rows
            costs.step_ended()
    costs.step_ended()  # a step that nobody told of is not measured
    assert costs.cost(DENOISE, 4) == pytest.approx(9.4)
    assert costs.cost(DENOISE, 40) == pytest.approx(13.0)
    assert costs.cost(COMMIT, 40) == pytest.approx(13.0), "never run: as the other kind"


def test_a_first_step_that_compiles_is_forgotten():
    costs = MeasuredCosts()
    for seconds in (30.0, 0.02, 0.02):
        costs.record(DENOISE, 8, seconds)
    assert costs.cost(DENOISE, 8) == pytest.approx(0.02)
