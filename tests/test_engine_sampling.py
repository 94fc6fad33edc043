"""Every sampling parameter acts in mask diffusion, and acts as the plain reference says."""

import pytest
import torch

from tests.demo_questions import FIELDS, LONG
from tests.harness.engine import start_engine
from vllm_twotower import diffusion_params
from vllm_twotower.oracle.logits_rules import LogitsRules
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower
from vllm_twotower.oracle.reference import MaskDiffusion, generate_mask_diffusion

MAX_TOKENS = 32


@pytest.fixture(scope="module")
def model(tiny_mlp):
    return PlainTwoTower.load(tiny_mlp.path)


def reference(model, prompt, rules=None, **settings):
    result = model.generate(prompt, MAX_TOKENS, MaskDiffusion(rules=LogitsRules(**(rules or {})), **settings))
    return list(result.token_ids)


@pytest.fixture(scope="module")
def prompt(tiny_mlp):
    return tiny_mlp.cases(16)[5]["prompt"]


def cases(model, prompt):
    """Name -> (sampling parameters, the reference's rules, the reference's settings)."""
    plain = reference(model, prompt)
    common, second = plain[0], plain[1]
    warm = {"temperature": 1.0, "seed": 5}
    hot = {"temperature": 2.0, "seed": 5}
    return {
        "temperature": (hot, {}, hot),
        "top_k": ({**hot, "top_k": 3}, {"top_k": 3}, hot),
        "top_p": ({**hot, "top_p": 0.4}, {"top_p": 0.4}, hot),
        "min_p": ({**hot, "min_p": 0.3}, {"min_p": 0.3}, hot),
        "logit_bias": ({"logit_bias": {common: -50.0, 77: 3.0}}, {"logit_bias": {common: -50.0, 77: 3.0}}, {}),
        "allowed_token_ids": ({"allowed_token_ids": [50, 60, 70]}, {"allowed_token_ids": [50, 60, 70]}, {}),
        "presence_penalty": ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}, {}),
        "frequency_penalty": ({"frequency_penalty": 1.0}, {"frequency_penalty": 1.0}, {}),
        "repetition_penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}, {}),
        "min_tokens": (
            {"min_tokens": 20, "stop_token_ids": [second], "ignore_eos": True},
            {"min_tokens": 20, "stop_token_ids": [second]},
            {},
        ),
        "everything": (
            {**warm, "top_k": 50, "repetition_penalty": 1.2, "logit_bias": {common: -2.0}, "min_p": 0.01},
            {"top_k": 50, "repetition_penalty": 1.2, "logit_bias": {common: -2.0}, "min_p": 0.01},
            warm,
        ),
    }


def test_every_parameter_acts_as_in_the_reference(tiny_mlp, model, prompt):
    wanted = cases(model, prompt)
    plain = reference(model, prompt)
    params = [diffusion_params(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)]
    for sampling, _, _ in wanted.values():
        merged = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "detokenize": False, **sampling}
        params.append(diffusion_params(**merged))
    with start_engine(tiny_mlp.path, {"passes_per_step": 4}) as e:
        first, *outputs = e.tokens([prompt] * len(params), params)
    assert first == plain, "a neighbour's parameters change nothing"
    for (name, (_, rules, settings)), tokens in zip(wanted.items(), outputs, strict=True):
        expected = reference(model, prompt, rules, **settings)
        if name == "min_tokens":  # the stop token ends it, once it may
            end = next((i + 1 for i, t in enumerate(expected) if t == rules["stop_token_ids"][0]), MAX_TOKENS)
            assert end > 20
            expected = expected[:end]
        assert tokens == expected, name
        without = reference(model, prompt, **settings) if rules else plain
        assert tokens != without[: len(tokens)], f"{name} did nothing"


def test_bad_words_need_a_tokenizer_and_forbid_their_last_token():
    """On the demo model, which has one."""
    from vllm_twotower.commands.cli import DEMO_MODEL

    prompt = FIELDS

    def text(e, **more):
        params = diffusion_params(temperature=0.0, max_tokens=32, **more)
        (output,) = e.llm.generate([prompt], params, use_tqdm=False)
        return output.outputs[0].text

    with start_engine(DEMO_MODEL, {"passes_per_step": 16}, skip_tokenizer_init=False) as e:
        plain = text(e)
        assert "silver" in plain
        without = text(e, bad_words=["silver"])
        assert len(without) > 20
        assert "silver" not in without


def test_stop_strings_inside_and_across_canvases():
    """On the demo model, which has a tokenizer."""
    from vllm_twotower.commands.cli import DEMO_MODEL

    greedy = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}

    def text(e, **more):
        (output,) = e.llm.generate([LONG], diffusion_params(**greedy, **more), use_tqdm=False)
        return output.outputs[0]

    with start_engine(DEMO_MODEL, {"passes_per_step": 16}, skip_tokenizer_init=False, max_num_seqs=8) as e:
        whole = text(e)
        tokenizer = e.llm.get_tokenizer()
        border = len(tokenizer.decode(list(whole.token_ids)[:16]))
        for start in (border - 5, border - 1, border, border + 4):
            stop = whole.text[start : start + 6]
            end = whole.text.index(stop)
            stopped = text(e, stop=["nothing like this", stop])
            assert (stopped.text, stopped.finish_reason) == (whole.text[:end], "stop"), stop
            kept = text(e, stop=[stop], include_stop_str_in_output=True)
            assert kept.text == whole.text[: end + len(stop)]
        across = whole.text[border - 3 : border + 3]
        assert text(e, stop=[across], min_tokens=39).text.startswith(whole.text[:border]), "not before min_tokens"


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_logprobs_are_those_of_the_pass_that_revealed_each_token(tiny_mlp, model, prompt, mode):
    """Against a replay of the reference's canvases: same token, untempered, the mask id excluded."""
    cache, seen = ContextCache(), {}
    bias = {7: 4.0}
    rules = LogitsRules(logit_bias=bias)
    produced = 0

    def denoise(canvas, t):
        logits = model.denoise(torch.tensor([canvas]), torch.tensor([t]), cache)[0]
        for i, token in enumerate(canvas):
            if token == 3:
                scored = logits[i].clone()
                if mode == "processed_logprobs":
                    scored[7] += bias[7]
                scored[3] = float("-inf")
                seen[produced + i] = scored.log_softmax(-1)
        return logits

    def commit(canvas):
        nonlocal produced
        produced += len(canvas)
        model.extend_context(torch.tensor([canvas]), cache)

    with torch.inference_mode():
        model.extend_context(torch.tensor([prompt]), cache)
        expected = generate_mask_diffusion(prompt, MAX_TOKENS, denoise, commit, MaskDiffusion(rules=rules))
    params = diffusion_params(
        temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, logprobs=2, logit_bias=bias
    )
    silent = diffusion_params(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    with start_engine(tiny_mlp.path, {"passes_per_step": 2}, logprobs_mode=mode) as e:
        neighbour, output = e.generate([prompt, prompt], [silent, params])
    completion = output.outputs[0]
    assert list(completion.token_ids) == list(expected.token_ids)
    assert neighbour.outputs[0].logprobs is None
    assert len(completion.logprobs) == MAX_TOKENS
    for position, (token, row) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert row[token].logprob == pytest.approx(float(seen[position][token]), abs=1e-3)
        best = int(seen[position].argmax())
        assert row[best].logprob == pytest.approx(float(seen[position][best]), abs=1e-3)
        assert 3 not in row
