"""What a two-tower checkpoint needs, computed from its ``config.json`` alone: tensors, bytes, cache sizes."""

import json
import math
import pathlib
from types import SimpleNamespace
from typing import Any

from vllm_twotower.models.weights import CONTEXT_PREFIXES, checkpoint_shapes

BYTES_BF16 = 2
BYTES_FP32 = 4


def read_config(path: str) -> Any:
    """Read a ``config.json``, or the one in a checkpoint folder; Python's JSON accepts the bare Infinity some copies
    carry.

    Raises:
        ValueError: no such file, or not a two-tower config.

    """
    file = pathlib.Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file} does not exist: name a checkpoint folder or a config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    if "hybrid_override_pattern" not in config:
        raise ValueError(f"{file} has no hybrid_override_pattern: it is not a Nemotron-H or two-tower config")
    return SimpleNamespace(**config)


def describe(config: Any) -> str:
    """A few lines for a person."""
    shapes = checkpoint_shapes(config)
    context = sum(math.prod(s) for n, s in shapes.items() if n.startswith(CONTEXT_PREFIXES))
    total = sum(math.prod(s) for s in shapes.values())
    pattern = config.hybrid_override_pattern
    kinds = {"M": "Mamba-2", "*": "attention", "E": "mixture of experts", "-": "dense MLP"}
    layers = ", ".join(f"{pattern.count(letter)} {name}" for letter, name in kinds.items() if letter in pattern)
    kv_bytes = pattern.count("*") * 2 * config.num_key_value_heads * config.head_dim * BYTES_BF16
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size * BYTES_FP32
    channels = config.mamba_num_heads * config.mamba_head_dim + 2 * config.n_groups * config.ssm_state_size
    conv = channels * (config.conv_kernel - 1) * BYTES_BF16
    state = pattern.count("M") * (ssm + conv)
    return "\n".join(
        [
            f"layers per tower      {len(pattern)}: {layers}",
            f"tensors               {len(shapes):,}",
            f"context tower         {_amount(context)}",
            f"denoiser tower        {_amount(total - context)}",
            f"both                  {_amount(total)}",
            f"KV cache              {kv_bytes:,} bytes per token (bf16)",
            f"Mamba state           {state / 1e6:.1f} MB per running request (fp32 SSM, bf16 conv)",
        ]
    )


def _amount(num_parameters: int) -> str:
    num_bytes = num_parameters * BYTES_BF16
    return f"{num_parameters / 1e9:.3f} B parameters, {num_bytes / 1e9:.1f} GB ({num_bytes / 2**30:.1f} GiB) in bf16"
