"""What a request is refused for, before it reaches the engine; each refusal is a 400 over HTTP.

``check_params`` and ``check_request`` run before and after vLLM's own processing of a request
(``compat.check_requests``): the first sees what the client sent, the second what vLLM made of it, with its defaults,
the model's stop tokens and the prompt. Imports neither torch nor vLLM before a request is checked.
"""

from typing import TYPE_CHECKING, Any

from vllm_twotower.config import REQUEST_PREFIX, EngineOptions, RequestOptions, read_mask_token_id, shorten
from vllm_twotower.core import Mode

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

SEED_LIMIT = 2**63

MIN_MOCK_AR_PROMPT = 2
"""The denoiser needs a last token and a context before it."""


def check_params(params: "SamplingParams", options: EngineOptions | None, vllm_config: "VllmConfig") -> None:
    """Refuse settings of ours that are wrong, and what the request's mode cannot honour.

    Args:
        params: the client's.
        options: the engine's; None where diffusion is off.
        vllm_config: the engine's.

    Raises:
        ValueError: the message says what to send instead.

    """
    _check_bad_words(params)
    extra = params.extra_args or {}
    if options is None:
        if ours := [key for key in extra if str(key).startswith(REQUEST_PREFIX)]:
            raise ValueError(
                f"request setting {ours[0]!r}: this engine decodes autoregressively only; start it with "
                'additional_config={"diffusion": true}'
            )
        return
    request = RequestOptions.from_extra_args(extra, options)
    if not request.is_sampled:
        if not options.allows_another_mode(extra):
            _refuse_unsupported(params, request.mode)
        _check_allowed_token_ids(params, read_mask_token_id(vllm_config.model_config.hf_config))


def check_beam_search(extra_args: Any, options: EngineOptions | None) -> None:
    """Refuse a beam search in the denoiser's modes: a canvas has no single next token to branch on.

    Raises:
        ValueError: the message says which mode can.

    """
    if options is None:
        return
    request = RequestOptions.from_extra_args(extra_args, options)
    if not request.is_sampled and not options.allows_another_mode(extra_args):
        raise ValueError(
            f"beam search cannot be honoured in {request.mode}: leave it out, or send diffusion_mode='ar' in "
            "vllm_xargs (offline, load the model without diffusion)"
        )


def _check_bad_words(params: "SamplingParams") -> None:
    """Refuse half of a surrogate pair, over which vLLM's tokenizing of bad words ends with a 500 without a message."""
    for word in params.bad_words or ():
        try:
            word.encode()
        except UnicodeEncodeError as problem:
            raise ValueError(
                f"bad_words={shorten(word)} is not well-formed Unicode ({problem}): send text"
            ) from problem


def _find_unsupported(params: "SamplingParams", mode: Mode) -> str | None:
    """The first parameter that the denoiser's modes cannot honour; ``ar`` honours all of them."""
    given = {
        "structured_outputs": params.structured_outputs is not None,
        "logprob_token_ids": bool(params.logprob_token_ids),
        "thinking_token_budget": params.thinking_token_budget is not None,
        # in mock_ar the last prompt token is computed after the first new one is out
        "prompt_logprobs": mode is Mode.MOCK_AR and params.prompt_logprobs is not None,
    }
    return next((name for name, is_given in given.items() if is_given), None)


def _refuse_unsupported(params: "SamplingParams", mode: Mode) -> None:
    name = _find_unsupported(params, mode)
    if name is not None:
        raise ValueError(
            f"{name}={shorten(getattr(params, name))} cannot be honoured in {mode}: "
            "leave it out, or send diffusion_mode='ar'"
        )


def _check_allowed_token_ids(params: "SamplingParams", mask_token_id: int) -> None:
    if params.allowed_token_ids is not None and set(params.allowed_token_ids) == {mask_token_id}:
        raise ValueError(
            f"allowed_token_ids=[{mask_token_id}] allows the mask only, which is never emitted: allow others"
        )


