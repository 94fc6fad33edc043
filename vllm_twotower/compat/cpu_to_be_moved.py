"""Shims that only a CPU needs; on their way to ``vllm_twotower/cpu/shims.py``."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def portable_moe_layers(needed: bool) -> Iterator[None]:
    """Build Nemotron-H's ``E`` layers with our portable mixture of experts while inside.

    Symptom: vLLM 0.32 on a CPU refuses the model at construction, its fused experts know gated activations only
    (``fused_moe/cpu_fused_moe.py``). ``NemotronHModel`` takes ``decoder_layer_types``, but ``NemotronHForCausalLM``
    does not pass one on, so its default table is changed for the duration of the constructor. Can go when vLLM's
    CPU experts take relu2.
    """
    if not needed:
        yield
        return
    from vllm.model_executor.models import nemotron_h

    from vllm_twotower.cpu.portable_moe import PortableMoEDecoderLayer

    table = nemotron_h.ALL_DECODER_LAYER_TYPES
    fused = table["E"]
    table["E"] = PortableMoEDecoderLayer
    try:
        yield
    finally:
        table["E"] = fused


def disable_prefill_checkpoints(layers: Any) -> None:
    """On a CPU, keep the context tower's Mamba layers from exporting states in the middle of a chunk.

    Symptom: ``IndexError`` in ``mamba_mixer2.conv_ssm_forward`` for any prompt that crosses a 128-token block in one
    chunk while prefix caching is on, the default: the CPU scan (``ops/cpu/mamba_ssm.py``) ignores
    ``return_intermediate_states``, and the layer's cache spec promises the scheduler one checkpoint per prefill.
    Without the promise the scheduler splits the chunk instead. Can go when the CPU scan returns intermediate
    states.
    """
    for layer in layers:
        mixer = layer.mixer
        if hasattr(mixer, "ssm_state_size"):
            mixer.get_kv_cache_spec = _without_checkpoints(mixer.get_kv_cache_spec)


def _without_checkpoints(get_kv_cache_spec: Any) -> Any:
    def wrapped(vllm_config: Any) -> Any:
        spec = get_kv_cache_spec(vllm_config)
        if not hasattr(spec, "num_prefill_checkpoint_blocks"):
            return spec
        return dataclasses.replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)

    return wrapped


def use_torch_for_top_k_top_p() -> None:
    """On a CPU, let vLLM's sampler use its own plain-torch top-k and top-p.

    Symptom: any request with top-k or top-p ends the engine with ``'int' object has no attribute 'to'``: with Triton
    present, ``sample/ops/topk_topp_sampler.py`` takes a kernel that the interpreter cannot run
    (``topk_topp_triton.py``). Can go when the kernel is interpretable or the CPU is excluded there.
    """
    import vllm.v1.worker.gpu.sample.sampler as sampler
    import vllm.v1.worker.gpu.sample.states as states
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    def apply_top_k_top_p(logits: Any, k: Any, p: Any) -> Any:
        return logits if k is None and p is None else apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    sampler.apply_top_k_top_p = states.apply_top_k_top_p = apply_top_k_top_p


def use_torch_for_runner_kernels() -> None:
    """On a CPU, let the model runner's small kernels be plain torch; idempotent.

    Symptom: interpreted, they take 10 ms per row of every engine step, nine tenths of it at batch 8. The functions that
    launch them are replaced where the runner finds them, and kept as ``__wrapped__``; copies of Mamba states keep their
    kernel, which is launched only for rows that copy. Can go when Triton compiles for CPUs.
    """
    import vllm.v1.worker.gpu.model_runner as model_runner
    import vllm.v1.worker.gpu.model_states.mamba_hybrid as mamba_hybrid
    import vllm.v1.worker.gpu.sample.sampler as sampler
    import vllm.v1.worker.gpu.sample.states as states
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.buffer_utils import FusedStagedWriter, StagedWriteTensor
    from vllm.v1.worker.mamba_utils import MambaSpecDecodeGPUContext
    from vllm.v1.worker.utils import KVBlockZeroer

    from vllm_twotower.cpu import runner_kernels as plain

    if getattr(BlockTables, "_twotower_plain", False):
        return

    def replace(owner: Any, name: str, replacement: Any) -> None:
        setattr(owner, name, functools.wraps(getattr(owner, name))(replacement))

    replace(model_runner, "prepare_prefill_inputs", plain.prepare_prefill_inputs)
    replace(model_runner, "prepare_pos_seq_lens", plain.prepare_pos_seq_lens)
    replace(model_runner, "combine_sampled_and_draft_tokens", plain.combine_sampled_and_draft_tokens)
    replace(model_runner, "post_update", plain.post_update)
    replace(BlockTables, "gather_block_tables", plain.gather_block_tables)
    replace(BlockTables, "compute_slot_mappings", plain.compute_slot_mappings)
    replace(StagedWriteTensor, "apply_write", plain.apply_write)
    replace(FusedStagedWriter, "apply", plain.apply_all_writes)
    replace(KVBlockZeroer, "zero_block_ids", plain.zero_block_ids)
    replace(states, "apply_temperature", plain.apply_temperature)
    replace(sampler, "get_num_sampled_and_rejected", plain.get_num_sampled_and_rejected)
    replace(mamba_hybrid, "preprocess_mamba_align_fused_kernel", plain.Launcher(plain.advance_mamba_blocks))
    replace(mamba_hybrid, "_scatter_num_accepted_kernel", plain.Launcher(plain.scatter_num_accepted))
    draw = sampler.gumbel_sample

    def gumbel_sample(logits: Any, rows: Any, temperature: Any, *args: Any, **kwargs: Any) -> Any:
        greedy = plain.greedy_tokens(logits, rows, temperature)
        return draw(logits, rows, temperature, *args, **kwargs) if greedy is None else greedy

    replace(sampler, "gumbel_sample", gumbel_sample)
    copy_before = MambaSpecDecodeGPUContext.run_fused_precopy
    copy_after = MambaSpecDecodeGPUContext.run_fused_postprocess_align

    def copy_rows_before(self: Any, num_reqs: int, state_idx: Any, src_col: Any, bias: Any, rows: Any) -> None:
        rows = plain.rows_that_change_block(state_idx, src_col, rows[:num_reqs])
        copy_before(self, len(rows), state_idx, src_col, bias, rows)

    def copy_rows_after(self: Any, num_reqs: int, accepted: Any, state_idx: Any, computed: Any, rows: Any) -> None:
        if self.is_initialized:
            rows = plain.rows_that_end_off_a_boundary(accepted, state_idx, computed, rows[:num_reqs], self.block_size)
            copy_after(self, len(rows), accepted, state_idx, computed, rows)

    replace(MambaSpecDecodeGPUContext, "run_fused_precopy", copy_rows_before)
    replace(MambaSpecDecodeGPUContext, "run_fused_postprocess_align", copy_rows_after)
    BlockTables._twotower_plain = True
