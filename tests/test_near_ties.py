"""A difference counts as legal where the reference shows a near-tie, and nowhere else (``near_ties.py``).

The near-ties are made: a setting is bisected to where the reference's tokens change, so that on both sides of that
point one decision is as near as fp32 knows.
"""

import re

import pytest
import torch

from tests.near_ties import NEAR, check_same, legal_ties, replay
from tests.request_mixes import MixedRequest
from vllm_twotower.core import MASK_TOKEN_ID, Mode
from vllm_twotower.oracle.logits_rules import LogitsRules
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower
from vllm_twotower.oracle.reference import MaskDiffusion, generate_greedy

MAX_TOKENS = 8


@pytest.fixture(scope="module")
def model(tiny_moe):
    with torch.inference_mode():
        yield PlainTwoTower.load(tiny_moe.path)


def request_of(mode="mask_diffusion", **settings):
    prompt = [(37 * i) % 500 + 4 for i in range(12)]
    defaults = {"mode": mode, "temperature": 0.0, "seed": 5, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    if mode == "mask_diffusion":
        defaults |= {"canvas_length": 8, "max_steps": 8, "confidence_threshold": 1.0}
    return MixedRequest(prompt, defaults | settings, 0, None)


def written(model, request):
    """What the plain reference writes."""
    settings = dict(request.settings)
    mode, _, limit = Mode(settings.pop("mode")), settings.pop("ignore_eos"), settings.pop("max_tokens")
    bias = settings.pop("logit_bias", {})
    if mode is Mode.MASK_DIFFUSION:
        result = model.generate(request.prompt, limit, MaskDiffusion(rules=LogitsRules(logit_bias=bias), **settings))
        return list(result.token_ids)[:limit]
    cache = ContextCache()
    model.extend_context(torch.tensor([request.prompt[:-1]]), cache)

    def step(token):
        last = torch.tensor([[token]])
        hidden = model.extend_context(last, cache)
        logits = model.mock_ar(last, cache) if mode is Mode.MOCK_AR else model.context_logits(hidden)
        for biased, amount in bias.items():
            logits[0, -1, biased] += amount
        return logits[0, -1]

    mask_token_id = MASK_TOKEN_ID if mode is Mode.MOCK_AR else None
    return list(generate_greedy(step(request.prompt[-1]), step, limit, mask_token_id).token_ids)


def bisected(model, make, low, high):
    """Two values of a setting as near as can be, between which the tokens change."""
    first = written(model, make(low))
    assert written(model, make(high)) != first, "something in between changes the tokens"
    while high - low > NEAR / 10:
        middle = (low + high) / 2
        if written(model, make(middle)) == first:
            low = middle
        else:
            high = middle
    return low, high


@pytest.mark.parametrize(
    ("kind", "make", "low", "high"),
    [
        ("position .*: logits", lambda x: request_of("ar", logit_bias={100: x}), 0.0, 40.0),
        ("position .*: logits", lambda x: request_of("mock_ar", logit_bias={100: x}), 0.0, 40.0),
        ("position .*: logits", lambda x: request_of(logit_bias={100: x}, max_steps=1), 0.0, 40.0),
        ("position .*: logits", lambda x: request_of(logit_bias={100: x}, max_steps=1, temperature=1.0), 0.0, 40.0),
        ("confidence .*, threshold", lambda x: request_of(confidence_threshold=x), 0.05, 0.95),
        ("confidences", lambda x: request_of(logit_bias={66: x}), 0.0, 8.0),
    ],
    ids=["ar", "mock_ar", "canvas", "sampled canvas", "threshold", "order"],
)
def test_a_near_tie_is_legal_and_printed_and_a_farther_one_is_not(model, capsys, kind, make, low, high):
    low, high = bisected(model, make, low, high)
    before, after = written(model, make(low)), written(model, make(high))
    assert replay(model, make(low), before) == []
    assert not check_same(model, make(low), after, before, False, "here")
    out = capsys.readouterr().out
    print(out)
    assert re.search(f"legal: .*{kind}", out)
    far = make(low - 200 * NEAR)
    assert legal_ties(model, far, after, written(model, far)) is None


def test_equal_tokens_are_the_same_and_what_left_has_a_part_of_them(model):
    request = request_of()
    alone = written(model, request)
    assert check_same(model, request, alone, alone, False, "here")
    assert check_same(model, request, alone[:5], alone, True, "here")


@pytest.mark.parametrize("mode", list(Mode))
def test_a_doctored_difference_fails(model, mode):
    request = request_of(mode.value)
    alone = written(model, request)
    assert replay(model, request, alone) == []
    doctored = [[*alone[:i], alone[i] ^ 1, *alone[i + 1 :]] for i in range(MAX_TOKENS)]
    doctored += [alone[:-1], [*alone, 7], alone[::-1], []]
    for tokens in doctored:
        with pytest.raises(AssertionError, match="no near-tie explains here"):
            check_same(model, request, tokens, alone, False, "here")
    with pytest.raises(AssertionError, match="no near-tie explains here"):
        check_same(model, request, doctored[3][:5], alone, True, "here")
    with pytest.raises(AssertionError, match="no near-tie explains here"):  # the one alone may be the wrong one
        check_same(model, request, alone, doctored[3], False, "here")
