"""Denoise steps with the towers on different ranks: the denoiser's ranks run the passes, all learn the outcome."""

from typing import Any, cast

import torch

from vllm_twotower.models.denoiser_tower import DenoiserTower
from vllm_twotower.runtime.denoise_graphs import DenoiseGraphs
from vllm_twotower.runtime.denoise_loop import DenoiseLoop
from vllm_twotower.runtime.step import DenoiseOutcome, Step
from vllm_twotower.split.link import TowerLink


class SplitDenoiseLoop(DenoiseLoop):
    """The denoise loop of one rank; ``link`` goes to the others, and the context tower's have no denoiser."""

    def __init__(self, *, link: TowerLink, denoiser: DenoiserTower | None, **kwargs: Any) -> None:
        super().__init__(denoiser=cast(DenoiserTower, denoiser), **kwargs)
        self.link = link

    def run(self, step: Step, graphs: DenoiseGraphs | None) -> DenoiseOutcome:
        """Run the passes, or wait for the rank that does; the outcome is the first denoiser rank's everywhere."""
        packed_RS = None
        if not self.link.placement.has_context:
            now = self.run_passes(step, graphs)
            # a broken row has run a pass: the sign is free, and costs the link nothing
            signed_R = torch.where(now.broken_R, -now.pass_index_R, now.pass_index_R)
            packed_RS = torch.cat([now.token_RS, signed_R[:, None]], dim=1)
        assert step.canvases is not None
        num_rows, width = step.canvases.rows.token_RS.shape
        packed_RS = self.link.share_canvases(packed_RS, (num_rows, width + 1))
        token_RS, signed_R = packed_RS[:, :-1], packed_RS[:, -1]
        return self.read_outcome(step, token_RS, signed_R.abs(), signed_R < 0)
