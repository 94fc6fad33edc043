"""Canvases of different widths in one batch, and canvases whose request goes away."""

import pytest

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params


def test_narrower_canvases_per_request_share_a_batch(tiny_mlp):
    narrow, wide = tiny_mlp.cases(8)[2:5], tiny_mlp.cases(16)[2:5]
    params = [golden_params(c, canvas_length=8) for c in narrow] + [golden_params(c, canvas_length=16) for c in wide]
    with start_engine(tiny_mlp.path, {"canvas_length": 16, "passes_per_step": 3}) as e:
        outputs = e.tokens([c["prompt"] for c in narrow + wide], params)
    assert outputs == [c["output"] for c in narrow + wide]


def test_an_aborted_request_frees_its_canvas_and_leaves_its_neighbours_alone(tiny_moe):
    cases = tiny_moe.cases(16)[:4]
    with start_engine(tiny_moe.path, {"passes_per_step": 1}) as e:
        core = e.llm.llm_engine
        for index, case in enumerate(cases):
            core.add_request(str(index), {"prompt_token_ids": case["prompt"]}, golden_params(case))
        done = {}
        for step in range(300):
            for output in core.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            if step == 3:  # in the middle of its first canvas
                core.abort_request(["1"])
            if not core.has_unfinished_requests():
                break
        assert {i: done[i] for i in ("0", "2", "3")} == {str(i): cases[i]["output"] for i in (0, 2, 3)}
        assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)
        assert not e.scheduler._progress
        assert e.tokens([cases[1]["prompt"]], golden_params(cases[1])) == [cases[1]["output"]]
