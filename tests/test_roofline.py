"""The byte-counting model: its terms against hand counts, and the page in docs against what it gives today."""

import dataclasses
import json
import random

import pytest

from benchmarks import roofline
from benchmarks.roofline_parts import published
from tests.test_loading import REAL_CONFIG
from vllm_twotower.planning.assumptions import FITTED_FIXED_S, MEMORY_FLOOR, WITH_OVERHEAD, Assumptions
from vllm_twotower.planning.canvas_passes import CanvasPasses
from vllm_twotower.planning.forward_cost import Machine, ar_step, context_step, denoise_pass, expected_experts
from vllm_twotower.planning.gpus import B200, H100, H200
from vllm_twotower.planning.model_facts import ModelFacts
from vllm_twotower.planning.placement import Placement
from vllm_twotower.planning.throughput import StepTimes, Workload, count_steps, diffusion_tokens_per_s
from vllm_twotower.planning.tower_sizes import Part, Precision, Tower, TowerSizes

REAL = ModelFacts.from_config(REAL_CONFIG)
TOWERS = {tower: TowerSizes.of(REAL, tower) for tower in Tower}
CONTEXT = TOWERS[Tower.CONTEXT]


def times(gpu=H100, num_gpus=2, placement=Placement.COLOCATED, **load):
    return StepTimes(
        towers=TOWERS,
        gpu=gpu,
        num_gpus=num_gpus,
        placement=placement,
        precision=Precision.BF16,
        workload=Workload(**load),
    )


@pytest.mark.parametrize(("num_experts", "per_token", "tokens"), [(128, 6, 16), (128, 6, 1), (8, 2, 5), (6, 2, 40)])
def test_distinct_experts_are_those_that_independent_tokens_touch(num_experts, per_token, tokens):
    source, trials = random.Random(0), 2000
    touched = 0
    for _ in range(trials):
        touched += len({e for _ in range(tokens) for e in source.sample(range(num_experts), per_token)})
    assert expected_experts(num_experts, per_token, tokens) == pytest.approx(touched / trials, rel=0.02)
    assert expected_experts(0, 0, tokens) == 0


def test_a_full_pass_reads_the_towers_weights():
    """All experts touched: what is read is what is resident, without embeddings and the tabulated time embedding."""
    cost = Machine(gpu=H200).cost(TOWERS[Tower.DENOISER], denoise_pass(4000, 0, 16, 1.0))
    sizes = TOWERS[Tower.DENOISER]
    unread = sizes.bytes_of(Part.EMBEDDING) + sizes.bytes_of(Part.TIME)
    weights = cost.dense_bytes + cost.expert_bytes + cost.head_bytes
    assert weights == pytest.approx(sizes.resident_bytes() - unread)


def test_the_terms_of_a_forward_by_hand():
    machine, rows, length = Machine(gpu=H200), 4, 1000
    step = machine.cost(CONTEXT, ar_step(rows, length))
    assert step.kv_bytes == 6144 * (rows * length + rows)
    assert step.state_bytes == 2 * rows * 49_082_368
    assert step.head_bytes == 131072 * 2688 * 2
    assert step.flops == pytest.approx(2 * 3.228e9 * rows, rel=0.05), "two per active weight, and attention and scan"
    commit = machine.cost(CONTEXT, context_step(rows, rows * 16, length))
    assert commit.head_bytes == commit.logit_bytes == 0
    one_pass = machine.cost(TOWERS[Tower.DENOISER], denoise_pass(rows, length, 16, 0.5))
    assert one_pass.state_bytes == commit.state_bytes / 2, "read, not written"
    assert one_pass.logit_bytes == 32 * 131072 * 8


def test_two_gpus_halve_what_is_sharded_and_pay_for_the_link():
    one, two = Machine(gpu=H100), Machine(gpu=H100, num_gpus=2)
    shape = denoise_pass(64, 2048, 16, 0.6)
    assert two.cost(CONTEXT, shape).expert_bytes == one.cost(CONTEXT, shape).expert_bytes / 2
    assert one.link_s(one.cost(CONTEXT, shape)) == 0
    assert two.link_s(two.cost(CONTEXT, shape)) > 53 * Assumptions().message_s
    assert two.seconds(CONTEXT, shape) > one.seconds(CONTEXT, shape) / 2


def test_fp8_halves_experts_and_linears():
    shape = denoise_pass(64, 2048, 16, 0.6)
    bf16, fp8 = (Machine(gpu=H100, precision=p).cost(CONTEXT, shape) for p in Precision)
    assert fp8.expert_bytes == bf16.expert_bytes / 2
    assert fp8.head_bytes == bf16.head_bytes


