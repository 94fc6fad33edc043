"""Every op at sizes the real model does not have: what ``compile_ops.py --odd`` compiles.

One-wide canvases (mock-AR, the edge of ``max_model_len``), one head, sizes that are no power of two, every dtype, both
layouts of vLLM's convolution cache. Triton compiles another kernel for a size of 1 and one for sizes that 16 does not
divide.
"""

import torch

from vllm_twotower.ops.adaln import kernel as adaln
from vllm_twotower.ops.adaln.reference import Modulation
from vllm_twotower.ops.canvas_sample import kernel as canvas_sample
from vllm_twotower.ops.canvas_sample.reference import Draw
from vllm_twotower.ops.gated_norm import kernel as gated_norm
from vllm_twotower.ops.reveal import kernel as reveal
from vllm_twotower.ops.reveal.reference import CanvasRules, MaskedCanvases
from vllm_twotower.ops.seeded_scan import kernel as seeded_scan
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs
from vllm_twotower.ops.state_replay import kernel as state_replay


def _floats(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def _indices(*sizes: int) -> torch.Tensor:
    return _floats(*sizes, dtype=torch.int64)


def sample(dtype: torch.dtype) -> None:
    for vocab in (4, 512, 131_072):
        canvas_sample.canvas_sample(_floats(2, vocab, dtype=dtype), 1)
        draw = Draw(_floats(2), *(_indices(2) for _ in range(3)))
        canvas_sample.canvas_sample(_floats(2, vocab, dtype=dtype), 3, draw)


def modulate(dtype: torch.dtype) -> None:
    for hidden, tokens in ((1, 1), (64, 7), (2688, 1)):
        vectors = (_floats(5, 3, hidden, dtype=dtype), _floats(3, hidden, dtype=dtype))
        modulation = Modulation(*vectors, _indices(3), _indices(tokens))
        x = _floats(tokens, hidden, dtype=dtype)
        adaln.modulate_norm(x, _floats(hidden), 1e-5, modulation)
        adaln.norm_modulate(x, _floats(hidden, dtype=dtype), 1e-5, modulation)
        adaln.gate_add(x, x, modulation)
        gated_norm.gated_norm(x, x, _floats(hidden), 1e-5, 1)


def scan(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    for width in (1, 7, 32):
        for heads, head_dim, groups, state in ((1, 5, 1, 3), (4, 32, 2, 32), (8, 64, 8, 128)):
            projection = _floats(1, width, groups, state, dtype=dtype)
            inputs = ScanInputs(
                x_RSHP=_floats(1, width, heads, head_dim, dtype=dtype),
                dt_RSH=_floats(1, width, heads, dtype=dtype),
                a_H=_floats(heads),
                b_RSGN=projection,
                c_RSGN=projection,
                skip_H=_floats(heads, dtype=dtype),
                dt_bias_H=_floats(heads, dtype=dtype),
                state_ZHPN=_floats(3, heads, head_dim, state, dtype=state_dtype),
                slot_R=_indices(1),
            )
            seeded_scan.seeded_scan(inputs, dtype)
            for cache in (_floats(3, 3, 6, dtype=dtype), _floats(3, 256, 3, dtype=dtype).transpose(1, 2)):
                raw = _floats(1, width, cache.shape[2], dtype=dtype)
                state_replay.state_replay(inputs, raw_RSC=raw, conv_cache_ZKC=cache, num_tokens_R=_indices(1))


def convolve(dtype: torch.dtype) -> None:
    for width in (1, 7, 32):
        for channels in (6, 256):
            channels_last = _floats(3, 3, channels, dtype=dtype)
            channels_first = _floats(3, channels, 3, dtype=dtype).transpose(1, 2)
            for cache, bias in ((channels_last, None), (channels_first, _floats(channels, dtype=dtype))):
                inputs = ConvInputs(
                    x_RSC=_floats(1, width, channels, dtype=dtype),
                    weight_CK=_floats(channels, 4, dtype=dtype),
                    bias_C=bias,
                    cache_ZKC=cache,
                    slot_R=_indices(1),
                )
                seeded_scan.seeded_conv(inputs)


def reveal_canvases() -> None:
    for width in (1, 5, 32):
        canvas, row = _indices(3, width), _indices(3)
        rules = CanvasRules(row, _floats(3), row)
        masked = _floats(3, width, dtype=torch.bool)
        before = MaskedCanvases(token_RS=canvas, masked_RS=masked, level_R=row, pass_index_R=row)
        reveal.reveal(before, canvas, _floats(3, width), rules)


def run_all() -> None:
    """Launch everything; to be called while launches are recorded."""
    for dtype, state_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        sample(dtype)
        modulate(dtype)
        scan(dtype, state_dtype)
        convolve(dtype)
    sample(torch.float16)
    scan(torch.float16, torch.bfloat16)
    reveal_canvases()
