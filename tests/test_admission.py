"""Request settings: every range check, and what reaches the engine is what was asked for or a refusal that says what to
type."""

import functools
import json
import math

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.input_processor import InputProcessor

from tests.harness.engine import start_engine
from vllm_twotower import diffusion_params
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.config import EngineOptions, RequestOptions
from vllm_twotower.core import Mode
from vllm_twotower.frontend.request_checks import check_beam_search, check_params, check_worker_limits


@functools.cache
def make_config(diffusion=True, **overrides):
    """The configuration of a real engine that serves the demo model."""
    options = json.loads(diffusion) if isinstance(diffusion, str) else diffusion
    extra = {"diffusion": options} if options else {}
    args = EngineArgs(str(DEMO_MODEL), additional_config=extra, max_model_len=64, hf_overrides=overrides)
    return args.create_engine_config()


def check(params, **settings):
    config = make_config(**settings)
    check_params(params, EngineOptions.read(config), config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("confidence_threshold", 0, "above 0 and at most 1"),
        ("confidence_threshold", 1.01, "above 0 and at most 1"),
        ("confidence_threshold", math.nan, "above 0 and at most 1"),
        ("confidence_threshold", "high", "above 0 and at most 1"),
        ("confidence_threshold", True, "above 0 and at most 1"),
        ("max_steps", 0, "from 1 to 1024"),
        ("max_steps", 2.0, "from 1 to 1024"),
        ("max_steps", True, "from 1 to 1024"),
        ("max_steps", 2**63, "from 1 to 1024"),
        ("canvas_length", 17, "from 1 to 16"),
        ("canvas_length", 0, "from 1 to 16"),
        ("canvas_length", None, "from 1 to 16"),
        ("mode", "diffuse", "mask_diffusion, mock_ar, self_speculation, ar"),
        ("mode", ["ar"], "mask_diffusion, mock_ar, self_speculation, ar"),
        ("canvas", 3, "unknown request setting 'diffusion_canvas'"),
    ],
)
def test_a_bad_setting_is_refused_by_name_with_what_is_allowed(key, value, message):
    with pytest.raises(ValueError, match=message) as refusal:
        check(SamplingParams(extra_args={f"diffusion_{key}": value}))
    assert f"diffusion_{key}" in str(refusal.value)


def test_good_settings_and_other_peoples_keys_pass():
    extra = {"diffusion_mode": "mask_diffusion", "diffusion_canvas_length": 1, "kv_transfer_params": {"x": 1}}
    check(SamplingParams(extra_args=extra))
    check(SamplingParams())


def test_mock_ar_scores_no_prompts():
    check(diffusion_params(mode="mock_ar"))
    with pytest.raises(ValueError, match=r"prompt_logprobs=1 cannot be honoured in mock_ar"):
        check(diffusion_params(mode="mock_ar", prompt_logprobs=1))


@pytest.mark.parametrize(
    "params",
    [{"structured_outputs": StructuredOutputsParams(regex="a+")}, {"logprob_token_ids": [5]}],
    ids=lambda p: next(iter(p)),
)
def test_what_mask_diffusion_cannot_honour_is_refused_and_ar_takes_it(params):
    with pytest.raises(ValueError, match=f"{next(iter(params))}.*diffusion_mode='ar'"):
        check(diffusion_params(**params))
    check(diffusion_params(mode="ar", **params))


def test_allowing_nothing_but_the_mask_is_refused():
    with pytest.raises(ValueError, match=r"allowed_token_ids=\[3\] allows the mask only"):
        check(diffusion_params(allowed_token_ids=[3]))


def test_the_mask_is_the_models_own():
    with pytest.raises(ValueError, match=r"allowed_token_ids=\[7\] allows the mask only"):
        check(diffusion_params(allowed_token_ids=[7]), mask_token_id=7)
    check(diffusion_params(allowed_token_ids=[3]), mask_token_id=7)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias has 1025 entries: use at most 1024"),
        ({"min_tokens": 1, "stop_token_ids": list(range(4, 133))}, "129 stop token ids"),
        ({"seed": 2**63 - 1, "n": 2}, "does not fit in 64 bits"),
        ({"seed": 2**63}, "does not fit in 64 bits"),
    ],
    ids=["bias", "stops", "seed of the second sample", "seed"],
)
def test_what_kills_vllms_worker_is_refused_in_every_mode(params, message):
    with pytest.raises(ValueError, match=message):
        check_worker_limits(SamplingParams(**params))
    check_worker_limits(SamplingParams(seed=-(2**63), n=4, min_tokens=1, stop_token_ids=[5]))


def test_bad_words_count_by_their_tokens():
    params = SamplingParams(bad_words=["x"])
    params._bad_words_token_ids = [[5] * 1025]
    with pytest.raises(ValueError, match="bad_words are 1025 tokens together: use at most 1024"):
        check_worker_limits(params)


def process(params, diffusion=True, by_keyword=True, prompt=(5, 6, 7)):
    """A request's way through vLLM's own request processing, as its engines call it."""
    prompt = {"type": "token", "prompt_token_ids": list(prompt)}
    processor = InputProcessor(make_config(diffusion))
    if by_keyword:  # streaming input
        return processor.process_inputs(
            request_id="a", prompt=prompt, params=params, supported_tasks=("generate",), resumable=False
        )
    return processor.process_inputs("a", prompt, params, supported_tasks=("generate",))


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("diffusion", [True, False])
def test_every_way_into_the_engine_is_checked(diffusion, by_keyword):
    """Before vLLM's own processing, which would end with a UnicodeEncodeError, and after it, which counts ids."""
    into = functools.partial(process, diffusion=diffusion, by_keyword=by_keyword)
    assert into(SamplingParams(max_tokens=4)).sampling_params.max_tokens == 4
    with pytest.raises(VLLMValidationError, match=r"bad_words='\\ud800' is not well-formed Unicode"):
        into(SamplingParams(bad_words=["fine", "\ud800"]))
    with pytest.raises(VLLMValidationError, match="stop token ids"):
        into(SamplingParams(min_tokens=1, stop_token_ids=list(range(4, 133))))
    with pytest.raises(VLLMValidationError, match="diffusion_max_steps=0" if diffusion else "autoregressively only"):
        into(SamplingParams(extra_args={"diffusion_max_steps": 0}))


