"""What vLLM needs changed to run this model on a CPU; ``running_on_cpu`` puts it in place where the model is built.

A shim's docstring says what fails without it, where vLLM does it, when the shim can go, and which test guards it.
Imports nothing of vLLM before it is called.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
    use_torch_for_top_k_top_p()
    use_torch_for_runner_kernels()
    use_torch_for_sampler_kernels()
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
    for mixer in (layer.mixer for layer in layers):
        if hasattr(mixer, "ssm_state_size"):
            mixer.get_kv_cache_spec = functools.partial(_spec_without_checkpoints, mixer.get_kv_cache_spec)


def _spec_without_checkpoints(get_kv_cache_spec: Callable[[Any], Any], vllm_config: Any) -> Any:
    spec = get_kv_cache_spec(vllm_config)
    if not hasattr(spec, "num_prefill_checkpoint_blocks"):
        return spec
    return dataclasses.replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)


def use_torch_for_top_k_top_p() -> None:
    """Let vLLM's sampler use its own plain-torch top-k and top-p.

    Symptom: any request with top-k or top-p ends the engine with ``'int' object has no attribute 'to'``: where Triton
        is present, a kernel is taken that its interpreter cannot run.
    Upstream: vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p,
        vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p_pytorch
    Removed when: the kernel is interpretable, or the CPU is excluded there.
    Test: tests/test_compat.py::test_vllms_top_k_kernel_still_cannot_be_interpreted
    """
    import vllm.v1.worker.gpu.sample.sampler as sampler
    import vllm.v1.worker.gpu.sample.states as states
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    def apply_top_k_top_p(logits: Any, k: Any, p: Any, **_later: Any) -> Any:
        return logits if k is None and p is None else apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    sampler.apply_top_k_top_p = states.apply_top_k_top_p = apply_top_k_top_p


def _replace(owner: Any, name: str, stand_in: Callable[..., Any]) -> None:
    """Put a stand-in in a function's place, which it keeps as ``__wrapped__``."""
    setattr(owner, name, functools.wraps(getattr(owner, name))(stand_in))


@functools.cache
def use_torch_for_runner_kernels() -> None:
    """Let the model runner's small kernels be plain torch (``runner_kernels.py``).

    The functions that launch them are replaced where the runner finds them, and kept as ``__wrapped__``.

    Symptom: interpreted, the kernels take 10 ms per row of every engine step, nine tenths of it at batch 8.
    Upstream: vllm.v1.worker.gpu.input_batch.prepare_prefill_inputs,
        vllm.v1.worker.gpu.input_batch.prepare_pos_seq_lens,
        vllm.v1.worker.gpu.input_batch.combine_sampled_and_draft_tokens,
        vllm.v1.worker.gpu.input_batch.post_update, vllm.v1.worker.gpu.input_batch.get_num_sampled_and_rejected,
        vllm.v1.worker.gpu.block_table.BlockTables.gather_block_tables,
        vllm.v1.worker.gpu.block_table.BlockTables.compute_slot_mappings,
        vllm.v1.worker.gpu.buffer_utils.StagedWriteTensor.apply_write,
        vllm.v1.worker.gpu.buffer_utils.FusedStagedWriter.apply,
        vllm.v1.worker.utils.KVBlockZeroer.zero_block_ids,
        vllm.v1.worker.mamba_utils.MambaSpecDecodeGPUContext.run_fused_precopy,
        vllm.v1.worker.mamba_utils.MambaSpecDecodeGPUContext.run_fused_postprocess_align,
        vllm.v1.worker.gpu.model_states.mamba_hybrid.preprocess_mamba_align_fused_kernel,
        vllm.v1.worker.gpu.model_states.mamba_hybrid._scatter_num_accepted_kernel
    Removed when: Triton compiles for CPUs.
    Test: tests/test_runner_kernels.py::test_sampled_and_draft_tokens
    """
    import vllm.v1.worker.gpu.model_runner as model_runner
    import vllm.v1.worker.gpu.model_states.mamba_hybrid as mamba_hybrid
    import vllm.v1.worker.gpu.sample.sampler as sampler
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext
    from vllm.v1.worker.utils import KVBlockZeroer

    from vllm_twotower.cpu import runner_kernels as plain

    context = MambaSpecDecodeGPUContext
    stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
        (model_runner, "prepare_prefill_inputs", plain.prepare_prefill_inputs),
        (model_runner, "prepare_pos_seq_lens", plain.prepare_pos_seq_lens),
        (model_runner, "combine_sampled_and_draft_tokens", plain.combine_sampled_and_draft_tokens),
        (model_runner, "post_update", plain.post_update),
        (BlockTables, "gather_block_tables", plain.gather_block_tables),
        (BlockTables, "compute_slot_mappings", plain.compute_slot_mappings),
        (StagedWriteTensor, "apply_write", plain.apply_write),
        (FusedStagedWriter, "apply", plain.apply_all_writes),
        (KVBlockZeroer, "zero_block_ids", plain.zero_block_ids),
        (sampler, "get_num_sampled_and_rejected", plain.get_num_sampled_and_rejected),
        (context, "run_fused_precopy", plain.copy_states_before_step),
        (context, "run_fused_postprocess_align", plain.copy_states_after_step),
        (mamba_hybrid, "preprocess_mamba_align_fused_kernel", plain.advance_mamba_blocks),
        (mamba_hybrid, "_scatter_num_accepted_kernel", plain.scatter_num_accepted),
    ]
    for owner, name, function in stand_ins:
        make: Callable[..., Any] = plain.Launcher if owner is mamba_hybrid else plain.without_later_keywords
        _replace(owner, name, make(function))


@functools.cache
def use_torch_for_sampler_kernels() -> None:
    """Let temperature, draws and penalties be plain torch (``runner_kernels.py``).

    Symptom: interpreted, each of them takes 30 ms per row of every step.
    Upstream: vllm.v1.worker.gpu.sample.gumbel.apply_temperature, vllm.v1.worker.gpu.sample.gumbel.gumbel_sample,
        vllm.v1.worker.gpu.sample.penalties.apply_penalties, vllm.v1.worker.gpu.sample.penalties.bincount
    Removed when: Triton compiles for CPUs.
    Test: tests/test_runner_kernels.py::test_penalties
    """
    import vllm.v1.worker.gpu.sample.penalties as penalties
    import vllm.v1.worker.gpu.sample.sampler as sampler
    import vllm.v1.worker.gpu.sample.states as states

    from vllm_twotower.cpu import runner_kernels as plain

    stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
        (states, "apply_temperature", plain.apply_temperature),
        (sampler, "gumbel_sample", plain.gumbel_sample),
        (penalties, "apply_penalties", plain.apply_penalties),
        (penalties, "bincount", plain.count_tokens),
    ]
    for owner, name, function in stand_ins:
        _replace(owner, name, plain.without_later_keywords(function))
