"""The ops in C++ (``csrc/cpu_ops.cpp``), by op: fp32 on a CPU; for what they do not cover they call the reference."""

from vllm_twotower.cpu.library import load_library
from vllm_twotower.cpu.ops import adaln, canvas_sample, gated_norm, mixture_of_experts, reveal, seeded_scan
from vllm_twotower.ops.backend import OpBackend, register_implementation


def use_cpp_ops() -> bool:
    """Let ops over tensors on a CPU run in C++ from now on; returns whether they can: it was built at install."""
    if load_library() is None:
        return False
    for function in (
        adaln.modulate_norm,
        adaln.norm_modulate,
        adaln.gate_add,
        canvas_sample.canvas_sample,
        gated_norm.gated_norm,
        mixture_of_experts.mixture_of_experts,
        reveal.reveal,
        seeded_scan.seeded_conv,
        seeded_scan.seeded_scan,
    ):
        register_implementation(function.__name__, OpBackend.CPP, function)
    return True
