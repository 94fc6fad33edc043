"""Convolution and scan over canvases in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for other dtypes."""

import ctypes

import torch

from vllm_twotower.cpu.library import ConvStruct, ScanStruct, are_fp32, find_function
from vllm_twotower.ops.seeded_scan import reference
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs


def _dense(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    """The tensor, copied if its last ``dims`` dimensions do not lie together; those before may have any strides."""
    return tensor if _is_dense(tensor, dims) else tensor.contiguous()


def _is_dense(tensor: torch.Tensor, dims: int) -> bool:
    return tensor[(0,) * (tensor.dim() - dims)].is_contiguous() if tensor.numel() else True


def _dense_slots(cache: torch.Tensor, slot_R: torch.Tensor, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache and the rows' slots in it; of one whose slots do not lie together only the rows' are copied."""
    if _is_dense(cache, dims):
        return cache, slot_R.contiguous()
    return cache[slot_R].contiguous(), torch.arange(len(slot_R))


def seeded_conv(inputs: ConvInputs) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_conv``."""
    if not are_fp32(inputs.x_RSC, inputs.weight_CK, inputs.bias_C, inputs.cache_ZKC):
        return reference.seeded_conv(inputs)
    x_RSC = _dense(inputs.x_RSC, 1)
    cache_ZKC, slot_R = _dense_slots(inputs.cache_ZKC, inputs.slot_R, 1)
    weight_KC = inputs.weight_CK.T.contiguous()
    bias_C = None if inputs.bias_C is None else inputs.bias_C.contiguous()
    struct = ConvStruct(
        x_RSC.data_ptr(),
        *x_RSC.stride()[:2],
        weight_KC.data_ptr(),
        None if bias_C is None else bias_C.data_ptr(),
        cache_ZKC.data_ptr(),
        *cache_ZKC.stride()[:2],
        slot_R.data_ptr(),
    )
    out_RSC = torch.empty(x_RSC.shape)
    find_function("seeded_conv")(out_RSC.data_ptr(), ctypes.byref(struct), *x_RSC.shape, weight_KC.shape[0])
    return out_RSC


def seeded_scan(inputs: ScanInputs, out_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See ``vllm_twotower.ops.seeded_scan``."""
    vectors = [inputs.a_H, inputs.skip_H, inputs.dt_bias_H]
    if not are_fp32(inputs.x_RSHP, inputs.dt_RSH, inputs.b_RSGN, inputs.c_RSGN, inputs.state_ZHPN, *vectors):
        return reference.seeded_scan(inputs, out_dtype)
    x, dt = _dense(inputs.x_RSHP, 2), _dense(inputs.dt_RSH, 1)
    b, c = _dense(inputs.b_RSGN, 2), _dense(inputs.c_RSGN, 2)
    state_ZHPN, slot_R = _dense_slots(inputs.state_ZHPN, inputs.slot_R, 3)
    vectors = [v.contiguous() for v in vectors]
    struct = ScanStruct(
        *(t.data_ptr() for t in (x, dt, b, c)),
        *(stride for t in (x, dt, b, c) for stride in t.stride()[:2]),
        *(v.data_ptr() for v in vectors),
        state_ZHPN.data_ptr(),
        state_ZHPN.stride(0),
        slot_R.data_ptr(),
    )
    out_RSHP = torch.empty(x.shape)
    find_function("seeded_scan")(out_RSHP.data_ptr(), ctypes.byref(struct), *x.shape, *b.shape[2:])
    return out_RSHP.to(out_dtype)
