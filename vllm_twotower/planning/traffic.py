"""Traffic between the towers in ``split`` placement (``split/link.py``): after each context forward the new KV
rows, and the Mamba states of the requests whose next canvas starts from them, go to the denoiser's mirrored caches;
after each denoise step its canvases come back. ``tests/test_placement.py`` compares the formula with what is sent."""

from dataclasses import dataclass

from vllm_twotower.planning.model_facts import ModelFacts

BYTES_OF_TOKEN_ID = 8
"""Canvases come back as int64, with their pass count as one more column."""


@dataclass(frozen=True)
class SplitTraffic:
    """Bytes between the two halves; with N ranks per tower each pair carries its share."""

    kv_bytes_per_token: int
    """To the denoiser, for every prompt token and every committed token."""
    state_bytes_per_row: int
    """To the denoiser, for every prompt's end and every commit: the request's conv and SSM states."""
    canvas_length: int

    @classmethod
    def of(cls, facts: ModelFacts, canvas_length: int) -> "SplitTraffic":
        """The traffic of one model."""
        return cls(facts.kv_bytes_per_token, facts.mamba_bytes_per_request, canvas_length)

    @property
    def bytes_per_canvas(self) -> int:
        """To the denoiser when a canvas is committed."""
        return self.canvas_length * self.kv_bytes_per_token + self.state_bytes_per_row

    @property
    def bytes_per_denoise_step_back(self) -> int:
        """To the context tower for each canvas of a denoise step: its tokens and its pass count."""
        return (self.canvas_length + 1) * BYTES_OF_TOKEN_ID

    @property
    def formula(self) -> str:
        """The same in words."""
        return (
            f"context -> denoiser: {self.kv_bytes_per_token:,} B x tokens + {self.state_bytes_per_row:,} B x prompts "
            f"and canvases; back: {self.bytes_per_denoise_step_back} B x canvases of a denoise step"
        )
