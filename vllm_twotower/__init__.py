"""Block-diffusion decoding for vLLM: NVIDIA's Nemotron-Labs-TwoTower.

Importing this package imports neither torch nor vLLM.
"""

from typing import TYPE_CHECKING, Any

from vllm_twotower.core import Mode, StepKind

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

__version__ = "0.2.0"
__all__ = ["Mode", "StepKind", "diffusion_params", "diffusion_stats", "register"]


def register() -> None:
    """Entry point ``vllm.general_plugins``: called by every vLLM process, for every model. Never raises."""
    from vllm_twotower.registration import register_with_vllm

    register_with_vllm()


def diffusion_params(
    *,
    mode: "Mode | str | None" = None,
    confidence_threshold: float | None = None,
    max_steps: int | None = None,
    canvas_length: int | None = None,
    **sampling_params: Any,
) -> "SamplingParams":
    """A plain vLLM ``SamplingParams`` that carries this request's diffusion settings in ``extra_args``.

    Args:
        mode: ``mask_diffusion``, ``self_speculation``, ``ar`` or ``mock_ar``; the engine's by default.
        confidence_threshold: reveal every proposal surer than this, in (0, 1]; 1 reveals one token
            per pass unless ``max_steps`` forces more.
        max_steps: denoise passes per canvas at most.
        canvas_length: tokens per canvas, at most the engine's.
        sampling_params: every other ``SamplingParams`` keyword.

    Raises:
        ValueError: a setting is out of range; the message names it, its value and what is allowed.

    """
    from vllm import SamplingParams

    from vllm_twotower.config import request_extra_args

    extra = request_extra_args(
        mode=mode, confidence_threshold=confidence_threshold, max_steps=max_steps, canvas_length=canvas_length
    )
    if extra:
        sampling_params["extra_args"] = {**(sampling_params.get("extra_args") or {}), **extra}
    return SamplingParams(**sampling_params)


def diffusion_stats(llm: "LLM", reset: bool = False) -> dict[str, int]:
    """What the engine has decoded by diffusion so far.

    Returns a dict with

    - ``canvases``: canvases finished;
    - ``denoise_passes``: denoise passes, counted once per canvas they ran for (the reference's NFE, summed);
    - ``context_passes``: context-tower forwards, counted once per request they ran for (prompt chunks, commits, AR
      steps and verifications);
    - ``commits``: those of the context passes that computed a finished canvas, or a part of one;
    - ``committed_tokens``: tokens of finished canvases, before trimming at a stop;
    - ``denoise_steps``, ``context_steps``: engine steps of each kind;
    - ``drafts``, ``draft_tokens``, ``accepted_tokens``: of self-speculation, the known token of a draft not counted;
    - ``denoise_forwards``: forwards of the denoiser tower, counted once per batch.

    Args:
        llm: a ``vllm.LLM`` started with diffusion on.
        reset: set all counters to zero after reading them.

    """
    return llm.collective_rpc("diffusion_stats", args=(reset,))[0]
