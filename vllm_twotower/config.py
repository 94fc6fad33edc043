"""Engine options and request options: every range check and every message, once.

Imports neither torch nor vLLM: the front end, the scheduler and the workers all read settings through here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from vllm_twotower.core import (
    DEFAULT_CANVAS_LENGTH,
    DEFAULT_CONFIDENCE_THRESHOLD,
    DEFAULT_MAX_STEPS,
    MASK_TOKEN_ID,
    MAX_CANVAS_LENGTH,
    Mode,
)

CONFIG_KEY = "diffusion"
"""Key of ``additional_config`` that turns diffusion on: True, or a dict of engine options."""

REQUEST_PREFIX = "diffusion_"
"""Every key of ``extra_args`` / ``vllm_xargs`` that starts so is ours; unknown ones are refused."""

MAX_STEPS_LIMIT = 1024
"""Most denoise passes per canvas; beyond the canvas length they never happen."""

PLACEMENTS = ("auto", "colocated", "split")

DRAFT_POLICIES = ("auto", "always")

REFUSE = "refuse"
UNSUPPORTED = (REFUSE, "self_speculation", "ar")

DEFAULT_COMMIT_QUORUM = 0.4
"""As good as any rule from 8 to 100 requests (benchmarks/results/policy.md), and a function of the requests alone."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of one engine: ``additional_config["diffusion"]`` or ``--diffusion '{...}'``."""

    canvas_length: int = DEFAULT_CANVAS_LENGTH
    """Tokens per canvas, S; also the default and the maximum of the request's ``diffusion_canvas_length``."""

    max_steps: int = DEFAULT_MAX_STEPS
    """Denoise passes per canvas at most, T; the default of the request's ``diffusion_max_steps``."""

    confidence_threshold: float = DEFAULT_CONFIDENCE_THRESHOLD
    """Gamma; the default of the request's ``diffusion_confidence_threshold``."""

    commit_quorum: float = DEFAULT_COMMIT_QUORUM
    """Finished canvases wait until they are this fraction of the mask-diffusion requests, then are committed
    together: 0 at once, 1 all."""

    mode: str = Mode.MASK_DIFFUSION.value
    """How requests are decoded that name no ``diffusion_mode``."""

    unsupported: str = REFUSE
    """What becomes of requests that name no ``diffusion_mode`` and ask for what ``mode`` cannot honour (structured
    output, ``logprob_token_ids``, thinking budgets, beam search): ``refuse`` with a 400, or decode them in this other
    mode."""

    passes_per_step: int = 1
    """Denoise passes inside one engine step; more share its host work, fewer let requests join and leave sooner."""

    draft_policy: str = "auto"
    """Which requests in ``self_speculation`` draft: ``auto``, those for which drafts are faster than AR steps, by what
    both cost as the engine runs; ``always``, every one that can, so that drafting depends on the requests alone."""

    tower_placement: str = "auto"
    """Where the towers live: ``colocated`` on every device, ``split`` (the context tower on the first half of the
    devices, the denoiser on the other), or ``auto``: colocated wherever each tower divides over the devices,
    else split."""

    def __post_init__(self) -> None:
        where = "engine option"
        shared = ("mode", "canvas_length", "max_steps", "confidence_threshold")
        _check_shared(where, {name: getattr(self, name) for name in shared})
        quorum = self.commit_quorum
        is_share = _is_number(quorum) and 0 <= quorum <= 1  # written so that NaN fails
        _check(is_share, where, "commit_quorum", quorum, "a number from 0 (commit at once) to 1 (wait for all)")
        _check_choice(where, "unsupported", self.unsupported, UNSUPPORTED)
        _check_int(where, "passes_per_step", self.passes_per_step, 1, MAX_STEPS_LIMIT)
        _check_choice(where, "draft_policy", self.draft_policy, DRAFT_POLICIES)
        _check_choice(where, "tower_placement", self.tower_placement, PLACEMENTS)

    def allows_another_mode(self, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether a request that its mode cannot honour is decoded in ``unsupported``: not if it names its mode."""
        return self.unsupported != REFUSE and f"{REQUEST_PREFIX}mode" not in (extra_args or {})

    def is_split(self, tensor_parallel_size: int, hf_config: Any) -> bool:
        """Whether the towers live on different ranks of a tensor-parallel group of this size."""
        if self.tower_placement == "auto":
            return find_indivisible(hf_config, tensor_parallel_size) is not None
        return self.tower_placement == "split"

    @classmethod
    def read(cls, vllm_config: Any) -> "EngineOptions | None":
        """The options of an engine; None where diffusion is off.

        Args:
            vllm_config: vLLM's ``VllmConfig``, or its ``EngineArgs``.

        """
        return cls.from_additional_config((vllm_config.additional_config or {}).get(CONFIG_KEY))

    @classmethod
    def from_additional_config(cls, value: Any) -> "EngineOptions | None":
        """Read ``additional_config["diffusion"]``; None where diffusion is off.

        Raises:
            ValueError: an unknown option or a value out of range.

        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if not isinstance(value, Mapping):
            _refuse("setting", CONFIG_KEY, value, 'True, False or a dict such as {"canvas_length": 16}')
        _check_names("diffusion engine option", value, [f.name for f in fields(cls)])
        return cls(**value)


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """Diffusion settings of one request, defaults filled in from the engine's."""

    mode: Mode
    """How this request is decoded."""
    canvas_length: int
    """Tokens per canvas."""
    max_steps: int
    """Denoise passes per canvas at most."""
    confidence_threshold: float
    """Gamma: proposals surer than this are revealed."""

    @property
    def is_sampled(self) -> bool:
        """Whether vLLM's own sampler chooses the request's tokens, from the context tower's logits."""
        return self.mode in (Mode.AR, Mode.SELF_SPECULATION)

    @property
    def context_lag(self) -> int:
        """Tokens at a request's end that the context does not hold while the denoiser runs."""
        return 1 if self.mode in (Mode.MOCK_AR, Mode.SELF_SPECULATION) else 0

    @property
    def prefill_lag(self) -> int:
        """Tokens at a request's end that no context step computes."""
        return 1 if self.mode is Mode.MOCK_AR else 0

    def is_denoisable(self, num_computed: int, num_tokens: int) -> bool:
        """Whether the context of a request of so many tokens holds all it may hold when the denoiser runs. Then the
        denoiser is next; in self-speculation it may be, an AR step or a verification may be too."""
        return self.mode is not Mode.AR and num_computed >= num_tokens - self.context_lag

    def canvas_width(self, num_computed: int, max_model_len: int, mamba_block_size: int | None = None) -> int:
        """Tokens of the request's next canvas.

        In mock-AR it is the request's last token. Others are narrower only at the end of ``max_model_len``; a verified
        canvas gives one token more than it has drafts, for which there must be room, and the states after it lie in the
        block where they began, where states are kept in blocks.

        Args:
            num_computed: tokens that the context holds.
            max_model_len: the engine's.
            mamba_block_size: tokens of a block of Mamba states with prefix caching; None without.

        """
        if self.mode is Mode.MOCK_AR:
            return 1
        if self.mode is not Mode.SELF_SPECULATION:
            return min(self.canvas_length, max_model_len - num_computed)
        room = max_model_len - num_computed - 1
        if mamba_block_size is not None:
            room = min(room, mamba_block_size - num_computed % mamba_block_size)
        return min(self.canvas_length, room)

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, engine: EngineOptions) -> "RequestOptions":
        """Read a request's ``extra_args``; keys that do not start with ``diffusion_`` are somebody else's.

        Raises:
            ValueError: an unknown ``diffusion_`` key or a value out of range.

        """
        given = {k: v for k, v in (extra_args or {}).items() if isinstance(k, str) and k.startswith(REQUEST_PREFIX)}
        _check_names("request setting", given, [f"{REQUEST_PREFIX}{f.name}" for f in fields(cls)])
        values = {key.removeprefix(REQUEST_PREFIX): value for key, value in given.items()}
        check_request_values(values, max_canvas_length=engine.canvas_length)
        mode = Mode(values.get("mode", engine.mode))
        # a draft is checked anyway: one pass of it is cheaper than many good ones
        max_steps = 1 if mode is Mode.SELF_SPECULATION else engine.max_steps
        return cls(
            mode=mode,
            canvas_length=values.get("canvas_length", engine.canvas_length),
            max_steps=values.get("max_steps", max_steps),
            confidence_threshold=float(values.get("confidence_threshold", engine.confidence_threshold)),
        )