def check_request(request: "EngineCoreRequest", options: EngineOptions | None, vllm_config: "VllmConfig") -> None:
    """Refuse what would end the engine, or cannot be decoded; give a request that its mode cannot honour, and that may
    have another (``EngineOptions.unsupported``), that mode.

    Args:
        request: vLLM's own, with parameters that are a copy of the client's.
        options: the engine's; None where diffusion is off.
        vllm_config: the engine's.

    Raises:
        ValueError: the message says what to send instead.

    """
    params = request.sampling_params
    if params is None:
        return
    check_worker_limits(params)
    prompt = request.prompt_token_ids or []
    _check_token_ids(prompt, vllm_config.model_config.get_vocab_size())
    _check_encoding(request)
    if options is not None:
        own = RequestOptions.from_extra_args(params.extra_args, options)
        mode = own.mode
        if not own.is_sampled and _find_unsupported(params, mode) is not None:
            # check_params let it pass
            params.extra_args = {**(params.extra_args or {}), f"{REQUEST_PREFIX}mode": options.unsupported}
            mode = Mode(options.unsupported)
        _check_prompt(mode, len(prompt), request.resumable)


def check_worker_limits(params: "SamplingParams") -> None:
    """Refuse what vLLM 0.32 itself admits and its worker then dies of."""
    import vllm.envs as envs
    from vllm.v1.worker.gpu.sample import logit_bias

    limits = {
        "logit_bias": logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS,
        "allowed_token_ids": logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS,
    }
    for name, most in limits.items():
        if (given := getattr(params, name)) is not None and len(given) > most:
            raise ValueError(f"{name} has {len(given)} entries: use at most {most}")
    num_stops, most_stops = len(params.all_stop_token_ids), logit_bias.MAX_NUM_STOP_TOKEN_IDS
    if params.min_tokens > 0 and num_stops > most_stops:
        raise ValueError(
            f"min_tokens={params.min_tokens} with {num_stops} stop token ids (the model's own included): use at most "
            f"{most_stops}"
        )
    num_bad, limit = sum(map(len, params.bad_words_token_ids or ())), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    if num_bad > limit:
        raise ValueError(f"bad_words are {num_bad} tokens together: use at most {limit}")
    last_seed = (params.seed or 0) + params.n - 1  # every sample of a prompt gets the next seed
    if not -SEED_LIMIT <= (params.seed or 0) <= last_seed < SEED_LIMIT:
        raise ValueError(f"seed={params.seed} with n={params.n} does not fit in 64 bits: use a smaller seed")


def _check_token_ids(token_ids: list[int], vocab_size: int) -> None:
    """Refuse ids that no embedding has; vLLM asks its tokenizer, and without one (``skip_tokenizer_init``) nobody."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"token id {token_id} is out of vocabulary: use ids from 0 to {vocab_size - 1}")


def _check_encoding(request: "EngineCoreRequest") -> None:
    """Refuse what vLLM 0.32 admits and then cannot encode for its engine process, which is a 500 without a message:
    half of a surrogate pair in a text, an integer beyond 64 bits."""
    from vllm.v1.serial_utils import MsgpackEncoder

    encode = MsgpackEncoder().encode
    unencodable = (UnicodeEncodeError, OverflowError)
    try:
        encode(request)
    except unencodable:
        for owner in (request.sampling_params, request):
            for name in owner.__struct_fields__:
                try:
                    encode(getattr(owner, name))
                except unencodable as problem:
                    raise ValueError(
                        f"{name}={shorten(getattr(owner, name))} cannot be sent to the engine ({problem}): use "
                        "well-formed Unicode and integers of 64 bits"
                    ) from problem


def _check_prompt(mode: Mode, num_tokens: int, resumable: bool) -> None:
    """Refuse a prompt that the mode cannot start from."""
    if mode is Mode.MOCK_AR and num_tokens < MIN_MOCK_AR_PROMPT:
        raise ValueError(
            f"a prompt of {num_tokens} token is too short for diffusion_mode='mock_ar', whose context stays one token "
            f"behind: send {MIN_MOCK_AR_PROMPT} tokens or more, or another mode"
        )
    if mode is not Mode.AR and resumable:
        raise ValueError("streaming input cannot be continued from inside a canvas: send diffusion_mode='ar'")
