"""What one request may ask for, and where it ends: seeds, edges of the context length, stops, prompt logprobs, AR
beside diffusion."""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import MAX_MODEL_LEN, count_tensors, start_engine
from tests.harness.goldens import golden_params
from vllm_twotower import diffusion_params

CANVAS = 16


@pytest.fixture(scope="module")
def e(tiny_moe):
    with start_engine(tiny_moe.path, {"passes_per_step": 16}) as running:
        yield running


def greedy(**more):
    return diffusion_params(temperature=0.0, detokenize=False, **{"max_tokens": 32, "ignore_eos": True, **more})


# ---- randomness ------------------------------------------------------------------------------------------------------


def test_a_seed_fixes_the_tokens_alone_and_in_a_batch(e, tiny_moe):
    prompts = [c["prompt"] for c in tiny_moe.cases(16)[:8]]

    def random(seed):
        return diffusion_params(temperature=0.7, seed=seed, max_tokens=32, ignore_eos=True, detokenize=False)

    alone = e.tokens(prompts[2:3], random(1))[0]
    assert e.tokens(prompts[2:3], random(1))[0] == alone
    others = [random(seed) for seed in (7, 8, 1, 9, 10, 11, 12, 13)]
    assert e.tokens(prompts, others)[2] == alone
    assert e.tokens(prompts[2:3], random(2))[0] != alone
    assert e.tokens(prompts[2:3], greedy())[0] != alone


def test_n_samples_of_one_prompt_differ(e, tiny_moe):
    params = diffusion_params(temperature=2.0, seed=3, n=3, max_tokens=16, ignore_eos=True, detokenize=False)
    (output,) = e.llm.generate([{"prompt_token_ids": tiny_moe.ar[0]["prompt"]}], params, use_tqdm=False)
    samples = {tuple(o.token_ids) for o in output.outputs}
    assert len(samples) == 3


# ---- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2])
def test_short_prompts(e, length):
    (tokens,) = e.tokens([[17, 42][:length]], greedy())
    assert len(tokens) == 32
    assert 3 not in tokens


@pytest.mark.parametrize("room", [1, 5, CANVAS - 1, CANVAS, CANVAS + 1])
def test_generation_runs_into_max_model_len(e, room):
    prompt = [4 + i % 500 for i in range(MAX_MODEL_LEN - room)]
    (output,) = e.generate([prompt], greedy(max_tokens=100))
    assert len(output.outputs[0].token_ids) == room
    assert output.outputs[0].finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused(e):
    with pytest.raises(VLLMValidationError, match="maximum model length of 512"):
        e.generate([[5] * MAX_MODEL_LEN], greedy())


@pytest.mark.parametrize("max_tokens", [1, 3, CANVAS - 1, CANVAS, CANVAS + 1])
def test_max_tokens_trims_a_whole_canvas(e, tiny_moe, max_tokens):
    case = tiny_moe.cases(16)[5]
    params = golden_params(case)
    params.max_tokens = max_tokens
    (output,) = e.generate([case["prompt"]], params)
    assert list(output.outputs[0].token_ids) == case["output"][:max_tokens]
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_token_in_the_middle_of_a_canvas_ends_the_request(e, tiny_moe):
    case = tiny_moe.cases(16)[5]
    position = next(i for i, t in enumerate(case["output"]) if i > 3 and t not in case["output"][:i])
    params = diffusion_params(
        temperature=0.0,
        max_tokens=64,
        detokenize=False,
        stop_token_ids=[case["output"][position]],
        confidence_threshold=case["params"]["confidence_threshold"],
    )
    (output,) = e.generate([case["prompt"]], params)
    assert list(output.outputs[0].token_ids) == case["output"][: position + 1]
    assert output.outputs[0].finish_reason == "stop"


def test_the_mask_id_in_a_prompt_is_a_token_like_any_other(e):
    (tokens,) = e.tokens([[5, 3, 3, 9]], greedy())
    assert len(tokens) == 32
    assert 3 not in tokens


# ---- beside diffusion ------------------------------------------------------------------------------------------------


def test_ar_and_mask_diffusion_share_an_engine(e, tiny_moe):
    ar, diffusion = tiny_moe.ar[2:6], tiny_moe.cases(16)[2:6]
    params = [diffusion_params(mode="ar", temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)] * 4
    params += [golden_params(c) for c in diffusion]
    e.towers_of_steps.clear()
    outputs = e.tokens([c["prompt"] for c in ar + diffusion], params)
    assert outputs == [c["output"][:12] for c in ar] + [c["output"] for c in diffusion]
    e.assert_one_tower_per_step()


def test_finished_requests_leave_no_tensor_behind(e, tiny_moe):
    """All modes, sampled, with log-probabilities: after some rounds of the same requests a round adds nothing."""
    asked = {"temperature": 0.7, "seed": 3, "max_tokens": 20, "ignore_eos": True, "detokenize": False, "logprobs": 1}
    modes = ("mask_diffusion", "self_speculation", "mock_ar", "ar")
    params = [diffusion_params(mode=mode, **asked) for mode in modes for _ in range(4)]
    prompts = [c["prompt"] for c in tiny_moe.ar[:4]] * len(modes)
    counts = []
    for _ in range(6):  # a slot may keep its last request's log-probabilities, so the rounds need not agree at once
        e.tokens(prompts, params)
        counts.append(count_tensors())
        if counts[-2:-1] == counts[-1:]:
            break
    else:
        pytest.fail(f"tensors after each round: {counts}")


def test_prompt_logprobs_in_mask_diffusion_are_the_context_towers(e, tiny_moe):
    case = tiny_moe.cases(16)[8]
    params = golden_params(case)
    params.prompt_logprobs = 1
    (output,) = e.generate([case["prompt"]], params)
    assert list(output.outputs[0].token_ids) == case["output"]
    scored = output.prompt_logprobs
    assert len(scored) == len(case["prompt"])
    assert scored[0] is None
    with_ar = diffusion_params(mode="ar", temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    (ar_output,) = e.generate([case["prompt"]], with_ar)
    for token, ours, theirs in zip(case["prompt"][1:], scored[1:], ar_output.prompt_logprobs[1:], strict=True):
        assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_plain_sampling_params_use_the_engines_defaults(e, tiny_moe):
    case = tiny_moe.cases(16)[0]  # gamma 0.8, T 16: the defaults
    plain = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
    assert e.tokens([case["prompt"]], plain) == [case["output"]]