def check_request_values(values: Mapping[str, Any], max_canvas_length: int = MAX_CANVAS_LENGTH) -> None:
    """Check those request settings that are there, named without their prefix."""
    _check_shared("request setting", values, REQUEST_PREFIX, max_canvas_length)


def is_diffusion_on(vllm_config: Any) -> bool:
    """Whether an engine decodes by diffusion, by its ``VllmConfig`` or ``EngineArgs``; its options are not checked."""
    return (vllm_config.additional_config or {}).get(CONFIG_KEY) not in (None, False)


def read_mask_token_id(hf_config: Any) -> int:
    """From the Hugging Face config, which may have none."""
    given = getattr(hf_config, "mask_token_id", None)
    return MASK_TOKEN_ID if given is None else given


def find_indivisible(model: Any, num_ranks: int) -> str | None:
    """What of a tower cannot be shared out over ``num_ranks`` ranks, or None: vLLM's rules and the denoiser's.

    Args:
        model: the Hugging Face config, or ``planning.ModelFacts``, whose names are the same.
        num_ranks: that hold the tower.

    """
    pattern = model.hybrid_override_pattern
    if "*" in pattern:
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        if heads % num_ranks or (kv_heads % num_ranks and num_ranks % kv_heads):
            return f"{num_ranks} ranks do not divide {heads} attention heads and {kv_heads} KV heads"
    if "M" in pattern and (model.mamba_num_heads % num_ranks or model.n_groups % num_ranks):
        return f"{num_ranks} ranks do not divide {model.mamba_num_heads} Mamba heads and {model.n_groups} groups"
    if "E" in pattern:
        width, shared = model.moe_intermediate_size, model.moe_shared_expert_intermediate_size
        if width % num_ranks or shared % num_ranks:
            return f"{num_ranks} ranks do not divide the experts' widths {width} and {shared}"
    return None


