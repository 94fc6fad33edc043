"""Matrices of a quantised checkpoint as plain numbers, for experts on a CPU."""

import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme


def multiply_out(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix that some tensors of a checkpoint stand for.

    Args:
        parts: by the last part of their names; of a scheme of ``models/stored_schemes.py``.

    Returns:
        float32 [N, K].

    """
    scale = parts["weight_scale"].float()
    if "weight_packed" in parts:
        return _unpack(parts["weight_packed"], scale, parts["weight_global_scale"].float())
    if "weight_scale_2" in parts:  # ModelOpt's is what one multiplies by, the other one's what one divides by
        return _unpack(parts["weight"], scale, 1 / parts["weight_scale_2"].float().reshape(1))
    return parts["weight"].float() * scale


def _unpack(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """NVFP4, two numbers in each uint8 of [N, K / 2]."""
    state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}
    return NVFP4PackedCompressor.decompress(state, NVFP4)["weight"].float()


NVFP4: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
