"""The model with the towers on different ranks: each builds, loads and runs its own."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import maybe_prefix

from vllm_twotower import compat
from vllm_twotower.models.twotower import TwoTowerForCausalLM
from vllm_twotower.split.context_mirror import ContextMirror
from vllm_twotower.split.placement import TowerPlacement, resolve_placement


class SplitTwoTowerForCausalLM(TwoTowerForCausalLM):
    """One tower of the two; the other one's part of a step does nothing here."""

    placement: TowerPlacement

    def build_context(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Build the context tower, or where the denoiser is to be a mirror of its caches."""
        placement = resolve_placement(vllm_config)
        if placement.has_context:
            super().build_context(vllm_config, prefix)
        else:
            # what upstream's constructor leaves behind, with a mirror for a tower
            compat.initialize_without_constructor(
                self,
                vllm_config=vllm_config,
                model_config=vllm_config.model_config,
                config=vllm_config.model_config.hf_config,
                scheduler_config=vllm_config.scheduler_config,
                quant_config=vllm_config.quant_config,
                model=ContextMirror(vllm_config, maybe_prefix(prefix, "model")),
            )
        self.placement = placement
        self.holds_context, self.holds_denoiser = placement.has_context, not placement.has_context

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        cross: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class's; ``cross`` sends or receives what of a context step crosses from the context tower's rank
        to the denoiser's, which returns hidden states that nobody reads, [T, 1]."""
        if kwargs.get("denoise") is not None or self.holds_context:
            hidden = super().forward(input_ids, positions, *args, **kwargs)
            if cross is not None:
                cross()
            return hidden
        if get_forward_context().attn_metadata is None:  # a profile run: there are no caches yet
            self.profile_denoiser(positions.device)
        elif cross is not None:
            cross()
        return torch.zeros(positions.shape[0], 1, dtype=self.model_config.dtype, device=positions.device)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As the base class's; on a denoiser rank zeros of the real shape, [N, V], since vLLM's kernels write them."""
        if self.holds_context or not hidden_states.shape[1]:
            return super().compute_logits(hidden_states)
        return hidden_states.new_zeros(hidden_states.shape[0], self.config.vocab_size)
