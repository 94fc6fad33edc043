"""The model: vLLM's own Nemotron-H as the context tower, and the denoiser tower beside it.

Every engine step runs exactly one of them. ``forward`` is told which by the step's inputs: in a denoise step the model
state (``runtime/model_state.py``) passes what to run instead of the context tower.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_twotower import compat
from vllm_twotower.config import EngineOptions
from vllm_twotower.cpu.shims import running_on_cpu
from vllm_twotower.decoding.noise import gumbel_noise
from vllm_twotower.models.denoiser_tower import LOGITS_TILE, DenoiserTower
from vllm_twotower.models.stored_quantization import StoredQuantization
from vllm_twotower.models.weights import CHECKPOINT_TO_MODULE, check_filled, check_weights, find_checkpoint_name
from vllm_twotower.ops import NOISE_TILE
from vllm_twotower.runtime.step import CanvasLayout


class TwoTowerForCausalLM(NemotronHForCausalLM):
    """Context tower, and with diffusion on the denoiser tower, on the same ranks.

    Without ``additional_config["diffusion"]`` only the context tower is built and loaded: a plain autoregressive
    Nemotron-H.

    Args:
        vllm_config: the engine's.
        prefix: of module names.

    """

    hf_to_vllm_mapper = CHECKPOINT_TO_MODULE

    allow_patterns_overrides = ("model-*.safetensors", "model.safetensors")
    """The files a checkpoint consists of, shards first: nothing is unpickled, and other safetensors beside them are not
    read."""

    holds_context = holds_denoiser = True
    """Whether this rank has the tower."""

    def __new__(cls, *, vllm_config: VllmConfig, **_: Any) -> "TwoTowerForCausalLM":
        """Prepare a quantisation before vLLM's own ``__new__`` does, and refuse one that the towers do not take."""
        StoredQuantization.read(getattr(vllm_config.model_config.hf_config, "quantization_config", None))
        if vllm_config.quant_config is not None:
            compat.name_layers_as_checkpoint(vllm_config.quant_config, find_checkpoint_name)
        return super().__new__(cls, vllm_config=vllm_config)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        options = EngineOptions.read(vllm_config)
        with running_on_cpu(self):
            self.build_context(vllm_config, prefix)
            self.options = options
            self.denoiser: DenoiserTower | None = None
            if options is not None and self.holds_denoiser:
                self.denoiser = DenoiserTower(vllm_config, options.canvas_length, maybe_prefix(prefix, "denoiser"))

    def build_context(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Build the context tower; what is not a tower comes with it."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        denoise: Callable[[], None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run one tower.

        Args:
            denoise: the passes of a denoise step; None in a context step. The others are upstream's.

        Returns:
            Hidden states of the context tower [T, D]. A denoise step has none, [T, 0]: its outcome is in the step.

        """
        if denoise is not None:
            denoise()
            return torch.empty(positions.shape[0], 0, dtype=self.model_config.dtype, device=positions.device)
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        # without metadata this is a profile run: there are no caches yet
        if self.denoiser is not None and get_forward_context().attn_metadata is None:
            self.profile_denoiser(positions.device)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the context tower's head; no rows in a denoise step, whose sampler only reports."""
        if not hidden_states.shape[1]:
            return hidden_states.new_empty(0, 1)
        return super().compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load of a checkpoint, as released or quantised, the towers that this rank holds, strictly.

        Raises:
            ValueError: tensors that are missing, unknown or of the wrong shape, by name.

        """
        wanted = check_weights(weights, self.config, self.denoiser is not None, self.holds_context)
        loaded = AutoWeightsLoader(self).load_weights(wanted, mapper=self.hf_to_vllm_mapper)
        if getattr(self.config, "quantization_config", None):
            check_filled((name for name, _ in self.named_parameters()), loaded)
        if self.denoiser is not None:
            self.denoiser.conditioning.refresh()
        return loaded

    def profile_denoiser(self, device: torch.device) -> None:
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
