"""The step policy on its own: nothing waits longer than stated, nothing is chosen that has nothing to do."""

import itertools

import pytest

from vllm_twotower.core import StepKind
from vllm_twotower.runtime.policy import MAX_CONTEXT_STEPS, RunnableRows, StepPolicy

CONTEXT, DENOISE = StepKind.CONTEXT, StepKind.DENOISE


def rows(commits=0, canvases=0, context_only=0, admissible=False):
    return RunnableRows(commits=commits, canvases=canvases, context_only=context_only, admissible=admissible)


def test_a_kind_with_nothing_to_run_is_not_chosen():
    for commits, context_only, admissible in itertools.product((0, 2), (0, 2), (False, True)):
        policy = StepPolicy(0.4)
        assert policy.choose_kind(rows(commits, 0, context_only, admissible)) is CONTEXT
        if not (commits or context_only or admissible):
            assert policy.choose_kind(rows(canvases=3)) is DENOISE


@pytest.mark.parametrize(
    ("quorum", "commits", "canvases", "expected"),
    [
        (0.0, 1, 9, CONTEXT),
        (0.4, 3, 7, DENOISE),
        (0.4, 4, 6, CONTEXT),
        (1.0, 9, 1, DENOISE),
        (1.0, 10, 0, CONTEXT),
        (0.0, 0, 10, DENOISE),
    ],
)
def test_finished_canvases_wait_for_the_quorum(quorum, commits, canvases, expected):
    assert StepPolicy(quorum).choose_kind(rows(commits, canvases)) is expected


def test_a_prompt_in_progress_waits_for_one_denoise_step_whatever_the_quorum():
    policy = StepPolicy(1.0)
    now = rows(canvases=5, context_only=1)
    assert policy.choose_kind(now) is DENOISE
    policy.record_step(DENOISE)
    assert policy.choose_kind(now) is CONTEXT


def test_a_newcomer_is_admitted_at_once():
    policy = StepPolicy(1.0)
    policy.record_step(DENOISE)
    assert policy.choose_kind(rows(canvases=5, admissible=True)) is CONTEXT


def test_a_stream_of_newcomers_does_not_starve_canvases():
    policy, waited = StepPolicy(0.4), 0
    for _ in range(50):
        kind = policy.choose_kind(rows(commits=1, canvases=4, context_only=2, admissible=True))
        policy.record_step(kind)
        waited = 0 if kind is DENOISE else waited + 1
        assert waited <= MAX_CONTEXT_STEPS
