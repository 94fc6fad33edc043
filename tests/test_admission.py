"""Request settings: every range check, and what reaches the engine is what was asked for or a refusal that says what to
type."""

import math

import pytest
from engine_harness import engine
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_twotower import diffusion_params
from vllm_twotower.config import EngineOptions, RequestOptions
from vllm_twotower.core import Mode
from vllm_twotower.frontend.request_checks import check_worker_limits
from vllm_twotower.runtime import admission

canvas_16, autoregressive = admission.canvas_16, admission.canvas_0


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
        ("mode", "diffuse", "mask_diffusion, mock_ar, ar"),
        ("mode", ["ar"], "mask_diffusion, mock_ar, ar"),
        ("canvas", 3, "unknown request setting 'diffusion_canvas'"),
    ],
)
def test_a_bad_setting_is_refused_by_name_with_what_is_allowed(key, value, message):
    with pytest.raises(ValueError, match=message) as refusal:
        canvas_16.validate_params(SamplingParams(extra_args={f"diffusion_{key}": value}))
    assert f"diffusion_{key}" in str(refusal.value)


def test_good_settings_and_other_peoples_keys_pass():
    extra = {"diffusion_mode": "mask_diffusion", "diffusion_canvas_length": 1, "kv_transfer_params": {"x": 1}}
    canvas_16.validate_params(SamplingParams(extra_args=extra))
    canvas_16.validate_params(SamplingParams())


def test_mock_ar_scores_no_prompts():
    canvas_16.validate_params(diffusion_params(mode="mock_ar"))
    with pytest.raises(ValueError, match=r"prompt_logprobs=1 cannot be honoured in mock_ar"):
        canvas_16.validate_params(diffusion_params(mode="mock_ar", prompt_logprobs=1))


@pytest.mark.parametrize(
    "params",
    [{"structured_outputs": StructuredOutputsParams(regex="a+")}, {"logprob_token_ids": [5]}],
    ids=lambda p: next(iter(p)),
)
def test_what_mask_diffusion_cannot_honour_is_refused_and_ar_takes_it(params):
    with pytest.raises(ValueError, match=f"{next(iter(params))}.*diffusion_mode='ar'"):
        canvas_16.validate_params(diffusion_params(**params))
    canvas_16.validate_params(diffusion_params(mode="ar", **params))


def test_allowing_nothing_but_the_mask_is_refused():
    with pytest.raises(ValueError, match="allows the mask only"):
        canvas_16.validate_params(diffusion_params(allowed_token_ids=[3]))


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


def test_half_of_a_surrogate_pair_is_no_bad_word():
    for admission_class in (canvas_16, autoregressive):
        with pytest.raises(ValueError, match=r"bad_words='\\ud800' is not well-formed Unicode"):
            admission_class.validate_params(SamplingParams(bad_words=["fine", "\ud800"]))


def test_vllm_still_admits_what_it_cannot_send_to_the_engine():
    """Death test of ``check_can_be_sent``; over HTTP in test_fuzz.py."""
    from vllm.v1.serial_utils import MsgpackEncoder

    for params in (SamplingParams(stop=["\ud800"]), SamplingParams(stream_interval=10**40)):
        with pytest.raises((UnicodeEncodeError, OverflowError)):
            MsgpackEncoder().encode(params)


def test_the_models_own_stop_tokens_count(tiny_moe):
    """They are added after ``validate_params``, so the check has to come after that."""
    params = diffusion_params(min_tokens=1, stop_token_ids=list(range(4, 132)), max_tokens=4, detokenize=False)
    with engine(tiny_moe.path) as e:
        with pytest.raises(VLLMValidationError, match="129 stop token ids"):
            e.tokens([[5, 6, 7]], params)
        assert len(e.tokens([[5, 6, 7]], diffusion_params(max_tokens=4, ignore_eos=True, detokenize=False))[0]) == 4


def test_an_engine_without_diffusion_refuses_our_keys():
    autoregressive.validate_params(SamplingParams(logprobs=1))
    with pytest.raises(ValueError, match="autoregressively only"):
        autoregressive.validate_params(diffusion_params(max_steps=4))


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
