"""The reveal rule in C++ (``csrc/cpu_ops.cpp``): in torch it is some thirty operators a pass."""

import ctypes

import torch

from vllm_twotower.cpu.library import RevealStruct, find_function
from vllm_twotower.ops.reveal.reference import CanvasRules, Revealed


def reveal(
    token_RS: torch.Tensor,
    proposal_RS: torch.Tensor,
    confidence_RS: torch.Tensor,
    masked_RS: torch.Tensor,
    pass_index_R: torch.Tensor,
    rules: CanvasRules,
) -> Revealed:
    """See ``vllm_twotower.ops.reveal``."""
    by_position = (token_RS, proposal_RS, confidence_RS, masked_RS)
    by_row = (pass_index_R, rules.width_R, rules.threshold_R, rules.max_steps_R)
    read = [tensor.contiguous() for tensor in (*by_position, *by_row)]
    out_RS = torch.empty(token_RS.shape, dtype=torch.int64)
    out_masked_RS = torch.empty(masked_RS.shape, dtype=torch.bool)
    level_R, out_pass_index_R = torch.empty(2, len(pass_index_R), dtype=torch.int64)
    written = (out_RS, out_masked_RS, level_R, out_pass_index_R)
    inputs = RevealStruct(*(tensor.data_ptr() for tensor in read))
    find_function("reveal")(*(tensor.data_ptr() for tensor in written), ctypes.byref(inputs), *token_RS.shape)
    return Revealed(*written)
