"""A checkpoint's tensors, as released (``docs/model.md``) or quantised (``docs/quantization.md``): names, shapes and
dtypes, from ``config.json`` alone.

Imports neither torch nor vLLM, so that ``vllm-twotower inspect`` can count a checkpoint before anything is loaded.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from vllm_twotower.core import TIMESTEP_FEATURES
from vllm_twotower.models.stored_quantization import EXPERT, QKV, WHERE, StoredQuantization
from vllm_twotower.models.stored_schemes import TensorSpec

CONTEXT_PREFIXES = ("context_tower.", "context_lm_head.")
"""What the names of the context tower's tensors begin with; all others are the denoiser's."""


MATRIX_END = "_proj.weight"
"""What the names of the matrices end with that can be stored quantised: linear layers and experts."""


def checkpoint_tensors(config: Any) -> dict[str, TensorSpec]:
    """Every tensor of a two-tower checkpoint and what it has to be, by the config's ``quantization_config`` if any.

    Args:
        config: as for ``checkpoint_shapes``.

    Raises:
        ValueError: a quantisation that does not load here, or that is not the same for what is one layer of vLLM's.

    """
    quantization = StoredQuantization.read(getattr(config, "quantization_config", None))
    specs: dict[str, TensorSpec] = {}
    first_of_layer: dict[str, tuple[str, str]] = {}
    for name, shape in checkpoint_shapes(config).items():
        module = name.removesuffix(".weight")
        scheme = quantization.scheme_of(module) if quantization and name.endswith(MATRIX_END) else None
        if quantization is not None and (layer := _shared_layer(module)) is not None:
            how = scheme.name if scheme is not None else "not quantised"
            other, found = first_of_layer.setdefault(layer, (module, how))
            if found != how:
                raise ValueError(
                    f"{WHERE}: {other} is {found} and {module} is {how}, but {layer} is one "
                    "layer: quantise or ignore all of it"
                )
        specs.update({name: TensorSpec(shape)} if scheme is None else scheme.tensors(module, shape))
    return specs


def _shared_layer(module: str) -> str | None:
    """The layer that a matrix is only a part of, or None."""
    if experts := EXPERT.match(module):
        return experts[1]
    return QKV.sub(".qkv_proj", module) if QKV.search(module) else None


def checkpoint_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a two-tower checkpoint as released, and its shape.

    Args:
        config: the Hugging Face config (any object with the fields of the released ``config.json``).

    """
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "context_lm_head.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "t_embedder.mlp.0.weight": (hidden, TIMESTEP_FEATURES),
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


def check_tensor(name: str, shape: Sequence[int], dtype: str, expected: Mapping[str, TensorSpec]) -> None:
    """Check one tensor of ``checkpoint_tensors``, ``expected``; ``dtype`` is safetensors' name.

    Raises:
        ValueError: it has another shape, or numbers that are no weights.

    """
    spec = expected[name]
    if not spec.fits(tuple(shape)):
        scheme = f" ({spec.scheme})" if spec.scheme else ""
        raise ValueError(
            f"checkpoint tensor {name} has shape {list(shape)}, but config.json asks for {list(spec.shape)}{scheme}"
        )
    if dtype not in spec.dtypes:
        why = "weights have to be floating point, unless quantization_config in config.json says how they are quantised"
        if spec.scheme:
            why = f"{spec.scheme} asks for {' or '.join(spec.dtypes)}"
        raise ValueError(f"checkpoint tensor {name} holds {dtype}: {why}")


def check_scales(names: Collection[str], expected: Mapping[str, TensorSpec]) -> None:
    """Check that of a quantised matrix either everything is there or nothing.

    Args:
        names: the tensors that there are.
        expected: what there should be.

    Raises:
        ValueError: a matrix without its scale, or the other way round, by name.

    """
    present = {name.rpartition(".")[0] for name in names if name in expected}
    missing = [n for n, spec in expected.items() if spec.scheme and n not in names and n.rpartition(".")[0] in present]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {list_names(sorted(missing))}, which {expected[missing[0]].scheme} needs beside the "
            "tensors that it has: quantise it again, or correct quantization_config in config.json"
        )


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
