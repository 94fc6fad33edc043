"""The golden checkpoints, and what NVIDIA's own code did with them (``tests/goldens/README.md``)."""

import json
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import SamplingParams

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / "goldens"


class Golden:
    """One golden checkpoint and its cases by mode."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = GOLDENS / name
        self.config = json.loads((self.path / "config.json").read_text())
        expected = json.loads((self.path / "expected.json").read_text())
        self.mask_diffusion: list[dict] = expected["mask_diffusion"]
        self.ar: list[dict] = expected["ar"]
        self.mock_ar: list[dict] = expected["mock_ar"]

    def cases(self, canvas_length: int) -> list[dict]:
        return [c for c in self.mask_diffusion if c["params"]["block_size"] == canvas_length]


def golden_params(case: dict[str, Any], max_tokens: int | None = None, **more: Any) -> "SamplingParams":
    """The request that a golden ``mask_diffusion`` case stands for; of fewer tokens if so many are given."""
    from vllm_twotower import diffusion_params

    p = case["params"]
    return diffusion_params(
        temperature=p["temperature"],
        max_tokens=max_tokens or p["max_new_tokens"],
        confidence_threshold=p["confidence_threshold"],
        max_steps=p["steps_per_block"],
        ignore_eos=True,
        detokenize=False,
        **more,
    )


def greedy_params(mode: str, max_tokens: int, **more: Any) -> "SamplingParams":
    """A greedy request of exactly so many tokens."""
    from vllm_twotower import diffusion_params

    return diffusion_params(
        mode=mode, temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more
    )
