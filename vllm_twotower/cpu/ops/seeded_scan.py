"""Convolution and scan over canvases in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for other dtypes."""

import ctypes

import torch

from vllm_twotower.cpu.library import ConvInputs, ScanInputs, are_fp32, function
from vllm_twotower.ops.seeded_scan import reference
from vllm_twotower.ops.seeded_scan.reference import check_conv, check_scan


def _lies_together(tensor: torch.Tensor, dims: int) -> bool:
    """Whether the last ``dims`` dimensions are contiguous; the ones before may have any strides."""
    return tensor[(0,) * (tensor.dim() - dims)].is_contiguous() if tensor.numel() else True


def seeded_conv(
    x_RWC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    cache_BKC: torch.Tensor,
    slot_R: torch.Tensor,
) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_conv``."""
    if not (are_fp32(x_RWC, weight_CK, bias_C, cache_BKC) and x_RWC.dim() == cache_BKC.dim() == 3):
        return reference.seeded_conv(x_RWC, weight_CK, bias_C, cache_BKC, slot_R)
    check_conv(x_RWC, weight_CK, bias_C, cache_BKC, slot_R)
    x_RWC = x_RWC if _lies_together(x_RWC, 1) else x_RWC.contiguous()
    if not _lies_together(cache_BKC, 1):  # channels first: only the rows' slots are copied
        cache_BKC, slot_R = cache_BKC[slot_R].contiguous(), torch.arange(len(slot_R))
    rows, width, channels = x_RWC.shape
    weight_KC, slot_R = weight_CK.T.contiguous(), slot_R.contiguous()
    bias_C = None if bias_C is None else bias_C.contiguous()
    inputs = ConvInputs(
        x_RWC.data_ptr(),
        *x_RWC.stride()[:2],
        weight_KC.data_ptr(),
        None if bias_C is None else bias_C.data_ptr(),
        cache_BKC.data_ptr(),
        *cache_BKC.stride()[:2],
        slot_R.data_ptr(),
    )
    out_RWC = torch.empty(rows, width, channels)
    function("seeded_conv")(out_RWC.data_ptr(), ctypes.byref(inputs), rows, width, channels, weight_CK.shape[1])
    return out_RWC


def seeded_scan(
    x_RWHP: torch.Tensor,
    dt_RWH: torch.Tensor,
    a_H: torch.Tensor,
    b_RWGN: torch.Tensor,
    c_RWGN: torch.Tensor,
    skip_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    state_BHPN: torch.Tensor,
    slot_R: torch.Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_scan``."""
    arguments = (x_RWHP, dt_RWH, a_H, b_RWGN, c_RWGN, skip_H, dt_bias_H, state_BHPN)
    if not are_fp32(*arguments):
        return reference.seeded_scan(*arguments, slot_R, out_dtype)
    check_scan(x_RWHP, dt_RWH, (a_H, skip_H, dt_bias_H), b_RWGN, c_RWGN, state_BHPN, slot_R)
    x, b, c = (t if _lies_together(t, 2) else t.contiguous() for t in (x_RWHP, b_RWGN, c_RWGN))
    dt = dt_RWH if _lies_together(dt_RWH, 1) else dt_RWH.contiguous()
    if not _lies_together(state_BHPN, 3):
        state_BHPN, slot_R = state_BHPN[slot_R].contiguous(), torch.arange(len(slot_R))
    vectors = [v.contiguous() for v in (a_H, skip_H, dt_bias_H)]
    slot_R = slot_R.contiguous()
    inputs = ScanInputs(
        *(t.data_ptr() for t in (x, dt, b, c)),
        *(stride for t in (x, dt, b, c) for stride in t.stride()[:2]),
        *(v.data_ptr() for v in vectors),
        state_BHPN.data_ptr(),
        state_BHPN.stride(0),
        slot_R.data_ptr(),
    )
    out_RWHP = torch.empty(x.shape)
    rows, width, heads, head_dim = x.shape
    function("seeded_scan")(
        out_RWHP.data_ptr(), ctypes.byref(inputs), rows, width, heads, head_dim, b.shape[2], b.shape[3]
    )
    return out_RWHP.to(out_dtype)