def test_the_prompt_is_checked_too():
    with pytest.raises(VLLMValidationError, match="send 2 tokens or more"):
        process(diffusion_params(mode="mock_ar"), prompt=[5])


def test_vllm_still_admits_what_it_cannot_send_to_the_engine():
    """Death test of ``_check_encoding``; over HTTP in test_fuzz.py."""
    from vllm.v1.serial_utils import MsgpackEncoder

    for params in (SamplingParams(stop=["\ud800"]), SamplingParams(stream_interval=10**40)):
        with pytest.raises((UnicodeEncodeError, OverflowError)):
            MsgpackEncoder().encode(params)


def test_the_models_own_stop_tokens_count(tiny_moe):
    """They are added by vLLM's own processing, so the check has to come after that."""
    params = diffusion_params(min_tokens=1, stop_token_ids=list(range(4, 132)), max_tokens=4, detokenize=False)
    with start_engine(tiny_moe.path) as e:
        with pytest.raises(VLLMValidationError, match="129 stop token ids"):
            e.tokens([[5, 6, 7]], params)
        assert len(e.tokens([[5, 6, 7]], diffusion_params(max_tokens=4, ignore_eos=True, detokenize=False))[0]) == 4


def test_an_engine_without_diffusion_refuses_our_keys():
    check(SamplingParams(logprobs=1), diffusion=False)
    with pytest.raises(ValueError, match="autoregressively only"):
        check(diffusion_params(max_steps=4), diffusion=False)


def test_diffusion_params_is_a_plain_sampling_params():
    params = diffusion_params(mode="mask_diffusion", confidence_threshold=0.9, max_tokens=5, extra_args={"mine": 1})
    assert type(params) is SamplingParams
    assert params.max_tokens == 5
    assert params.extra_args == {"mine": 1, "diffusion_mode": "mask_diffusion", "diffusion_confidence_threshold": 0.9}
    with pytest.raises(ValueError, match="diffusion_confidence_threshold=2"):
        diffusion_params(confidence_threshold=2)


def test_defaults_come_from_the_engine():
    engine = EngineOptions(canvas_length=8, max_steps=5, confidence_threshold=0.7)
    options = RequestOptions.from_extra_args(None, engine)
    assert options == RequestOptions(mode=Mode.MASK_DIFFUSION, canvas_length=8, max_steps=5, confidence_threshold=0.7)


def test_a_server_may_decode_in_another_mode_what_it_would_refuse():
    """Only for requests that name no mode, and without a trace in the client's own parameters."""
    asked = SamplingParams(logprob_token_ids=[5], max_tokens=4)
    for mode in ("ar", "self_speculation"):
        diffusion = json.dumps({"unsupported": mode})
        options = EngineOptions.read(make_config(diffusion))
        admitted = process(asked, diffusion).sampling_params
        assert admitted.extra_args == {"diffusion_mode": mode}
        assert asked.extra_args is None
        assert process(SamplingParams(max_tokens=4), diffusion).sampling_params.extra_args is None
        with pytest.raises(VLLMValidationError, match="cannot be honoured in mask_diffusion"):
            process(diffusion_params(mode="mask_diffusion", logprob_token_ids=[5]), diffusion)
        with pytest.raises(VLLMValidationError, match="allows the mask only"):
            process(SamplingParams(allowed_token_ids=[3]), diffusion)
        check_beam_search({}, options)
        with pytest.raises(ValueError, match="beam search cannot be honoured in mock_ar"):
            check_beam_search({"diffusion_mode": "mock_ar"}, options)
        with pytest.raises(ValueError, match="diffusion_max_steps=0 is not allowed"):
            check_beam_search({"diffusion_max_steps": 0}, options)
    with pytest.raises(ValueError, match="unsupported='drop' is not allowed: use one of refuse, self_speculation, ar"):
        EngineOptions(unsupported="drop")


def test_what_is_decoded_in_another_mode_gets_that_modes_answer():
    words = ["yes", "no", "perhaps"]
    choice = StructuredOutputsParams(choice=words)
    with start_engine(DEMO_MODEL, {"unsupported": "self_speculation"}, skip_tokenizer_init=False) as e:
        params = functools.partial(diffusion_params, temperature=0.0, max_tokens=8)
        results = [
            e.llm.generate("Sort: b1 a2\nAnswer:", params(**more), use_tqdm=False)[0].outputs[0]
            for more in (
                {"structured_outputs": choice},
                {"structured_outputs": choice, "mode": "ar"},
                {"logprob_token_ids": [5, 9]},
                {"logprob_token_ids": [5, 9], "mode": "ar"},
            )
        ]
    assert results[0].text == results[1].text in words
    assert results[2].token_ids == results[3].token_ids
    for got, expected in zip(results[2].logprobs, results[3].logprobs, strict=True):
        assert {5, 9} <= set(got) == set(expected)
        assert got[5].logprob == pytest.approx(expected[5].logprob, abs=1e-4)
