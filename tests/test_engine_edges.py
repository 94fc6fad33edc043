"""Edges of one request: lengths around a canvas, a KV block and the context, ends at every position of a canvas, and
what is refused."""

import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import MAX_MODEL_LEN, start_engine
from vllm_twotower import diffusion_params
from vllm_twotower.oracle.plain_towers import PlainTwoTower
from vllm_twotower.oracle.reference import MaskDiffusion

CANVAS, KV_BLOCK, VOCAB, MASK, EOS = 16, 128, 512, 3, 2
THRESHOLD = 0.5


@pytest.fixture(scope="module")
def e(tiny_moe):
    options = {"passes_per_step": 16, "confidence_threshold": THRESHOLD}
    with start_engine(tiny_moe.path, options, enable_prefix_caching=False, max_num_seqs=32) as running:
        yield running


@pytest.fixture(scope="module")
def model(tiny_moe):
    return PlainTwoTower.load(tiny_moe.path)


def params(max_tokens=CANVAS + 1, **more):
    return diffusion_params(
        **{"temperature": 0.0, "ignore_eos": True, "detokenize": False, **more}, max_tokens=max_tokens
    )


def reference(model, prompt, max_tokens, **settings):
    """What the plain towers write, trimmed as a request is."""
    result = model.generate(prompt, max_tokens, MaskDiffusion(confidence_threshold=THRESHOLD, **settings))
    return list(result.token_ids)[:max_tokens]


def prompt_of(length):
    return [(37 * length + 11 * i) % (VOCAB - 4) + 4 for i in range(length)]


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_prompt_lengths_around_a_canvas_and_a_kv_block(e, model):
    assert KV_BLOCK in {g.kv_cache_spec.block_size for g in e.runner.kv_cache_config.kv_cache_groups}
    lengths = [1, 2, CANVAS - 1, CANVAS, CANVAS + 1, KV_BLOCK - 1, KV_BLOCK, KV_BLOCK + 1]
    lengths += [KV_BLOCK - CANVAS, 2 * KV_BLOCK - 1]
    prompts = [prompt_of(n) for n in lengths]
    outputs = e.tokens(prompts, params())
    for length, prompt, tokens in zip(lengths, prompts, outputs, strict=True):
        assert tokens == reference(model, prompt, CANVAS + 1), f"a prompt of {length} tokens"


def test_a_prompt_that_leaves_room_for_one_token(e):
    (output,) = e.generate([prompt_of(MAX_MODEL_LEN - 1)], params(max_tokens=100))
    assert len(output.outputs[0].token_ids) == 1
    assert output.outputs[0].finish_reason == "length"


def test_max_tokens_around_a_canvas(e, model):
    prompt, wanted = prompt_of(20), [1, 2, CANVAS - 1, CANVAS, CANVAS + 1, 2 * CANVAS]
    expected = reference(model, prompt, 2 * CANVAS)
    outputs = e.generate([prompt] * len(wanted), [params(n) for n in wanted])
    assert [list(o.outputs[0].token_ids) for o in outputs] == [expected[:n] for n in wanted]
    assert {o.outputs[0].finish_reason for o in outputs} == {"length"}


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_stop_token_at_every_position_of_a_canvas(e, model):
    """Two hot requests of two canvases: between them every position has a token that did not come before."""
    prompt, stops, wanted = prompt_of(20), [], []
    for seed in (0, 1):
        hot = {"temperature": 2.0, "seed": seed}
        whole = reference(model, prompt, 2 * CANVAS, **hot)
        for place in (i for i, token in enumerate(whole) if token not in whole[:i]):
            stops.append(params(40, **hot, stop_token_ids=[whole[place]]))
            wanted.append(whole[: place + 1])
    assert {(len(w) - 1) % CANVAS for w in wanted} == set(range(CANVAS)), "every position of a canvas"
    assert {(len(w) - 1) // CANVAS for w in wanted} == {0, 1}, "of both canvases"
    outputs = [o.outputs[0] for o in e.generate([prompt] * len(stops), stops)]
    assert [list(o.token_ids) for o in outputs] == wanted
    assert [(o.finish_reason, o.stop_reason) for o in outputs] == [("stop", w[-1]) for w in wanted]


@pytest.mark.parametrize(("liking", "place"), [(20.0, 0), (14.0, 2 * CANVAS + 2)], ids=["first token", "third canvas"])
def test_eos_ignore_eos_and_min_tokens(e, liking, place):
    prompt, bias = prompt_of(33), {"logit_bias": {EOS: liking}}
    variants = [{"ignore_eos": False}, {}, {"ignore_eos": False, "min_tokens": place + 2}]
    outputs = [o.outputs[0] for o in e.generate([prompt] * 3, [params(40, **bias, **v) for v in variants])]
    plain, ignoring, later = (list(o.token_ids) for o in outputs)
    assert (len(plain), plain.index(EOS), outputs[0].finish_reason) == (place + 1, place, "stop")
    assert (len(ignoring), outputs[1].finish_reason) == (40, "length")
    assert ignoring[: place + 1] == plain
    assert EOS not in later[: place + 2]
    assert len(later) > place + 2
    assert EOS not in later[:-1]


# ---- several, odd and refused ----------------------------------------------------------------------------------------


def test_n_samples_are_the_requests_with_the_next_seeds(e, model):
    prompt = prompt_of(40)
    samples = params(temperature=1.0, seed=70, n=3)
    (output,) = e.llm.generate([{"prompt_token_ids": prompt}], samples, use_tqdm=False)
    assert [list(o.token_ids) for o in output.outputs] == [
        reference(model, prompt, CANVAS + 1, temperature=1.0, seed=70 + i) for i in range(3)
    ]


def test_the_mask_id_in_a_prompt_is_a_token_and_never_an_answer(e, model):
    prompts = [[MASK], [5, MASK, MASK, 9], [MASK] * CANVAS, [*prompt_of(KV_BLOCK - 1), MASK]]
    outputs = e.tokens(prompts, params(logit_bias={MASK: 100.0}))
    assert not any(MASK in tokens for tokens in outputs)
    assert outputs == [reference(model, p, CANVAS + 1) for p in prompts]


def test_parameters_that_allow_no_token_end_the_request_with_an_error(e, model):
    """The only allowed token is forbidden: nothing can be revealed, and nothing is."""
    nothing = params(allowed_token_ids=[7], stop_token_ids=[7], min_tokens=5)
    prompt = prompt_of(20)
    alone, neighbour = e.generate([prompt, prompt], [nothing, params()])
    assert (alone.outputs[0].finish_reason, list(alone.outputs[0].token_ids)) == ("error", [])
    assert list(neighbour.outputs[0].token_ids) == reference(model, prompt, CANVAS + 1)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt cannot be empty"),
        ([5] * MAX_MODEL_LEN, "maximum model length of 512"),
        ([5] * (3 * MAX_MODEL_LEN), "maximum context length is 512 tokens"),
        ([5, VOCAB], f"oken id {VOCAB} is out of vocabulary"),
        ([2**40], "out of vocabulary"),
        ([5, -1], "out of vocabulary"),
    ],
    ids=["empty", "full", "far too long", "first unknown id", "huge id", "negative id"],
)
def test_what_cannot_be_a_prompt_is_refused_and_the_engine_lives(e, model, prompt, message):
    with pytest.raises((VLLMValidationError, ValueError), match=message):
        e.generate([prompt], params())
    assert e.tokens([[5, 6]], params(max_tokens=3)) == [reference(model, [5, 6], 3)]
