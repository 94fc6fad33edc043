"""Modulation, norm and gate in C++ (``csrc/cpu_ops.cpp``), fp32 on a CPU; the reference for any other dtype."""

import torch

from vllm_twotower.cpu.library import ModulationStruct, are_fp32, find_function
from vllm_twotower.ops.adaln import reference
from vllm_twotower.ops.adaln.reference import Modulation


def _parts(modulation: Modulation) -> tuple[torch.Tensor, ...]:
    """As ``ModulationStruct`` has them."""
    return modulation.vector_L3D, modulation.table_3D, modulation.level_R, modulation.row_T


def _run(name: str, x_TD: torch.Tensor, other: torch.Tensor, modulation: Modulation, *own: float) -> torch.Tensor:
    """Call one of the library's two functions; ``own`` is what they do not share."""
    x_TD, other = x_TD.contiguous(), other.contiguous()
    out_TD = torch.empty_like(x_TD)
    parts = ModulationStruct(*(part.data_ptr() for part in _parts(modulation)))
    find_function(name)(out_TD.data_ptr(), x_TD.data_ptr(), other.data_ptr(), *own, parts, *x_TD.shape)
    return out_TD


def _is_covered(x_TD: torch.Tensor, other: torch.Tensor, modulation: Modulation) -> bool:
    return are_fp32(x_TD, other) and all(part.is_contiguous() for part in _parts(modulation))


def modulate_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.modulate_norm``."""
    if not _is_covered(x_TD, weight_D, modulation):
        return reference.modulate_norm(x_TD, weight_D, eps, modulation)
    return _run("adaln_norm", x_TD, weight_D, modulation, eps, False)


def norm_modulate(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.norm_modulate``."""
    if not _is_covered(x_TD, weight_D, modulation):
        return reference.norm_modulate(x_TD, weight_D, eps, modulation)
    return _run("adaln_norm", x_TD, weight_D, modulation, eps, True)


def gate_add(x_TD: torch.Tensor, residual_TD: torch.Tensor, modulation: Modulation) -> torch.Tensor:
    """See ``vllm_twotower.ops.gate_add``."""
    if not _is_covered(x_TD, residual_TD, modulation):
        return reference.gate_add(x_TD, residual_TD, modulation)
    return _run("adaln_gate_add", x_TD, residual_TD, modulation)
