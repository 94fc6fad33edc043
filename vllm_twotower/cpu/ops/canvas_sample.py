"""Greedy proposals in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for draws and other dtypes."""

import torch

from vllm_twotower.cpu.library import are_fp32, find_function
from vllm_twotower.ops.canvas_sample import reference
from vllm_twotower.ops.canvas_sample.reference import Draw, Sample


def canvas_sample(logits_NV: torch.Tensor, mask_token_id: int, draw: Draw | None = None) -> Sample:
    """See ``vllm_twotower.ops.canvas_sample``."""
    if draw is not None or not are_fp32(logits_NV):
        return reference.canvas_sample(logits_NV, mask_token_id, draw)
    logits_NV = logits_NV.contiguous()
    num_rows, vocab_size = logits_NV.shape
    token_N = torch.empty(num_rows, dtype=torch.int64)
    highest_N, log_total_N = torch.empty(2, num_rows)
    tensors = (token_N, highest_N, log_total_N, logits_NV)
    find_function("greedy_sample")(*(t.data_ptr() for t in tensors), mask_token_id, num_rows, vocab_size)
    return Sample(token_N, (highest_N - log_total_N).exp())
