"""The released checkpoint's tensors: their names and shapes, from ``config.json`` alone (``docs/model.md``).

Imports neither torch nor vLLM, so that ``vllm-twotower inspect`` can count a checkpoint before anything is loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CONTEXT_PREFIXES = ("context_tower.", "context_lm_head.")
"""What the names of the context tower's tensors begin with; all others are the denoiser's."""


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


def check_tensor(
    name: str, shape: Sequence[int], dtype: Any, is_float: bool, expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Check one tensor of ``checkpoint_shapes``.

    Raises:
        ValueError: it has another shape, or numbers that are no weights.

    """
    if tuple(shape) != expected[name]:
        raise ValueError(
            f"checkpoint tensor {name} has shape {list(shape)}, but config.json asks for {list(expected[name])}"
        )
    if not is_float:
        raise ValueError(f"checkpoint tensor {name} holds {dtype}: weights have to be floating point")


def list_names(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, for a message."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


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
        kv_heads = config.num_key_value_heads
        for name, heads in (("q", config.num_attention_heads), ("k", kv_heads), ("v", kv_heads)):
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
