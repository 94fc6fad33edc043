"""The released checkpoint's tensors: their names, their shapes, and where each goes in the module tree.

Names and shapes: spec section 2. Loading is strict both ways: a tensor that is missing, unknown or of the wrong shape
is an error that lists names, never a silently random layer.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from vllm.model_executor.models.utils import WeightsMapper

NUM_NAMES_SHOWN = 8

CONTEXT_PREFIXES = ("context_tower.", "context_lm_head.")

CHECKPOINT_TO_MODULE = WeightsMapper(
    orig_to_new_substr={"A_log": "A", "embeddings": "embed_tokens"},
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
    },
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
"""Checkpoint names to module names; the only place that knows both."""


def checkpoint_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a two-tower checkpoint and its shape.

    Args:
        config: the Hugging Face config (any object with the fields of the released ``config.json``).

    """
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "context_lm_head.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "t_embedder.mlp.0.weight": (hidden, 256),
        "t_embedder.mlp.0.bias": (hidden,),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "t_embedder.mlp.2.bias": (hidden,),
        "t_block.1.weight": (3 * hidden, hidden),
        "t_block.1.bias": (3 * hidden,),
    }
    for tower in ("context_tower", "denoiser_tower"):
        shapes[f"{tower}.embeddings.weight"] = (vocab, hidden)
        shapes[f"{tower}.norm_f.weight"] = (hidden,)
        for index, kind in enumerate(config.hybrid_override_pattern):
            layer = f"{tower}.layers.{index}"
            shapes[f"{layer}.norm.weight"] = (hidden,)
            for name, shape in _mixer_shapes(kind, config):
                shapes[f"{layer}.mixer.{name}"] = shape
    for index in range(len(config.hybrid_override_pattern)):
        shapes[f"scale_shift_tables.{index}"] = (3, hidden)
    return shapes


def _mixer_shapes(kind: str, config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config.hidden_size
    if kind == "M":
        heads, inner = config.mamba_num_heads, config.mamba_num_heads * config.mamba_head_dim
        conv = inner + 2 * config.n_groups * config.ssm_state_size
        yield "in_proj.weight", (inner + conv + heads, hidden)
        yield "conv1d.weight", (conv, 1, config.conv_kernel)
        if config.use_conv_bias:
            yield "conv1d.bias", (conv,)
        for name in ("A_log", "D", "dt_bias"):
            yield name, (heads,)
        yield "norm.weight", (inner,)
        yield "out_proj.weight", (hidden, inner)
    elif kind == "*":
        for name, heads in (
            ("q", config.num_attention_heads),
            ("k", config.num_key_value_heads),
            ("v", config.num_key_value_heads),
        ):
            yield f"{name}_proj.weight", (heads * config.head_dim, hidden)
        yield "o_proj.weight", (hidden, config.num_attention_heads * config.head_dim)
    elif kind == "E":
        yield "gate.weight", (config.n_routed_experts, hidden)
        yield "gate.e_score_correction_bias", (config.n_routed_experts,)
        widths = {f"experts.{e}": config.moe_intermediate_size for e in range(config.n_routed_experts)}
        if config.n_shared_experts:
            widths["shared_experts"] = config.moe_shared_expert_intermediate_size * config.n_shared_experts
        for name, width in widths.items():
            yield f"{name}.up_proj.weight", (width, hidden)
            yield f"{name}.down_proj.weight", (hidden, width)
    elif kind == "-":
        yield "up_proj.weight", (config.intermediate_size, hidden)
        yield "down_proj.weight", (hidden, config.intermediate_size)
    else:
        raise ValueError(f"hybrid_override_pattern has an unknown layer kind {kind!r}: use M, E, * and - only")


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], config: Any, with_denoiser: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on the tensors that this engine loads, and check the rest of the story.

    Args:
        weights: checkpoint name and tensor, any order.
        config: the Hugging Face config.
        with_denoiser: False to leave out the denoiser tower, which may then be absent.

    Raises:
        ValueError: after the last tensor (at the first of wrong shape): what is missing, unknown or misshapen, by name.

    """
    expected = checkpoint_shapes(config)
    needed = {n for n in expected if with_denoiser or n.startswith(CONTEXT_PREFIXES)}
    unknown, seen = [], set()
    for name, tensor in weights:
        if name not in expected:
            unknown.append(name)
            continue
        if name not in needed:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"checkpoint tensor {name} has shape {list(tensor.shape)}, "
                f"but config.json asks for {list(expected[name])}"
            )
        seen.add(name)
        yield name, tensor
    problems = []
    if missing := sorted(needed - seen):
        problems.append(f"{len(missing)} missing: {_shown(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} not part of the model: {_shown(sorted(unknown))}")
    if problems:
        raise ValueError("the checkpoint does not match its config.json; tensors " + "; ".join(problems))


def _shown(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