def request_extra_args(**values: Any) -> dict[str, Any]:
    """The ``extra_args`` entries for the settings that are not None, checked as far as is possible without an
    engine."""
    given = {name: value for name, value in values.items() if value is not None}
    check_request_values(given)
    return {f"{REQUEST_PREFIX}{name}": getattr(value, "value", value) for name, value in given.items()}


def shorten(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(where: str, name: str, value: Any, allowed: str) -> NoReturn:
    raise ValueError(f"{where} {name}={shorten(value)} is not allowed: use {allowed}")


def _check(is_allowed: bool, where: str, name: str, value: Any, allowed: str) -> None:
    if not is_allowed:
        _refuse(where, name, value, allowed)


def _check_names(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := [key for key in given if key not in known]:
        raise ValueError(
            f"unknown {what} {unknown[0]!r} (value {given[unknown[0]]!r}); "
            f"the {what.rpartition(' ')[2]}s are {', '.join(known)}"
        )


def _check_shared(
    where: str, values: Mapping[str, Any], prefix: str = "", max_canvas_length: int = MAX_CANVAS_LENGTH
) -> None:
    """Check what engines and requests both have, as far as it is given."""
    for name, value in values.items():
        full_name = f"{prefix}{name}"
        if name == "mode":
            _check_choice(where, full_name, value, [mode.value for mode in Mode])
        elif name == "canvas_length":
            _check_int(where, full_name, value, 1, max_canvas_length)
        elif name == "max_steps":
            _check_int(where, full_name, value, 1, MAX_STEPS_LIMIT)
        elif name == "confidence_threshold":
            is_share = _is_number(value) and 0 < value <= 1  # written so that NaN fails
            allowed = "a number above 0 and at most 1 (1: one token per pass unless max_steps forces more)"
            _check(is_share, where, full_name, value, allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_int(where: str, name: str, value: Any, low: int, high: int) -> None:
    is_allowed = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _check(is_allowed, where, name, value, f"an integer from {low} to {high}")


def _check_choice(where: str, name: str, value: Any, choices: Sequence[str]) -> None:
    _check(isinstance(value, str) and value in choices, where, name, value, f"one of {', '.join(choices)}")
