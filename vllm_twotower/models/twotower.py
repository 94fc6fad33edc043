"""The registered model: vLLM's own Nemotron-H as the context tower, and the denoiser tower beside it.

Every engine step runs exactly one of them. ``forward`` is told which by the step's inputs: the model state passes a
denoise step (``runtime/denoise_step.py``) or nothing.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.platforms import current_platform

from vllm_twotower import compat
from vllm_twotower.config import CONFIG_KEY, EngineOptions
from vllm_twotower.cpu.shims import running_on_cpu
from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.models.denoiser_tower import LOGITS_TILE, CanvasLayout, DenoiserTower
from vllm_twotower.models.weights import CHECKPOINT_TO_MODULE, checked
from vllm_twotower.ops.canvas_sample.reference import NOISE_TILE
from vllm_twotower.split.context_mirror import ContextMirror
from vllm_twotower.split.placement import take_place


class DenoiseStep(Protocol):
    """What a denoise step does with the denoiser: one or more passes, and the reveals between them."""

    def run(self, denoiser: DenoiserTower | None, context_layers: nn.ModuleList) -> None:
        """Run the passes, or wait for the rank that does; results stay in the step."""


class ContextStep(Protocol):
    """A context step of split towers: what the context forward wrote crosses to the denoiser's rank."""

    def hand_over(self) -> None:
        """On the context tower's rank, after its forward."""

    def take_over(self) -> None:
        """On the denoiser's rank, instead of a forward."""


class NemotronHTwoTowerForCausalLM(NemotronHForCausalLM):
    """Context tower, and with diffusion on the denoiser tower.

    Without ``additional_config["diffusion"]`` only the context tower is built and loaded: a plain autoregressive
    Nemotron-H. With the towers split, a rank builds and loads its own; the other one's part of a step does nothing here
    (``split/placement.py``).
    """

    hf_to_vllm_mapper = CHECKPOINT_TO_MODULE

    allow_patterns_overrides = ("model-*.safetensors", "model.safetensors")
    """The files a checkpoint consists of, shards first: nothing is unpickled, and other safetensors beside them are not
    read."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.raise_recorded_problem()
        options = EngineOptions.from_additional_config(vllm_config.additional_config.get(CONFIG_KEY))
        placement = take_place(vllm_config, options)
        with running_on_cpu(self, needed=current_platform.is_cpu()):
            if placement.has_context:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
            else:
                self._mirror_context(vllm_config, prefix)
        self.options, self.placement = options, placement
        self.denoiser: DenoiserTower | None = None
        if options is not None and placement.has_denoiser:
            self.denoiser = DenoiserTower(vllm_config, options.canvas_length, maybe_prefix(prefix, "denoiser"))
        self._ran_denoise_step = False

    def _mirror_context(self, vllm_config: VllmConfig, prefix: str) -> None:
        """What upstream's constructor leaves behind, with a mirror for a tower."""
        nn.Module.__init__(self)
        self.vllm_config, self.model_config = vllm_config, vllm_config.model_config
        self.config, self.scheduler_config = vllm_config.model_config.hf_config, vllm_config.scheduler_config
        self.quant_config = vllm_config.quant_config
        self.model = ContextMirror(vllm_config, maybe_prefix(prefix, "model"))

    def get_model_state_cls(self) -> type:
        """The runner asks for this class; with diffusion off it gets the one it would have chosen itself."""
        if self.options is None:
            from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

            return MambaHybridModelState
        from vllm_twotower.runtime.model_state import TwoTowerModelState

        return TwoTowerModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        denoise_step: DenoiseStep | None = None,
        context_step: ContextStep | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run one tower.

        Returns:
            Hidden states of the context tower [T, D]; in a denoise step, and on a rank without that tower, an empty
            stand-in of that shape: what was revealed stays in ``denoise_step`` for the sampler.

        """
        self._ran_denoise_step = denoise_step is not None
        hidden = self._no_hidden_states(positions)
        if denoise_step is not None:
            denoise_step.run(self.denoiser, self.model.layers)
            return hidden
        if self.placement.has_context:
            hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if get_forward_context().attn_metadata is None:  # a profile run: there are no caches yet
            if self.denoiser is not None:
                self._profile_denoiser(positions.device)
        elif context_step is not None:
            context_step.hand_over() if self.placement.has_context else context_step.take_over()
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the context tower's head; in a denoise step nothing is computed, the sampler only reports."""
        if self._ran_denoise_step:
            return hidden_states.new_empty(0, 1)
        if not self.placement.has_context:
            return hidden_states.new_zeros(1, 1).expand(hidden_states.shape[0], self.config.vocab_size)
        return super().compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in the released layout, strictly.

        Raises:
            ValueError: tensors that are missing, unknown or of the wrong shape, by name.

        """
        wanted = checked(weights, self.config, self.denoiser is not None, self.placement.has_context)
        loaded = AutoWeightsLoader(self).load_weights(wanted, mapper=self.hf_to_vllm_mapper)
        if self.denoiser is not None:
            self.denoiser.conditioning.refresh()
        return loaded

    def _no_hidden_states(self, positions: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros((), dtype=self.model_config.dtype, device=positions.device)
        return empty.expand(positions.shape[0], self.config.hidden_size)

    def _profile_denoiser(self, device: torch.device) -> None:
        """Run the denoiser at its widest, so that vLLM's memory profile covers it."""
        assert self.denoiser is not None
        assert self.options is not None
        width = self.options.canvas_length
        num_rows = min(self.scheduler_config.max_num_seqs, self.scheduler_config.max_num_batched_tokens // width)
        layout = CanvasLayout.from_widths([width] * num_rows, device)
        tokens = torch.zeros(num_rows * width, dtype=torch.int64, device=device)
        level = torch.zeros(num_rows, dtype=torch.int64, device=device)
        hidden = self.denoiser(tokens, level, layout, self.model.layers)
        logits = self.denoiser.logits(hidden[:LOGITS_TILE]).float()
        logits.logsumexp(dim=-1)
        key = torch.zeros(min(NOISE_TILE, logits.shape[0]), dtype=torch.int64, device=device)
        (logits[: len(key)] + gumbel_noise(key, key, key, logits.shape[1])).sort(dim=-1)
