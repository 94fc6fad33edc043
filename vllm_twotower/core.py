"""The nouns of the decoding backend: start reading here.

| word | meaning |
| --- | --- |
| canvas | the S tokens denoised together (the paper's "block"; "block" alone means a KV-cache block) |
| denoise pass | one forward of the denoiser tower over a canvas |
| reveal | a pass fixes a masked position for good |
| commit | the context tower's causal forward over a finished canvas |
| draft | self-speculation: a canvas that the denoiser proposes behind a known token, not emitted |
| verification | the context tower's forward over a draft: what AR would have chosen the same is kept |
| round | a draft and its verification |
| hint | a token of a rejected draft that is probably right: the next draft starts with it |
| replay | the Mamba states are advanced over the accepted tokens, and no further |
| context step / denoise step | an engine step that runs the context tower / the denoiser tower |

Nothing here imports torch or vLLM, so every layer of the package may import it.
"""

import os
from enum import StrEnum

MASK_TOKEN_ID = 3
"""The mask's token id unless ``config.json`` has a ``mask_token_id``; the released one has none (model card: 3)."""

DEFAULT_CANVAS_LENGTH = 16
"""Tokens per canvas, as the released model was trained."""

DEFAULT_MAX_STEPS = 16
"""Denoise passes per canvas at most."""

DEFAULT_CONFIDENCE_THRESHOLD = 0.8
"""Gamma, as published."""

MAX_CANVAS_LENGTH = 32
"""Widest canvas; the released model was trained at 16 and collapses beyond its training width (paper, table 4)."""

TIMESTEP_SCALE = 1000.0
"""The noise level t in [0, 1] is embedded as t * 1000 (reference: ``TimestepEmbedder``)."""

TIMESTEP_FEATURES = 256
"""Sinusoidal features of that, half cosines, half sines; likewise."""

TIMESTEP_MAX_PERIOD = 10_000.0
"""Longest period among them; likewise."""

KERNELS_VARIABLE = "VLLM_TWOTOWER_KERNELS"
"""Environment variable that chooses between kernels and references (``ops/backend.py``)."""


def is_triton_interpreted() -> bool:
    """Whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Mode(StrEnum):
    """How one request is decoded."""

    MASK_DIFFUSION = "mask_diffusion"
    """The denoiser tower fills a canvas in several passes, the context tower commits it."""
    MOCK_AR = "mock_ar"
    """The denoiser tower predicts one token at a time, causally and without time conditioning."""
    SELF_SPECULATION = "self_speculation"
    """The denoiser tower drafts a canvas, the context tower verifies it: AR's own tokens, several per forward."""
    AR = "ar"
    """The context tower alone, one token at a time, with vLLM's own sampler."""


class StepKind(StrEnum):
    """Which tower an engine step runs. Every step runs exactly one."""

    CONTEXT = "context"
    DENOISE = "denoise"
