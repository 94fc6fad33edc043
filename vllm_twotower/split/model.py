"""The model with the towers on different ranks: each builds, loads and runs its own."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import maybe_prefix
from vllm.platforms import current_platform

from vllm_twotower import compat
from vllm_twotower.config import CONFIG_KEY, EngineOptions
from vllm_twotower.cpu.shims import running_on_cpu
from vllm_twotower.models.twotower import TwoTowerForCausalLM
from vllm_twotower.split.context_mirror import ContextMirror
from vllm_twotower.split.link import ContextHandover
from vllm_twotower.split.placement import resolve_placement


class SplitTwoTowerForCausalLM(TwoTowerForCausalLM):
    """One tower of the two; the other one's part of a step does nothing here."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        placement = resolve_placement(vllm_config)
        if placement.has_context:
            super().__init__(vllm_config=vllm_config, prefix=prefix, with_denoiser=False)
        else:
            with running_on_cpu(self, needed=current_platform.is_cpu()):
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
            self.options = EngineOptions.from_additional_config(vllm_config.additional_config[CONFIG_KEY])
            self.add_denoiser(vllm_config, prefix)
        self.placement, self.holds_context = placement, placement.has_context

    def get_model_state_cls(self) -> type:
        """The runner asks for this class."""
        from vllm_twotower.split.state import SplitModelState

        return SplitModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        *args: Any,
        handover: ContextHandover | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the base class's; in a context step ``handover`` crosses from the context tower's rank to the denoiser's,
        which returns hidden states that nobody reads, [T, 1]."""
        if kwargs.get("denoise") is not None or self.holds_context:
            hidden = super().forward(input_ids, positions, *args, **kwargs)
            if handover is not None:
                handover.send()
            return hidden
        if get_forward_context().attn_metadata is None:  # a profile run: there are no caches yet
            self.profile_denoiser(positions.device)
        elif handover is not None:
            handover.receive()
        return torch.zeros(positions.shape[0], 1, dtype=self.model_config.dtype, device=positions.device)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """As the base class's; on a denoiser rank zeros of the real shape, [N, V], since vLLM's kernels write them."""
        if self.holds_context or not hidden_states.shape[1]:
            return super().compute_logits(hidden_states)
        return hidden_states.new_zeros(hidden_states.shape[0], self.config.vocab_size)
