"""Too little of everything: KV blocks for two requests, cached prefixes that come and go, chunks of a canvas's length,
one place.

The tokens are those of NVIDIA's reference (goldens), or those that the request gets alone from an empty cache.
"""

import itertools
import math

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.harness.engine import start_engine
from tests.harness.goldens import golden_params, greedy_params
from tests.request_mixes import MixedRequest, play

CANVAS, KV_BLOCK = 16, 128
KV_FOR_TWO = 3 << 19
"""12 blocks; a request of 128 to 256 tokens holds two for keys and values and two Mamba states."""


def all_modes(golden, diffusion, one_by_one, num_tokens=32):
    """Golden requests in mask diffusion, AR and mock-AR: prompts, parameters and what NVIDIA's reference writes."""
    requests = []
    for case in [golden.cases(CANVAS)[i] for i in diffusion]:
        short = golden_params(case, num_tokens)
        requests.append((case["prompt"], short, case["output"][:num_tokens]))
    for mode, cases in (("ar", golden.ar), ("mock_ar", golden.mock_ar)):
        requests += [(c["prompt"], greedy_params(mode, 8), c["output"][:8]) for c in [cases[i] for i in one_by_one]]
    return [list(part) for part in zip(*requests, strict=True)]


def check(e, requests, max_steps):
    prompts, params, expected = requests
    assert e.tokens(prompts, params, max_steps) == expected
    e.assert_one_tower_per_step()
    assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)


# ---- memory for two --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix_caching", "passes_per_step"),
    [(False, 16), *(pytest.param(*p, marks=pytest.mark.slow) for p in [(False, 1), (True, 1), (True, 4), (True, 16)])],
)
def test_a_preemption_storm(tiny_moe, prefix_caching, passes_per_step):
    # prompts of 113, 120 and 127 tokens: everybody needs a second KV block in the middle
    growing = (6, 7, 8)
    requests = all_modes(tiny_moe, [10 * k + i for k in range(5) for i in growing], growing)
    requests = [part[:20] for part in requests]
    assert len(requests[0]) == 20
    with start_engine(
        tiny_moe.path,
        {"passes_per_step": passes_per_step},
        enable_prefix_caching=prefix_caching,
        max_num_seqs=20,
        max_model_len=256,
        kv_cache_memory_bytes=KV_FOR_TWO,
    ) as e:
        check(e, requests, max_steps=4000)
        print(f"{e.scheduler.kv_cache_config.num_blocks} KV blocks", end=", ")
        print(f"{e.num_preemptions} preemptions in {len(e.towers_of_steps)} steps")
        # with prefix caching, and several passes a step, fewer are preempted: 4 of the 20 at 16 passes
        assert e.num_preemptions >= (3 if prefix_caching else 10)


# ---- prefixes --------------------------------------------------------------------------------------------------------


def check_cuts(e, prompt, output, cuts):
    """Prompts that are the first ``cut`` tokens of another request, prompt and canvases, and go on differently."""
    whole = prompt + output
    prompts = [whole[:cut] + [(7 * cut + i) % 500 + 4 for i in range(3)] for cut in cuts]
    params = greedy_params("mask_diffusion", CANVAS + 1, confidence_threshold=0.5)
    expected = []
    for cut_prompt in prompts:
        e.llm.reset_prefix_cache()
        expected += e.tokens([cut_prompt], params)
    e.llm.reset_prefix_cache()
    hits = {}
    for again in range(2):  # what these write must not spoil what they read
        assert e.tokens([prompt], greedy_params("mask_diffusion", len(output))) == [output]
        for cut, one, wanted in zip(cuts, e.generate(prompts, params), expected, strict=True):
            assert list(one.outputs[0].token_ids) == wanted, f"cut at {cut}, round {again}"
            hits.setdefault(cut, one.num_cached_tokens)  # in the second round there are its own blocks
    assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)
    return hits


