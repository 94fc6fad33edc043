"""The reveal rule in C++ (``csrc/cpu_ops.cpp``): in torch it is some thirty operators a pass."""

import ctypes

import torch

from vllm_twotower.cpu.library import RevealStruct, find_function
from vllm_twotower.ops.reveal.reference import CanvasRules, MaskedCanvases


def reveal(
    before: MaskedCanvases, proposal_RS: torch.Tensor, confidence_RS: torch.Tensor, rules: CanvasRules
) -> MaskedCanvases:
    """See ``vllm_twotower.ops.reveal``."""
    by_position = (before.token_RS, proposal_RS, confidence_RS, before.masked_RS)
    by_row = (before.pass_index_R, rules.width_R, rules.threshold_R, rules.max_steps_R)
    read = [tensor.contiguous() for tensor in (*by_position, *by_row)]
    shape = before.token_RS.shape
    level_R, pass_index_R = torch.empty(2, shape[0], dtype=torch.int64)
    after = MaskedCanvases(
        token_RS=torch.empty(shape, dtype=torch.int64),
        masked_RS=torch.empty(shape, dtype=torch.bool),
        level_R=level_R,
        pass_index_R=pass_index_R,
    )
    inputs = RevealStruct(*(tensor.data_ptr() for tensor in read))
    find_function("reveal")(*(tensor.data_ptr() for tensor in vars(after).values()), ctypes.byref(inputs), *shape)
    return after
