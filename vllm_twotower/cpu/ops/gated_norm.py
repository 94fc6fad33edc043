"""The gated norm in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for any other dtype."""

import torch

from vllm_twotower.cpu.library import are_fp32, find_function
from vllm_twotower.ops.gated_norm import reference


def gated_norm(
    x_TD: torch.Tensor, gate_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, num_groups: int
) -> torch.Tensor:
    """See ``vllm_twotower.ops.gated_norm``."""
    rows = (x_TD, gate_TD)
    if not are_fp32(*rows, weight_D) or any(row.stride(-1) != 1 for row in rows):
        return reference.gated_norm(x_TD, gate_TD, weight_D, eps, num_groups)
    weight_D = weight_D.contiguous()
    out_TD = torch.empty(x_TD.shape)
    pointers = (tensor.data_ptr() for tensor in (out_TD, x_TD, gate_TD, weight_D))
    find_function("gated_norm")(*pointers, eps, *(row.stride(0) for row in rows), *x_TD.shape, num_groups)
    return out_TD
