"""What vLLM needs changed to run this model on a CPU; ``running_on_cpu`` puts it in place where the model is built.

A shim's docstring says what fails without it, where vLLM does it, when the shim can go, and which test guards it.
Imports nothing of vLLM before it is called.
"""

import contextlib
import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm_twotower.cpu import runner_kernels as plain
from vllm_twotower.cpu.ops import use_cpp_ops


@contextlib.contextmanager
def running_on_cpu(model: Any) -> Iterator[None]:
    """Build a model for a CPU while inside: ops in C++, and all shims of this file. Elsewhere nothing happens.

    Args:
        model: what is built inside; its context layers are ``model.model.layers`` afterwards.

    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    use_cpp_ops()
    use_torch_for_runner_kernels()
    with portable_experts():
        yield
    disable_prefill_checkpoints(model.model.layers)


@contextlib.contextmanager
def portable_experts() -> Iterator[None]:
    """Build both towers' mixtures of experts as our portable one while inside.

    Symptom: vLLM on a CPU refuses the model at construction: its fused experts know gated activations only.
    Upstream: vllm.model_executor.models.nemotron_h.NemotronHMoE
    Removed when: vLLM's CPU experts take relu2.
    Test: tests/test_compat.py::test_vllms_experts_still_refuse_this_model_on_a_cpu
    """
    from vllm.model_executor.models import nemotron_h

    from vllm_twotower.cpu.portable_moe import PortableMoE

    fused = nemotron_h.NemotronHMoE
    nemotron_h.NemotronHMoE = PortableMoE
    try:
        yield
    finally:
        nemotron_h.NemotronHMoE = fused


def disable_prefill_checkpoints(layers: Iterable[Any]) -> None:
    """Keep the context tower's Mamba layers from promising states in the middle of a chunk.

    Without the promise the scheduler splits the chunk at the block instead.

    Symptom: ``IndexError`` in ``mamba_mixer2.conv_ssm_forward`` for any prompt that crosses a 128-token block in one
        chunk while prefix caching is on, the default: the CPU scan ignores ``return_intermediate_states``, and the
        layer's cache spec promises the scheduler one checkpoint per prefill.
    Upstream: vllm.model_executor.layers.mamba.mamba_mixer2.MambaMixer2.get_kv_cache_spec,
        vllm.v1.kv_cache_interface.MambaSpec.num_prefill_checkpoint_blocks
    Removed when: the CPU scan returns intermediate states.
    Test: tests/test_compat.py::test_vllms_cpu_scan_still_cannot_export_checkpoints
    """
    from vllm_twotower.models.mamba import list_mamba_mixers

    for mixer in list_mamba_mixers(layers):
        mixer.get_kv_cache_spec = functools.partial(_spec_without_checkpoints, mixer.get_kv_cache_spec)


def _spec_without_checkpoints(get_kv_cache_spec: Callable[[Any], Any], vllm_config: Any) -> Any:
    spec = get_kv_cache_spec(vllm_config)
    if not hasattr(spec, "num_prefill_checkpoint_blocks"):
        return spec
    return dataclasses.replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)


STAND_INS: dict[str, dict[str, tuple[Callable[..., Any], str]]] = {
    "vllm.v1.worker.gpu.model_runner": {
        "prepare_prefill_inputs": (plain.prepare_prefill_inputs, "test_prefill_inputs"),
        "prepare_pos_seq_lens": (plain.prepare_pos_seq_lens, "test_positions_and_lengths"),
        "combine_sampled_and_draft_tokens": (plain.combine_sampled_and_draft_tokens, "test_sampled_and_draft_tokens"),
        "post_update": (plain.post_update, "test_update_after_sampling"),
    },
    "vllm.v1.worker.gpu.block_table.BlockTables": {
        "gather_block_tables": (plain.gather_block_tables, "test_block_tables_and_slots"),
        "compute_slot_mappings": (plain.compute_slot_mappings, "test_block_tables_and_slots"),
    },
    "vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor": {"apply_write": (plain.apply_write, "test_staged_writes")},
    "vllm.v1.worker.gpu.buffer_utils.FusedStagedWriter": {"apply": (plain.apply_all_writes, "test_staged_writes")},
    "vllm.v1.worker.utils.KVBlockZeroer": {"zero_block_ids": (plain.zero_block_ids, "test_zeroed_blocks")},
    "vllm.v1.worker.mamba_utils.MambaSpecDecodeGPUContext": {
        "run_fused_precopy": (plain.copy_states_before_step, "test_mamba_states_copied_before_a_step"),
        "run_fused_postprocess_align": (plain.keep_states_after_step, "test_mamba_states_kept_after_a_step"),
    },
    "vllm.v1.worker.gpu.model_states.mamba_hybrid": {
        "preprocess_mamba_align_fused_kernel": (plain.advance_mamba_blocks, "test_mamba_blocks_advance"),
        "_scatter_num_accepted_kernel": (plain.scatter_num_accepted, "test_accepted_tokens"),
    },
    "vllm.v1.worker.gpu.sample.sampler": {
        "get_num_sampled_and_rejected": (plain.get_num_sampled_and_rejected, "test_what_was_sampled"),
        "gumbel_sample": (plain.gumbel_sample, "test_temperatures_and_greedy_tokens"),
        "apply_top_k_top_p": (plain.apply_top_k_top_p, "test_vllms_top_k_kernel_still_cannot_be_interpreted"),
    },
    "vllm.v1.worker.gpu.sample.states": {
        "apply_temperature": (plain.apply_temperature, "test_temperatures_and_greedy_tokens"),
        "apply_top_k_top_p": (plain.apply_top_k_top_p, "test_vllms_top_k_kernel_still_cannot_be_interpreted"),
    },
    "vllm.v1.worker.gpu.sample.penalties": {
        "apply_penalties": (plain.apply_penalties, "test_penalties"),
        "bincount": (plain.count_tokens, "test_penalties"),
    },
}
"""Where vLLM finds a function -> its name there -> ours, and the test that guards it."""


@functools.cache
def use_torch_for_runner_kernels() -> None:
    """Let the model runner's and the sampler's small kernels be plain torch (``runner_kernels.py``).

    The functions that launch them are replaced where vLLM finds them, and kept as ``__wrapped__``.

    Symptom: interpreted, the kernels take 10 to 30 ms per row of every engine step, nine tenths of it at batch 8. That
        of top-k and top-p cannot be interpreted: it ends the engine with ``'int' object has no attribute 'to'``.
    Upstream: STAND_INS
    Removed when: Triton compiles for CPUs.
    Test: tests/test_runner_kernels.py
    """
    for owner_name, stand_ins in STAND_INS.items():
        owner = pkgutil.resolve_name(owner_name)
        for name, (function, _) in stand_ins.items():
            make: Callable[..., Any] = plain.Launcher if name.endswith("_kernel") else plain.without_later_keywords
            setattr(owner, name, functools.wraps(getattr(owner, name))(make(function)))
