"""The plain algorithm and the plain towers against NVIDIA's reference: logits, tokens, passes and canvas traces."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.tolerances import GOLDEN_LOGITS
from vllm_twotower.core import MASK_TOKEN_ID
from vllm_twotower.oracle.plain_towers import ContextCache, PlainTwoTower
from vllm_twotower.oracle.reference import MaskDiffusion, generate_greedy


@pytest.fixture(params=["tiny_moe", "tiny_mlp"])
def golden(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def model(golden):
    with torch.inference_mode():
        yield PlainTwoTower.load(golden.path)


def test_every_mask_diffusion_case(golden, model):
    for case in golden.mask_diffusion:
        p = case["params"]
        result = model.generate(
            case["prompt"],
            p["max_new_tokens"],
            MaskDiffusion(
                canvas_length=p["block_size"],
                max_steps=p["steps_per_block"],
                confidence_threshold=p["confidence_threshold"],
            ),
        )
        assert list(result.token_ids) == case["output"], p
        assert result.num_denoise_passes == case["nfe"], p
        snapshots = [s for canvas in result.canvases for s in canvas]
        assert [list(s.tokens) for s in snapshots] == [step["xt"] for step in case["trace"]]
        assert [s.noise_level for s in snapshots] == pytest.approx([step["t"] for step in case["trace"]])


def test_ar(golden, model):
    for case in golden.ar:
        cache = ContextCache()

        def step(tokens, cache=cache):
            return model.context_logits(model.extend_context(torch.tensor([tokens]), cache))[0, -1]

        result = generate_greedy(step(case["prompt"]), lambda t: step([t]), len(case["output"]))
        assert list(result.token_ids) == case["output"]


def mock_ar(model, case, **settings):
    cache = ContextCache()
    model.extend_context(torch.tensor([case["prompt"][:-1]]), cache)

    def step(token):
        last = torch.tensor([[token]])
        model.extend_context(last, cache)
        return model.mock_ar(last, cache)[0, -1]

    return list(generate_greedy(step(case["prompt"][-1]), step, len(case["output"]), **settings).token_ids)


def test_mock_ar(golden, model):
    for case in golden.mock_ar:
        assert mock_ar(model, case, mask_token_id=MASK_TOKEN_ID) == case["output"]


def test_mock_ar_passes_over_the_mask_id_where_nvidias_argmax_takes_it(golden, model):
    """Its row of the head is made twice that of the token that comes first."""
    case = golden.mock_ar[0]
    head = model.weights["lm_head.weight"].clone()
    head[MASK_TOKEN_ID] = 2 * head[case["output"][0]]
    model = PlainTwoTower({**model.weights, "lm_head.weight": head}, model.shape)
    assert mock_ar(model, case)[0] == MASK_TOKEN_ID
    assert mock_ar(model, case, mask_token_id=MASK_TOKEN_ID) == case["output"]


def test_logits(golden, model):
    facts = json.loads((golden.path / "logits.json").read_text())
    logits = load_file(golden.path / "logits.safetensors")
    caches = []
    for index, prompt in enumerate(facts["prompts"]):
        caches.append(ContextCache())
        hidden = model.extend_context(torch.tensor([prompt]), caches[-1])
        assert_close(model.context_logits(hidden)[0, -1], logits.pop(f"p{index}_ar"))
    for case in facts["cases"]:
        width = case["block_size"]
        name = f"p{case['i']}_S{width}"
        for kind, canvas, level in (("masked", [3] * width, 1.0), ("partial", case["partial_xt"], case["partial_t"])):
            got = model.denoise(torch.tensor([canvas]), torch.tensor([level]), caches[case["i"]])[0]
            assert_close(got, logits.pop(f"{name}_{kind}"))
    assert not logits, "every golden was compared"


def assert_close(got, expected):
    torch.testing.assert_close(got, expected.view_as(got), atol=GOLDEN_LOGITS, rtol=0)
