"""Numbers that the host computes and the device needs.

A plain ``.to(device)`` of such a number makes the host wait until the device has done everything asked of it before, so
the next launches come late. Here copies are from pinned memory, and nobody waits for them: vLLM's own helper does
that. What is needed at one time goes in one copy.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

__all__ = ["async_tensor_h2d", "copy_together"]

ALIGNED_BYTES = 16
"""Where each vector of a copy begins: Triton compiles a kernel again for addresses that this does not divide."""


def copy_together(
    device: torch.device, *vectors: Sequence[int] | np.ndarray, dtype: type = np.int64
) -> tuple[torch.Tensor, ...]:
    """Several vectors in one copy that the host does not wait for.

    Args:
        device: where they go.
        vectors: of any lengths, in the host's memory.
        dtype: a numpy type, of all of them; bool where they are bool.

    Returns:
        One tensor for each vector, of the same length; parts of one piece of memory.

    """
    lengths = [len(vector) for vector in vectors]
    multiple = ALIGNED_BYTES // np.dtype(dtype).itemsize
    steps = [-(-length // multiple) * multiple for length in lengths]
    joined: np.ndarray = np.zeros(sum(steps), dtype=dtype)
    starts = np.cumsum([0, *steps[:-1]]).tolist()
    for vector, start, length in zip(vectors, starts, lengths, strict=True):
        joined[start : start + length] = vector
    sent = async_tensor_h2d(joined, device=device)
    return tuple(sent[start : start + length] for start, length in zip(starts, lengths, strict=True))
