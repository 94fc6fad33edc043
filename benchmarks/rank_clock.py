"""Where a worker's time goes when the towers are split; ``placement.py`` sends these functions to every worker.

On a CPU every call returns when its work is done, so clocks around calls are all it takes.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

TOWER, LINK, STEPS = "tower", "link", "steps"
_seconds: dict[str, float] = {}


def _timed(owner: Any, name: str, what: str) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            _seconds[what] = _seconds.get(what, 0.0) + time.perf_counter() - started

    setattr(owner, name, call)


def start_clock(worker: Any) -> None:
    """Time this rank's own tower, its calls of the link between the towers, and its whole steps."""
    from vllm_twotower.runtime.denoise_loop import DenoiseLoop

    model = worker.model_runner.model
    if model.placement.has_context:
        _timed(model.model, "forward", TOWER)
    if model.denoiser is not None:
        _timed(DenoiseLoop, "run_passes", TOWER)
    for name in ("send", "recv", "broadcast"):  # which return once the other side has done its part
        _timed(torch.distributed, name, LINK)
    for name in ("execute_model", "sample_tokens"):
        _timed(worker.model_runner, name, STEPS)


def take_clock(worker: Any) -> dict[str, float]:
    """Seconds by part since the last call."""
    taken = {what: _seconds.get(what, 0.0) for what in (TOWER, LINK, STEPS)}
    _seconds.clear()
    return taken
