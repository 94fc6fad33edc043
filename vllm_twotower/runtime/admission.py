"""Admission checks: a request that cannot be honoured gets a 400 before it reaches the engine.

vLLM calls ``validate_params`` of every logits-processor class in the front end; ours changes no logits. The class has
to know the engine's canvas length but gets only the request, so it is in its name: ``canvas_16`` (``canvas_0`` with
diffusion off), made on demand by this module's ``__getattr__``. Import-light: no torch here.
"""

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_twotower.config import REQUEST_PREFIX, EngineOptions, RequestOptions, short
from vllm_twotower.core import MASK_TOKEN_ID, Mode

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


class DiffusionParams(LogitsProcessor):
    """Checks a request against one engine's options; ``engine`` is None where diffusion is off."""

    engine: EngineOptions | None = None

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Check one request.

        Raises:
            ValueError: what is wrong and what to send instead; vLLM turns it into a 400.

        """
        check_bad_words(sampling_params.bad_words or ())
        extra = sampling_params.extra_args or {}
        if cls.engine is None:
            if ours := [key for key in extra if str(key).startswith(REQUEST_PREFIX)]:
                raise ValueError(
                    f"request setting {ours[0]!r}: this engine decodes autoregressively only; start it with "
                    'additional_config={"diffusion": true}'
                )
            return
        options = RequestOptions.from_extra_args(extra, cls.engine)
        if options.mode is not Mode.AR:
            check_denoised(sampling_params, options.mode)

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        """Built by the worker too, where it has nothing to do."""

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """False: this request's logits need no processing by us."""
        return False

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Unchanged."""
        return logits


def check_bad_words(words: Iterable[str]) -> None:
    """Refuse half of a surrogate pair, over which vLLM's tokenizing of bad words ends with a 500 without a message.

    Other texts are checked when they are complete (``request_checks.check_can_be_sent``).
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as problem:
            raise ValueError(f"bad_words={short(word)} is not well-formed Unicode ({problem}): send text") from problem


def check_denoised(params: "SamplingParams", mode: Mode) -> None:
    """Refuse, rather than ignore, what the denoiser's modes cannot honour; ``ar`` honours all of it."""
    refused = {
        "structured_outputs": params.structured_outputs is not None,
        "logprob_token_ids": bool(getattr(params, "logprob_token_ids", None)),
        "thinking_token_budget": getattr(params, "thinking_token_budget", None) is not None,
        # in mock_ar the last prompt token is computed after the first new one is out
        "prompt_logprobs": mode is Mode.MOCK_AR and params.prompt_logprobs is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"{name}={short(getattr(params, name))} cannot be honoured in {mode}: "
                "leave it out, or send diffusion_mode='ar'"
            )
    if params.allowed_token_ids is not None and set(params.allowed_token_ids) == {MASK_TOKEN_ID}:
        raise ValueError(
            f"allowed_token_ids=[{MASK_TOKEN_ID}] allows the mask only, which is never emitted: allow others"
        )


@functools.cache
def _admission_class(canvas_length: int) -> type[DiffusionParams]:
    engine = EngineOptions(canvas_length=canvas_length) if canvas_length else None
    return type(f"canvas_{canvas_length}", (DiffusionParams,), {"engine": engine, "__module__": __name__})


def __getattr__(name: str) -> Any:
    if match := re.fullmatch(r"canvas_(\d+)", name):
        return _admission_class(int(match[1]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
