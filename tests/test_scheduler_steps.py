"""The real scheduler, step by step inside a real engine: what every step held, and who waited for what."""

from dataclasses import dataclass

import pytest

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params
from vllm_twotower.core import StepKind

CANVAS = 16


@dataclass
class Step:
    denoised: dict[str, int]
    """Requests of a denoise step and their scheduled widths."""
    computed: dict[str, int]
    """Requests of a context step and their scheduled tokens."""
    running: list[str]
    waiting: int


def watch(e):
    """Record every step the scheduler makes, and check what must hold after each."""
    steps, scheduler = [], e.scheduler
    schedule = scheduler.schedule

    def recorded(*args, **kwargs):
        before = {r.request_id: r.num_computed_tokens for r in scheduler.running}
        output = schedule(*args, **kwargs)
        scheduled = dict(output.num_scheduled_tokens)
        assert scheduler.last_step.req_ids == set(scheduled)
        denoising = scheduler.last_step.req_ids if scheduler.last_step.kind is StepKind.DENOISE else frozenset()
        assert not output.scheduled_spec_decode_tokens, "no drafts are sent"
        for req_id in denoising:
            assert scheduler.requests[req_id].num_computed_tokens == before[req_id], "denoising computes nothing"
        for request in scheduler.running:
            assert request.num_computed_tokens <= request.num_tokens
            assert len(request.block_hashes) <= request.num_tokens // scheduler.hash_block_size, (
                "nothing noisy is hashed"
            )
            assert not request.spec_token_ids
        steps.append(
            Step(
                {i: n for i, n in scheduled.items() if i in denoising},
                {i: n for i, n in scheduled.items() if i not in denoising},
                [r.request_id for r in scheduler.running],
                len(scheduler.waiting),
            )
        )
        return output

    scheduler.schedule = recorded
    return steps


def kinds(steps):
    return "".join("D" if s.denoised else "C" if s.computed else "-" for s in steps)


def test_a_lone_request_alternates_and_commits_each_canvas_but_the_last(tiny_moe):
    case = tiny_moe.cases(16)[0]
    with start_engine(tiny_moe.path, {"passes_per_step": 16, "commit_quorum": 0.4}) as e:
        steps = watch(e)
        assert e.tokens([case["prompt"]], golden_params(case)) == [case["output"]]
    assert kinds(steps).rstrip("-") == "CDCDCDCD"
    assert [s.computed for s in steps if s.computed][1:] == [{steps[0].running[0]: CANVAS}] * 3


def test_a_newcomer_joins_in_the_middle_of_a_canvas(tiny_moe):
    first, second = tiny_moe.cases(16)[0], tiny_moe.cases(16)[5]
    with start_engine(tiny_moe.path, {"passes_per_step": 1, "commit_quorum": 0}) as e:
        steps, core = watch(e), e.llm.llm_engine
        core.add_request("a", {"prompt_token_ids": first["prompt"]}, golden_params(first))
        done = {}

        def step():
            for output in core.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)

        for _ in range(3):
            step()
        assert kinds(steps) == "CDD"
        core.add_request("b", {"prompt_token_ids": second["prompt"]}, golden_params(second))
        step()
        assert kinds(steps) == "CDDC", "a newcomer is not held behind a canvas"
        assert len(steps[-1].computed) == 1
        for _ in range(200):
            if not core.has_unfinished_requests():
                break
            step()
        assert any(len(s.denoised) == 2 for s in steps), "their canvases shared passes"
    assert done == {"a": first["output"], "b": second["output"]}


@pytest.mark.parametrize("budget", [pytest.param(48, marks=pytest.mark.slow), 50])
def test_a_small_budget_takes_turns_with_whole_canvases(tiny_moe, budget):
    cases = tiny_moe.cases(16)[:6]
    with start_engine(
        tiny_moe.path, {"passes_per_step": 1, "commit_quorum": 0}, max_num_batched_tokens=budget, max_num_seqs=6
    ) as e:
        steps = watch(e)
        outputs = e.tokens([c["prompt"] for c in cases], [golden_params(c) for c in cases])
    assert outputs == [c["output"] for c in cases]
    assert all(width == CANVAS for s in steps for width in s.denoised.values())
    assert max(len(s.denoised) for s in steps) == budget // CANVAS
    everybody = {i for s in steps for i in s.denoised}
    last_seen = dict.fromkeys(everybody, 0)
    denoise_steps = [s for s in steps if s.denoised]
    for index, step in enumerate(denoise_steps, start=1):
        for req_id in step.denoised:
            waited = index - last_seen[req_id]
            assert waited <= 2 * len(everybody), f"{req_id} waited {waited} denoise steps"
            last_seen[req_id] = index


def test_commits_wait_for_the_quorum_and_share_a_step(tiny_moe):
    cases = tiny_moe.cases(16)[:5]
    widest = {}
    for quorum in (0, 1):
        with start_engine(tiny_moe.path, {"passes_per_step": 1, "commit_quorum": quorum}) as e:
            steps = watch(e)
            e.tokens([c["prompt"] for c in cases], [golden_params(c) for c in cases])
            commits = [s for s in steps if s.computed][1:]
            widest[quorum] = len(commits)
    assert widest[1] < widest[0], "waiting for everybody takes fewer, wider commits"


def test_the_last_canvas_is_as_narrow_as_the_room_that_is_left(tiny_moe):
    case = tiny_moe.cases(16)[8]
    room = 16 + 5
    with start_engine(tiny_moe.path, {"passes_per_step": 16}, max_model_len=len(case["prompt"]) + room) as e:
        steps = watch(e)
        (tokens,) = e.tokens([case["prompt"]], golden_params(case))
    assert len(tokens) == room
    assert tokens[:16] == case["output"][:16]
    assert [next(iter(s.denoised.values())) for s in steps if s.denoised] == [16, 5]
