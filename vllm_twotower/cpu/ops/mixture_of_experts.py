"""Router and routed experts in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for any other dtype."""

import ctypes

import torch

from vllm_twotower.cpu.library import RouterStruct, are_fp32, find_function
from vllm_twotower.ops.mixture_of_experts import reference
from vllm_twotower.ops.mixture_of_experts.reference import Routing


def mixture_of_experts(
    x_TD: torch.Tensor, routing: Routing, up_EDI: torch.Tensor, down_EID: torch.Tensor
) -> torch.Tensor:
    """See ``vllm_twotower.ops.mixture_of_experts``."""
    weights = (routing.weight_ED, routing.bias_E, up_EDI, down_EID)
    if not (are_fp32(x_TD, *weights) and all(w.is_contiguous() for w in weights)):
        return reference.mixture_of_experts(x_TD, routing, up_EDI, down_EID)
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    router = RouterStruct(
        routing.weight_ED.data_ptr(), routing.bias_E.data_ptr(), routing.top_k, routing.normalise, routing.scaling
    )
    out, x, up, down = (t.data_ptr() for t in (out_TD, x_TD, up_EDI, down_EID))
    num_experts, _, width = up_EDI.shape
    find_function("mixture_of_experts")(out, x, ctypes.byref(router), up, down, *x_TD.shape, num_experts, width)
    return out_TD
