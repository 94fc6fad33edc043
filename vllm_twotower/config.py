"""Engine options and request options: every range check and every message, once.

Imports neither torch nor vLLM: the front end, the scheduler and the workers all read settings through here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

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

SHARDED_SIZES = ("num_attention_heads", "mamba_num_heads", "n_groups")
"""Fields of ``config.json`` that tensor parallelism has to divide."""

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

    tower_placement: str = "auto"
    """Where the towers live: ``colocated`` on every device, ``split`` (the context tower on the first half of the
    devices, the denoiser on the other), or ``auto``: colocated wherever the model's heads divide over the devices,
    else split."""

    def __post_init__(self) -> None:
        where = "engine option"
        _check_int(where, "canvas_length", self.canvas_length, 1, MAX_CANVAS_LENGTH)
        _check_int(where, "max_steps", self.max_steps, 1, MAX_STEPS_LIMIT)
        _check_threshold(where, "confidence_threshold", self.confidence_threshold)
        if not _is_number(self.commit_quorum) or not 0 <= self.commit_quorum <= 1:  # written so that NaN fails
            raise ValueError(
                _refusal(
                    where, "commit_quorum", self.commit_quorum, "a number from 0 (commit at once) to 1 (wait for all)"
                )
            )
        _check_mode(where, "mode", self.mode)
        if self.unsupported not in UNSUPPORTED:
            raise ValueError(_refusal(where, "unsupported", self.unsupported, f"one of {', '.join(UNSUPPORTED)}"))
        _check_int(where, "passes_per_step", self.passes_per_step, 1, MAX_STEPS_LIMIT)
        if self.tower_placement not in PLACEMENTS:
            raise ValueError(
                _refusal(where, "tower_placement", self.tower_placement, f"one of {', '.join(PLACEMENTS)}")
            )

    def allows_another_mode(self, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether a request that its mode cannot honour is decoded in ``unsupported``: not if it names its mode."""
        return self.unsupported != REFUSE and f"{REQUEST_PREFIX}mode" not in (extra_args or {})

    def is_split(self, tensor_parallel_size: int, hf_config: Any) -> bool:
        """Whether the towers live on different ranks of a tensor-parallel group of this size."""
        if self.tower_placement == "auto":
            return not all(getattr(hf_config, name) % tensor_parallel_size == 0 for name in SHARDED_SIZES)
        return self.tower_placement == "split"

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
            raise ValueError(
                _refusal("setting", CONFIG_KEY, value, 'True, False or a dict such as {"canvas_length": 16}')
            )
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in value if key not in known]:
            raise ValueError(
                f"unknown diffusion engine option {unknown[0]!r} (value {value[unknown[0]]!r}); "
                f"the options are {', '.join(known)}"
            )
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
        """Whether the denoiser is next for a request of so many tokens: the context holds all it may hold."""
        return self.mode is not Mode.AR and num_computed == num_tokens - self.context_lag

    def canvas_width(self, num_computed: int, max_model_len: int) -> int:
        """Tokens of the request's next canvas, narrower only at the end of ``max_model_len``; in mock-AR its last
        token. A verified canvas gives one token more than it has drafts, for which there must be room."""
        if self.mode is Mode.MOCK_AR:
            return 1
        room = max_model_len - num_computed - (1 if self.mode is Mode.SELF_SPECULATION else 0)
        return min(self.canvas_length, room)

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, engine: EngineOptions) -> "RequestOptions":
        """Read a request's ``extra_args``; keys that do not start with ``diffusion_`` are somebody else's.

        Raises:
            ValueError: an unknown ``diffusion_`` key or a value out of range.

        """
        given = {k: v for k, v in (extra_args or {}).items() if isinstance(k, str) and k.startswith(REQUEST_PREFIX)}
        known = [f"{REQUEST_PREFIX}{f.name}" for f in fields(cls)]
        if unknown := [key for key in given if key not in known]:
            raise ValueError(
                f"unknown request setting {unknown[0]!r} (value {given[unknown[0]]!r}); "
                f"the settings are {', '.join(known)}"
            )
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
    where = "request setting"
    for name, value in values.items():
        shown = f"{REQUEST_PREFIX}{name}"
        if name == "mode":
            _check_mode(where, shown, value)
        elif name == "canvas_length":
            _check_int(where, shown, value, 1, max_canvas_length)
        elif name == "max_steps":
            _check_int(where, shown, value, 1, MAX_STEPS_LIMIT)
        elif name == "confidence_threshold":
            _check_threshold(where, shown, value)


def is_diffusion_on(vllm_config: Any) -> bool:
    """Whether an engine decodes by diffusion.

    Args:
        vllm_config: vLLM's ``VllmConfig``, or its ``EngineArgs``.

    """
    return (vllm_config.additional_config or {}).get(CONFIG_KEY) not in (None, False)


def mask_token_id_of(hf_config: Any) -> int:
    """The model's mask id.

    Args:
        hf_config: the Hugging Face config.

    """
    given = getattr(hf_config, "mask_token_id", None)
    return MASK_TOKEN_ID if given is None else given


def request_extra_args(**values: Any) -> dict[str, Any]:
    """The ``extra_args`` entries for the settings that are not None, checked as far as is possible without an
    engine."""
    given = {name: value for name, value in values.items() if value is not None}
    check_request_values(given)
    return {f"{REQUEST_PREFIX}{name}": getattr(value, "value", value) for name, value in given.items()}


def _refusal(where: str, name: str, value: Any, allowed: str) -> str:
    return f"{where} {name}={shorten(value)} is not allowed: use {allowed}"


def shorten(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_int(where: str, name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(_refusal(where, name, value, f"an integer from {low} to {high}"))


def _check_mode(where: str, name: str, value: Any) -> None:
    allowed = [m.value for m in Mode]
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(_refusal(where, name, value, f"one of {', '.join(allowed)}"))


def _check_threshold(where: str, name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= 1:  # written so that NaN fails
        raise ValueError(
            _refusal(
                where,
                name,
                value,
                "a number above 0 and at most 1 (1: one token per pass unless max_steps forces more)",
            )
        )
