"""Shims of what vLLM's runner prepares for one forward: its logits' places, and the metadata of its layers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadata
    from vllm.v1.worker.gpu.input_batch import InputBatch


def ask_for_logits(
    batch: "InputBatch", num_logits: "np.ndarray", copy_together: "Callable[..., tuple[torch.Tensor, ...]]"
) -> None:
    """A batch asks for logits at so many of each row's last tokens.

    Symptom: vLLM asks for them at the last token of a row, and at drafts that its own scheduler announced, which the
        tokens of a draft of ours are not.
    Upstream: vllm.v1.worker.gpu.input_batch.InputBatch.cu_num_logits_np,
        vllm.v1.worker.gpu.input_batch.InputBatch.cu_num_logits,
        vllm.v1.worker.gpu.input_batch.InputBatch.logits_indices,
        vllm.v1.worker.gpu.input_batch.InputBatch.expanded_idx_mapping,
        vllm.v1.worker.gpu.input_batch.InputBatch.expanded_local_pos
    Removed when: a model state can say where it wants logits.
    Test: tests/test_self_speculation.py::test_nvidias_ar_tokens

    Args:
        batch: changed in place.
        num_logits: int32 [rows].
        copy_together: copies arrays to a device in one transfer.

    """
    import numpy as np

    device = batch.input_ids.device
    ends_np = batch.query_start_loc_np[1 : batch.num_reqs + 1]
    cu_np = np.concatenate([[0], num_logits.cumsum()]).astype(np.int32)
    row_N = np.arange(batch.num_reqs).repeat(num_logits)
    local_N = np.arange(len(row_N)) - cu_np[row_N]
    batch.cu_num_logits_np = cu_np
    batch.logits_indices, row_of_N = copy_together(device, (ends_np - num_logits)[row_N] + local_N, row_N)
    batch.cu_num_logits, batch.expanded_local_pos = copy_together(device, cu_np, local_N, dtype=np.int32)
    batch.expanded_idx_mapping = batch.idx_mapping[row_of_N]


def keep_states_of(metadata: "Mamba2AttentionMetadata", row_F: "torch.Tensor") -> "Mamba2AttentionMetadata":
    """The metadata with which a Mamba layer leaves the states of rows of several tokens, int64 [F], as they are.

    It does not see them if it has no other such rows; among others, prompts, it reads and writes the null block for
    them.

    Symptom: a Mamba layer advances a row's states over all its tokens, and of a draft some do not count.
    Upstream: vllm.v1.attention.backends.mamba2_attn.Mamba2AttentionMetadata.state_indices_tensor_p,
        vllm.v1.attention.backends.mamba2_attn.Mamba2AttentionMetadata.num_prefills,
        vllm.v1.attention.backends.mamba2_attn.Mamba2AttentionMetadata.num_prefill_tokens,
        vllm.v1.attention.backends.mamba2_attn.Mamba2AttentionMetadata.checkpoint_meta,
        vllm.v1.attention.backends.utils.NULL_BLOCK_ID
    Removed when: a Mamba layer can verify drafts in place with prefix caching on.
    Test: tests/test_self_speculation.py::test_nvidias_ar_tokens
    """
    from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

    assert metadata.state_indices_tensor_p is not None, "a row of several tokens runs as a prefill"
    if metadata.num_prefills == len(row_F):
        return dataclasses.replace(metadata, num_prefills=0, num_prefill_tokens=0)
    row_F = row_F - metadata.num_decodes
    checkpoints = metadata.checkpoint_meta
    if checkpoints is not None:  # what such a row would leave behind as a state in the middle of a prompt
        checkpoints = dataclasses.replace(
            checkpoints, state_indices=checkpoints.state_indices.index_fill(0, row_F, NULL_BLOCK_ID)
        )
    states = metadata.state_indices_tensor_p.index_fill(0, row_F, NULL_BLOCK_ID)
    return dataclasses.replace(metadata, state_indices_tensor_p=states, checkpoint_meta=checkpoints)


def follow_mamba_scan(mixer: "MambaMixer2", then: "Callable[[torch.Tensor, torch.Tensor], None]") -> None:
    """``then(projected_states, output)`` runs after a Mamba layer's convolution and scan, and may write the output.

    Symptom: vLLM's layer advances a row's states over all its tokens, and rows that verify drafts must stop at the last
        one that is accepted, which nobody knows before the sampler has run.
    Upstream: vllm.model_executor.layers.mamba.mamba_mixer2.MambaMixer2.conv_ssm_forward
    Removed when: a Mamba layer can verify drafts in place with prefix caching on.
    Test: tests/test_self_speculation.py::test_nvidias_ar_tokens
    """
    forward = mixer.conv_ssm_forward

    @functools.wraps(forward)
    def forward_and_then(projected_states: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        result = forward(projected_states, output, *args, **kwargs)
        then(projected_states, output)
        return result

    setattr(mixer, "conv_ssm_forward", forward_and_then)  # noqa: B010 - a method, to mypy


def drop_attention_plans(metadata: dict[str, Any], max_num_splits: int) -> None:
    """FlashAttention divides its work anew at every replay of a graph, with at most so many splits of a row's keys.

    Symptom: its metadata hold a plan made for the lengths at hand, and a graph would follow that of the dummies it was
        captured with for ever; vLLM's own captures rewrite the plan in place before every step.
    Upstream: vllm.v1.attention.backends.flash_attn.FlashAttentionMetadata.scheduler_metadata,
        vllm.v1.attention.backends.flash_attn.FlashAttentionMetadata.max_num_splits
    Removed when: its builder can be asked for no plan.
    Test: tests/test_denoise_graphs.py::test_a_captured_pass_has_no_plan_of_its_dummies

    Args:
        metadata: by layer name; changed in place. Those of other backends have no plan.
        max_num_splits: bounds their workspace, which a graph keeps.

    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    for of_layer in metadata.values():
        if isinstance(of_layer, FlashAttentionMetadata) and of_layer.scheduler_metadata is not None:
            of_layer.scheduler_metadata = None
            of_layer.max_num_splits = max_num_splits
