"""Nemotron-H's mixture of experts in plain torch, for platforms where vLLM's fused one refuses (a CPU, vLLM 0.32).

vLLM's CPU experts know gated activations only; this model's experts are down(relu(up(x))^2). Same parameters, same
weights file. The routing runs in fp64 as the reference's does, so that borderline choices fall the same way.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.nemotron_h import NemotronHMLP
from vllm.model_executor.utils import set_weight_attrs

from vllm_twotower.cpu.stored_matrices import multiply_out
from vllm_twotower.models.stored_quantization import StoredQuantization
from vllm_twotower.models.weights import find_checkpoint_name
from vllm_twotower.ops import Routing, mixture_of_experts


@torch.library.custom_op("vllm_twotower::routed_experts", mutates_args=())
def routed_experts(
    x_TD: torch.Tensor,
    router_ED: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    normalise: bool,
    scaling: float,
    up_EDI: torch.Tensor,
    down_EID: torch.Tensor,
) -> torch.Tensor:
    """``ops.mixture_of_experts`` as a custom op, because which experts run depends on the data and vLLM compiles the
    context tower as one graph; float32 [T, D].
    """
    return mixture_of_experts(x_TD, Routing(router_ED, bias_E, top_k, normalise, scaling), up_EDI, down_EID)


@routed_experts.register_fake
def _routed_experts_fake(x_TD: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x_TD, dtype=torch.float32)


def _load_expert(param: nn.Parameter, loaded_weight: torch.Tensor, expert: int) -> None:
    """Put one expert's matrix [out, in] in its place; vLLM replays such calls when weights are reloaded."""
    param.data[expert].copy_(loaded_weight.T)


class _Experts(nn.Module):
    """All experts' matrices, stacked, inputs first; each rank holds a slice of every expert's width I.

    Matrices that are stored quantised are multiplied out as they load: no kernel here takes them.
    """

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        quantization = StoredQuantization.read(getattr(config, "quantization_config", None))
        module = find_checkpoint_name(f"{prefix}.0.up_proj")
        self.scheme = quantization.scheme_of(module) if quantization is not None else None
        self.incomplete: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        tp_size = get_tensor_model_parallel_world_size()
        self.width = config.moe_intermediate_size // tp_size
        self.first = get_tensor_model_parallel_rank() * self.width
        num_experts, hidden = config.n_routed_experts, config.hidden_size
        self.up = nn.Parameter(torch.empty(num_experts, hidden, self.width), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num_experts, self.width, hidden), requires_grad=False)
        for parameter in (self.up, self.down):
            set_weight_attrs(parameter, {"weight_loader": _load_expert})

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take ``{expert}.up_proj.weight`` and ``{expert}.down_proj.weight``, or what stands for them; called by
        vLLM's ``AutoWeightsLoader``, for each file anew."""
        for name, tensor in weights:
            expert, projection, last = name.split(".")
            parts = {last: tensor}
            if self.scheme is not None:
                parts = self.incomplete.setdefault((expert, projection), {}) | parts
                self.incomplete[expert, projection] = parts
                if parts.keys() != self.scheme.parts.keys():
                    continue
                del self.incomplete[expert, projection]
            matrix = parts["weight"] if self.scheme is None else multiply_out(parts)
            dim = 0 if projection == "up_proj" else 1
            parameter: Any = self.down if dim else self.up
            parameter.weight_loader(parameter, matrix.narrow(dim, self.first, self.width), int(expert))
        return {"up", "down"}


class PortableMoE(nn.Module):
    """Sigmoid router with a selection bias, top-k routed experts of one group and one shared expert; takes the place of
    vLLM's ``NemotronHMoE``."""

    def __init__(self, config: Any, quant_config: Any = None, parallel_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.scaling = config.routed_scaling_factor
        self.tp_size = get_tensor_model_parallel_world_size()
        # what vLLM's MixtureOfExperts interface reads of a layer; there is no expert parallelism here
        self.n_routed_experts = self.n_logical_experts = self.n_physical_experts = config.n_routed_experts
        self.n_local_physical_experts, self.n_redundant_experts = config.n_routed_experts, 0
        self.n_shared_experts = config.n_shared_experts
        router_ED = torch.empty(config.n_routed_experts, config.hidden_size)
        bias_E = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.gate = nn.ParameterDict({"weight": router_ED, "e_score_correction_bias": bias_E}).requires_grad_(False)
        self.experts = _Experts(config, f"{prefix}.experts")
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = NemotronHMLP(
                config,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_shared_expert_intermediate_size * config.n_shared_experts,
                quant_config=quant_config,
                reduce_results=False,
                prefix=f"{prefix}.shared_experts",
            )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D], same dtype."""
        gate, experts = self.gate, self.experts
        how = (self.top_k, self.normalise, self.scaling)
        out_TD = routed_experts(x_TD, gate.weight, gate.e_score_correction_bias, *how, experts.up, experts.down)
        out_TD = out_TD.to(x_TD.dtype)
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD if self.tp_size == 1 else tensor_model_parallel_all_reduce(out_TD)
