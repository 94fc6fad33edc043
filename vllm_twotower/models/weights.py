"""A checkpoint's tensors: where each goes in the module tree.

Names and shapes: ``tensor_shapes.py``. Loading is strict both ways: a tensor that is missing, unknown or of the wrong
shape is an error that lists names, never a silently random layer.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

from vllm_twotower.models.mamba import RECURRENCE_TENSORS
from vllm_twotower.models.tensor_shapes import CONTEXT_PREFIXES, check_tensor, checkpoint_tensors, list_names

CHECKPOINT_TO_MODULE = WeightsMapper(
    orig_to_new_substr={"A_log": "A", "embeddings": "embed_tokens"},
    orig_to_new_stacked={f".{part}_proj": (".qkv_proj", part) for part in "qkv"},
    # prefixes are tried in this order, each on what the one before left: the denoiser's head must move before the
    # context's
    orig_to_new_prefix={
        "lm_head.": "denoiser.lm_head.",
        "context_lm_head.": "lm_head.",
        "context_tower.": "model.",
        "denoiser_tower.": "denoiser.",
        "t_embedder.": "denoiser.conditioning.t_embedder.",
        "t_block.": "denoiser.conditioning.t_block.",
        "scale_shift_tables.": "denoiser.conditioning.scale_shift_tables.",
    },
)
"""Checkpoint names to module names, the only place that knows both."""

_STORED_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
"""Safetensors' names of the dtypes that a checkpoint may have."""


def find_checkpoint_name(layer: str) -> str:
    """A layer's name in the checkpoint, by which a ``quantization_config`` names it.

    Args:
        layer: vLLM's name; ``qkv_proj`` stays, vLLM knows what it is packed from.

    """
    for theirs, ours in CHECKPOINT_TO_MODULE.orig_to_new_prefix.items():
        if f"{layer}.".startswith(ours):
            name = theirs + f"{layer}."[len(ours) :]
            return name.removesuffix(".").replace(".embed_tokens", ".embeddings")
    return layer


def check_weights(
    weights: Iterable[tuple[str, torch.Tensor]], config: Any, with_denoiser: bool, with_context: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on the tensors that this engine loads, and check the rest of the story.

    Args:
        weights: checkpoint name and tensor, any order.
        config: the Hugging Face config.
        with_denoiser: False to leave out the denoiser tower, which may then be absent.
        with_context: False to leave out the context tower, but for what its Mamba states are advanced with.

    Raises:
        ValueError: after the last tensor (at the first of wrong shape or dtype): what is missing or unknown, by name.

    """
    expected = checkpoint_tensors(config)
    needed = {n for n in expected if _is_needed(n, with_denoiser, with_context)}
    unknown, seen = [], set()
    for name, tensor in weights:
        if name not in expected:
            unknown.append(name)
            continue
        if name not in needed:
            continue
        check_tensor(name, tensor.shape, _STORED_DTYPES.get(tensor.dtype, str(tensor.dtype)), expected)
        seen.add(name)
        yield name, tensor
    problems = []
    if missing := sorted(needed - seen):
        problems.append(f"{len(missing)} missing: {list_names(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} not part of the model: {list_names(sorted(unknown))}")
    if problems:
        raise ValueError("the checkpoint does not match its config.json; tensors " + "; ".join(problems))


NOT_IN_CHECKPOINTS = re.compile(r"\.attn\.\w+_(scale|zero_point)$|_input_global_scale$")
"""Parameters that vLLM's layers have and need not be given: scales of the cache, 1 unless a checkpoint says otherwise,
and those of inputs that a scheme leaves as they are."""


def check_filled(parameters: Iterable[str], loaded: Collection[str]) -> None:
    """Check that a quantised checkpoint has filled every layer; of these vLLM does not check it.

    Args:
        parameters: all names.
        loaded: those that were filled.

    Raises:
        ValueError: some were not, by name: vLLM quantises a layer that the checkpoint does not.

    """
    empty = sorted(name for name in parameters if name not in loaded and not NOT_IN_CHECKPOINTS.search(name))
    if empty:
        raise ValueError(
            f"vLLM quantises layers that the checkpoint does not: {list_names(empty)} got no values; name the layers "
            "in the list of what quantization_config in config.json ignores, one by one"
        )


def _is_needed(name: str, with_denoiser: bool, with_context: bool) -> bool:
    if not name.startswith(CONTEXT_PREFIXES):
        return with_denoiser
    return with_context or name.endswith(RECURRENCE_TENSORS)
