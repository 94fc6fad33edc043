"""Modulation, norm and gate in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for any other dtype."""

import torch

from vllm_twotower.cpu.library import ModulationStruct, are_fp32, function
from vllm_twotower.ops.adaln import reference
from vllm_twotower.ops.adaln.reference import Modulation


def _pointers(modulation: Modulation) -> ModulationStruct:
    """Addresses of what ``_is_covered`` has seen to be contiguous."""
    m = modulation
    return ModulationStruct(*(part.data_ptr() for part in (m.vector_L3D, m.table_3D, m.level_R, m.row_T)))


def _is_covered(x_TD: torch.Tensor, other: torch.Tensor, modulation: Modulation) -> bool:
    parts = (modulation.vector_L3D, modulation.table_3D, modulation.level_R, modulation.row_T)
    return are_fp32(x_TD, other) and all(part.is_contiguous() for part in parts)


def _norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation, norm_first: bool
) -> torch.Tensor:
    x_TD, weight_D = x_TD.contiguous(), weight_D.contiguous()
    out_TD = torch.empty_like(x_TD)
    function("adaln_norm")(
        out_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr(), eps, norm_first, _pointers(modulation), *x_TD.shape
    )
    return out_TD


def modulate_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.modulate_norm``."""
    if not _is_covered(x_TD, weight_D, modulation):
        return reference.modulate_norm(x_TD, weight_D, eps, modulation)
    return _norm(x_TD, weight_D, eps, modulation, norm_first=False)


def norm_modulate(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.norm_modulate``."""
    if not _is_covered(x_TD, weight_D, modulation):
        return reference.norm_modulate(x_TD, weight_D, eps, modulation)
    return _norm(x_TD, weight_D, eps, modulation, norm_first=True)


def gate_add(x_TD: torch.Tensor, residual_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.gate_add``."""
    if not _is_covered(x_TD, residual_TD, modulation):
        return reference.gate_add(x_TD, residual_TD, modulation)
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    function("adaln_gate_add")(
        out_TD.data_ptr(), x_TD.data_ptr(), residual_TD.data_ptr(), _pointers(modulation), *x_TD.shape
    )
    return out_TD