@pytest.mark.parametrize(
    "cuts",
    [[112, 127, 128, 129, 130, 145], pytest.param(range(109, 180), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_shared_prefixes_cut_around_a_kv_block_and_canvas_boundaries(tiny_moe, cuts):
    case = tiny_moe.cases(CANVAS)[6]  # threshold 0.8, 16 passes: the engine's defaults
    prompt, output = case["prompt"] + case["output"][:CANVAS], case["output"][CANVAS:]
    assert len(prompt) == 129, "canvases begin at 129, 145, 161; a KV block of the prompt ends at 128"
    with start_engine(tiny_moe.path, {"passes_per_step": 16}, enable_prefix_caching=True, max_num_seqs=8) as e:
        hits = check_cuts(e, prompt, output, list(cuts))
    assert hits == {cut: KV_BLOCK if cut >= KV_BLOCK else 0 for cut in cuts}


@pytest.mark.parametrize("mode", ["ar", "self_speculation", "mask_diffusion", "mock_ar"])
def test_every_mode_reports_what_a_prompt_found_in_the_cache_and_added_to_it(tiny_moe, mode):
    """Of 300 tokens two blocks can be shared; mock-AR does not read the cache."""
    prompt = [(31 * i) % 500 + 4 for i in range(300)]
    params = greedy_params(mode, 2 * CANVAS)
    with start_engine(tiny_moe.path, {"passes_per_step": 4}, enable_prefix_caching=True, max_num_seqs=4) as e:
        outputs = [e.generate([prompt], params)[0] for _ in range(2)]
    reported = [(o.num_cached_tokens, o.num_cache_creation_tokens) for o in outputs]
    assert reported == [(0, 2 * KV_BLOCK), (0, 2 * KV_BLOCK) if mode == "mock_ar" else (2 * KV_BLOCK, 0)]


def test_a_prefix_that_is_being_written_holds_the_queue_up_for_four_steps_at_most(tiny_moe):
    """vLLM admits nobody whose prefix another one writes in the same step, nor anybody behind it in the queue. The
    first prompt takes two such steps, a denoise step of its canvas follows, and then all have to come in."""
    settings = {"mode": "mask_diffusion", "temperature": 0.0, "max_tokens": CANVAS, "confidence_threshold": 1.0}
    stem = [(31 * i) % 500 + 4 for i in range(230)]
    prompts = [stem, [*stem[:200], *range(100, 130)], [7, 8, 9]]
    mix = [MixedRequest(prompt, {**settings, "ignore_eos": True}, 0, None) for prompt in prompts]
    options = {"passes_per_step": 1, "commit_quorum": 1}
    with start_engine(tiny_moe.path, options, enable_prefix_caching=True, max_num_seqs=8) as e:
        assert play(e, mix).longest_queue <= 4


@pytest.mark.slow
def test_prefixes_that_are_evicted_and_computed_again(tiny_moe):
    """Memory for two; six prompts of two blocks in turns, again and again."""
    stems = [[(31 * k + 3 * i) % 500 + 4 for i in range(200)] for k in range(6)]
    params = greedy_params("mask_diffusion", 20, confidence_threshold=0.5)
    options = {"passes_per_step": 16}
    with start_engine(tiny_moe.path, options, enable_prefix_caching=False) as e:
        prompts = [stem[:cut] for cut in (127, 128, 129, 200) for stem in stems]
        expected = {tuple(p): e.tokens([p], params)[0] for p in prompts}
    cached = []
    with start_engine(
        tiny_moe.path,
        options,
        enable_prefix_caching=True,
        max_num_seqs=4,
        max_model_len=256,
        kv_cache_memory_bytes=2 << 20,
    ) as e:
        for start in range(3):
            order = prompts[start:] + prompts[:start] + [p for p in prompts[::5] for _ in range(2)]
            for output in e.generate(order, params, max_steps=2000):
                assert list(output.outputs[0].token_ids) == expected[tuple(output.prompt_token_ids)]
                cached.append((tuple(output.prompt_token_ids), output.num_cached_tokens))
            assert e.scheduler.kv_cache_manager.usage == pytest.approx(0)
    long_enough = [n for prompt, n in cached if len(prompt) > KV_BLOCK]
    assert any(long_enough), "no prefix was found in the cache"
    assert 0 in long_enough[len(long_enough) // 3 :], "no prefix was evicted"


# ---- chunks and places -----------------------------------------------------------------------------------------------


def check_room(golden, budget, places, **more):
    with start_engine(
        golden.path,
        {"passes_per_step": 4},
        enable_prefix_caching=more.pop("prefix_caching", False),
        max_num_batched_tokens=budget,
        max_num_seqs=places,
        **more,
    ) as e:
        check(e, all_modes(golden, range(5, 50, 7), (7, 8), num_tokens=20), max_steps=1500)


@pytest.mark.parametrize(
    ("budget", "places", "threshold"), [(16, 16, 0), (23, 1, 0), (64, 32, 17)], ids=["canvas", "alone", "threshold"]
)
def test_chunks_as_small_as_a_canvas_and_few_places(tiny_moe, budget, places, threshold):
    check_room(tiny_moe, budget, places, long_prefill_token_threshold=threshold)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_every_chunk_size_up_to_64_and_1_to_32_places(tiny_moe, prefix_caching):
    for budget, places in zip(range(CANVAS, 65), itertools.cycle([1, 2, 3, 5, 8, 13, 16, 24, 32])):
        print(f"budget {budget}, {places} places", flush=True)
        check_room(tiny_moe, budget, min(places, budget), prefix_caching=prefix_caching)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("threshold", [16, 17, 31, 100, 128, 129])
def test_long_prompts_in_pieces(tiny_moe, threshold):
    check_room(tiny_moe, 256, 16, long_prefill_token_threshold=threshold, prefix_caching=True)


@pytest.mark.parametrize(
    ("setting", "value"), [("max_num_batched_tokens", 15), ("long_prefill_token_threshold", 15), ("max_model_len", 16)]
)
def test_less_than_a_canvas_is_refused_at_start(tiny_moe, setting, value):
    settings = {"max_model_len": 512, "max_num_seqs": 4, "kv_cache_memory_bytes": 64 << 20, setting: value}
    args = EngineArgs(
        model=str(tiny_moe.path), skip_tokenizer_init=True, additional_config={"diffusion": True}, **settings
    )
    with pytest.raises(ValueError, match=rf"{setting}={value}.* or more"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("budget", "commit_quorum"),
    [(CANVAS, 1), *(pytest.param(*p, marks=pytest.mark.slow) for p in [(2 * CANVAS + 1, 1), (CANVAS, 0)])],
)
def test_a_budget_of_one_canvas_leaves_nobody_waiting(tiny_moe, budget, commit_quorum):
    """Six requests take turns, and a seventh with a long prompt comes in the middle.

    A turn is a denoise step, the commit that its canvas waits for, and a step for the newcomer; a canvas takes one
    denoise step here, so nobody waits for more than everybody's turn.
    """
    cases = tiny_moe.cases(CANVAS)[:7]
    mix = [MixedRequest(c["prompt"], request_settings(c), 0 if i < 6 else 20, None) for i, c in enumerate(cases)]
    options = {"passes_per_step": 16, "commit_quorum": commit_quorum}
    room = {"max_num_batched_tokens": budget, "max_num_seqs": 8, "enable_prefix_caching": False}
    with start_engine(tiny_moe.path, options, **room) as e:
        played = play(e, mix)
    assert played.tokens == [c["output"] for c in cases]
    turns = math.ceil(len(mix) / (budget // CANVAS))
    print(f"longest wait {played.longest_wait}, in the queue {played.longest_queue}, {turns} turns")
    assert played.longest_wait <= 3 * turns
    assert played.longest_queue <= 3 * turns


def request_settings(case):
    """A golden case as ``diffusion_params`` takes it."""
    p = case["params"]
    return {
        "mode": "mask_diffusion",
        "temperature": 0.0,
        "max_tokens": p["max_new_tokens"],
        "confidence_threshold": p["confidence_threshold"],
        "max_steps": p["steps_per_block"],
        "ignore_eos": True,
    }
