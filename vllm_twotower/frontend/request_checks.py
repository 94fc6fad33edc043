"""Checks of a whole request, after vLLM has filled in its defaults: what only the prompt shows, and what kills a
worker.

Called through ``compat_requests.check_prompts`` with vLLM's ``EngineCoreRequest``; a ``ValueError`` becomes a 400.
"""

from typing import Any

from vllm_twotower.config import CONFIG_KEY, EngineOptions, RequestOptions, short
from vllm_twotower.core import Mode

MAX_BIASED_TOKENS = 1024
"""vLLM's worker raises beyond this many logit_bias or allowed_token_ids entries (``sample/logit_bias.py``), which
ends the engine."""
MAX_STOP_TOKENS_WITH_MIN_TOKENS = 128
"""The same for stop token ids, the model's own included, together with min_tokens."""
SEED_LIMIT = 2**63

MIN_MOCK_AR_PROMPT = 2
"""The denoiser needs a last token and a context before it."""


def check_request(request: Any, vllm_config: Any) -> None:
    """Refuse what would end the engine, or cannot be decoded.

    Raises:
        ValueError: the message says what to send instead.

    """
    params = request.sampling_params
    if params is None:
        return
    check_worker_limits(params)
    check_token_ids(request.prompt_token_ids or (), vllm_config.model_config.get_vocab_size())
    check_can_be_sent(request)
    options = EngineOptions.from_additional_config(vllm_config.additional_config.get(CONFIG_KEY))
    if options is not None:
        mode = RequestOptions.from_extra_args(params.extra_args, options).mode
        check_prompt(mode, len(request.prompt_token_ids or ()), request.resumable)


def check_worker_limits(params: Any) -> None:
    """Refuse what vLLM 0.32 itself admits and its worker then dies of."""
    import vllm.envs as envs

    for name in ("logit_bias", "allowed_token_ids"):
        if (given := getattr(params, name)) is not None and len(given) > MAX_BIASED_TOKENS:
            raise ValueError(f"{name} has {len(given)} entries: use at most {MAX_BIASED_TOKENS}")
    num_stops = len(params.all_stop_token_ids)
    if params.min_tokens > 0 and num_stops > MAX_STOP_TOKENS_WITH_MIN_TOKENS:
        raise ValueError(
            f"min_tokens={params.min_tokens} with {num_stops} stop token ids (the model's own included): use at most "
            f"{MAX_STOP_TOKENS_WITH_MIN_TOKENS}"
        )
    num_bad, limit = sum(map(len, params.bad_words_token_ids or ())), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    if num_bad > limit:
        raise ValueError(f"bad_words are {num_bad} tokens together: use at most {limit}")
    last_seed = (params.seed or 0) + params.n - 1  # every sample of a prompt gets the next seed
    if not -SEED_LIMIT <= (params.seed or 0) <= last_seed < SEED_LIMIT:
        raise ValueError(f"seed={params.seed} with n={params.n} does not fit in 64 bits: use a smaller seed")


def check_token_ids(token_ids: Any, vocab_size: int) -> None:
    """Refuse ids that no embedding has; vLLM asks its tokenizer, and without one (``skip_tokenizer_init``) nobody."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id} is out of vocabulary: use ids from 0 to {vocab_size - 1}")


def check_can_be_sent(request: Any) -> None:
    """Refuse what vLLM 0.32 admits and then cannot encode for its engine process, which is a 500 without a message:
    half of a surrogate pair in a text, an integer beyond 64 bits."""
    from vllm.v1.serial_utils import MsgpackEncoder

    encode = MsgpackEncoder().encode
    try:
        encode(request)
    except (UnicodeEncodeError, OverflowError) as problem:
        for owner in (request.sampling_params, request):
            for name in owner.__struct_fields__:
                _check_field(encode, name, getattr(owner, name), problem)


def _check_field(encode: Any, name: str, value: Any, problem: Exception) -> None:
    try:
        encode(value)
    except (UnicodeEncodeError, OverflowError):
        raise ValueError(
            f"{name}={short(value)} cannot be sent to the engine ({problem}): use well-formed Unicode and integers of "
            "64 bits"
        ) from problem


def check_beam_search(extra_args: Any, vllm_config: Any) -> None:
    """Refuse a beam search in the denoiser's modes: a canvas has no single next token to branch on.

    Raises:
        ValueError: the message says which mode can.

    """
    options = EngineOptions.from_additional_config(vllm_config.additional_config.get(CONFIG_KEY))
    if options is None:
        return
    mode = RequestOptions.from_extra_args(extra_args, options).mode
    if mode is not Mode.AR:
        raise ValueError(
            f"beam search cannot be honoured in {mode}: leave it out, or send diffusion_mode='ar' in vllm_xargs "
            "(offline, load the model without diffusion)"
        )


def check_prompt(mode: Mode, num_tokens: int, resumable: bool) -> None:
    """Refuse a prompt that the mode cannot start from."""
    if mode is Mode.MOCK_AR and num_tokens < MIN_MOCK_AR_PROMPT:
        raise ValueError(
            f"a prompt of {num_tokens} token is too short for diffusion_mode='mock_ar', whose context stays one token "
            f"behind: send {MIN_MOCK_AR_PROMPT} tokens or more, or another mode"
        )
    if mode is not Mode.AR and resumable:
        raise ValueError("streaming input cannot be continued from inside a canvas: send diffusion_mode='ar'")