def test_passes_have_the_mean_asked_for_and_repeat():
    passes = CanvasPasses(mean=5.9)
    counts = [passes.draw_counts(r) for r in range(200)]
    drawn = [next(c) for c in counts for _ in range(50)]
    assert sum(drawn) / len(drawn) == pytest.approx(5.9, rel=0.02)
    assert set(drawn) <= set(range(1, 17))
    again = passes.draw_counts(7)
    assert [next(again) for _ in range(50)] == drawn[7 * 50 : 8 * 50]
    with pytest.raises(ValueError, match="use a number from 1 to max_steps=16"):
        CanvasPasses(mean=17)


def test_no_policy_beats_full_sharing_and_one_request_needs_none():
    ours = times()
    for batch in (8, 32):
        assert diffusion_tokens_per_s(ours, batch) < roofline.perfect_tokens_per_s(ours, batch)
    assert diffusion_tokens_per_s(ours, 1) == pytest.approx(roofline.perfect_tokens_per_s(ours, 1), rel=0.03)


def test_a_simulation_counts_every_canvas_once():
    passes, rows = CanvasPasses(mean=5.9), 8
    steps = count_steps(passes, rows, 0.4)
    assert sum(held * count for held, count in steps.commits.items()) == steps.canvases
    a_canvas = sum(held * count for held, count in steps.denoise.items()) / steps.canvases
    assert a_canvas == pytest.approx(5.9, rel=0.05)
    assert max(steps.denoise) <= rows


def test_a_fixed_time_is_paid_once_per_forward():
    shape = ar_step(8, 2048)
    at_floor, dearer = (Machine(gpu=H200, assumed=a).seconds(CONTEXT, shape) for a in (MEMORY_FLOOR, WITH_OVERHEAD))
    assert dearer - at_floor == pytest.approx(WITH_OVERHEAD.fixed_s)


def test_the_fit_finds_the_times_that_made_the_figures():
    made = published.Overhead(fixed_s=3e-3, prompt_token_s=2e-6)
    floor = published.published_machine(TOWERS)
    runs = tuple(
        dataclasses.replace(run, time_per_token_s=made.time_per_token_s(run, floor.ar_s(run.requests)))
        for run in published.RUNS
    )
    found = published.fit_overhead(TOWERS, runs)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(made))


def test_the_fixed_time_is_the_fit_to_the_published_figures():
    shown = published.compare(TOWERS)
    assert round(shown["fixed_ms"], 1) == FITTED_FIXED_S * 1e3
    fitted = [run for run in shown["runs"] if run["in_fit"]]
    assert len(fitted) == 7
    assert max(abs(run["error"]) for run in fitted) < 0.06
    assert 40 < shown["full_chunk_ms"] < 49, "the longest gaps of the source, which were not fitted: 40.7 to 48.2 ms"


def test_with_one_request_the_fixed_time_decides():
    """AR pays it for every token, mask diffusion 6.9 times for 16."""
    fast = roofline.Setup(B200, 2, Placement.COLOCATED, Precision.FP8)
    floor, overhead = (roofline.speed_up(TOWERS, fast, 1, Workload(), a) for a in (MEMORY_FLOOR, WITH_OVERHEAD))
    assert floor == pytest.approx(1.0, abs=0.02)
    assert overhead > 1.6


def test_winning_ranges():
    assert roofline.winning_ranges(lambda b: 13 <= b <= 200) == [(13, 200)]
    assert roofline.winning_ranges(lambda b: b < 3 or b > 90) == [(1, 2), (91, 256)]
    assert roofline.winning_ranges(lambda b: False) == []


def test_the_page_shows_what_the_model_gives_today():
    """The tables in docs come from the committed JSON, and the JSON's cheap parts from today's code."""
    result = json.loads(roofline.RESULT.read_text())
    page = roofline.PAGE.read_text()
    assert roofline.fill_page(page, roofline.tables(result)) == page, "run python -m benchmarks.roofline --write"
    towers, load = roofline.read_towers(), Workload()
    assert result["breakdown"] == roofline.breakdown(towers, load, MEMORY_FLOOR)
    assert result["published"]["fixed_ms"] == pytest.approx(published.compare(towers)["fixed_ms"])
    for name, assumed in roofline.CASES.items():
        sweep = result["cases"][name]["sweep"]
        shown = next(r for r in sweep if r["setup"] == roofline.REFERENCE.name and r["batch"] == 64)
        assert shown["speed_up"] == pytest.approx(roofline.speed_up(towers, roofline.REFERENCE, 64, load, assumed))
    assert roofline.PICTURE.stat().st_size > 10_000
    with pytest.raises(ValueError, match="one pair of marks"):
        roofline.fill_page("", {"speed-up, floor": "x"})


def test_the_benchmarks_model_is_the_real_one():
    config = json.loads(roofline.CONFIG.read_text())
    assert {name: config[name] for name in REAL_CONFIG} == REAL_CONFIG
