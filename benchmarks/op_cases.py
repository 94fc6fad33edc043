"""The ops at the real model's shapes: what ``compile_ops.py`` compiles and ``run.py ops`` times.

Sizes: those of the 30B-A3B model (``docs/model.md#sizes``). 64 requests of one canvas of 16 tokens, the batch size at
which mask diffusion gains most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_twotower.ops.adaln import kernel as adaln_kernel
from vllm_twotower.ops.adaln import reference as adaln_reference
from vllm_twotower.ops.adaln.reference import Modulation
from vllm_twotower.ops.canvas_sample import kernel as canvas_sample_kernel
from vllm_twotower.ops.canvas_sample import reference as canvas_sample_reference
from vllm_twotower.ops.canvas_sample.reference import Draw
from vllm_twotower.ops.gated_norm import kernel as gated_norm_kernel
from vllm_twotower.ops.gated_norm import reference as gated_norm_reference
from vllm_twotower.ops.reveal import kernel as reveal_kernel
from vllm_twotower.ops.reveal import reference as reveal_reference
from vllm_twotower.ops.reveal.reference import CanvasRules, MaskedCanvases
from vllm_twotower.ops.seeded_scan import kernel as seeded_scan_kernel
from vllm_twotower.ops.seeded_scan import reference as seeded_scan_reference
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs
from vllm_twotower.ops.state_replay import kernel as state_replay_kernel
from vllm_twotower.ops.state_replay import reference as state_replay_reference

ROWS, WIDTH = 64, 16
TOKENS = ROWS * WIDTH
VOCAB, MASK = 131_072, 3
HIDDEN, LEVELS, EPS = 2688, WIDTH * (WIDTH + 3) // 2, 1e-5
DTYPE = torch.bfloat16
HEADS, HEAD_DIM, GROUPS, STATE, TAPS = 64, 64, 8, 128, 4
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE
REPLAYED = 8
"""Tokens that count of a verified canvas, 1 to so many."""


@dataclass(frozen=True)
class Case:
    """One op over one set of shapes."""

    name: str
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[str], tuple[Any, ...]]
    """Device -> arguments of both."""
    floor_bytes: int
    """What any implementation has to read and write once."""

    def run_kernel(self, device: str) -> Any:
        """Run the kernel once."""
        return self.kernel(*self.inputs(device))


def _indices(size: int, high: int, device: str) -> torch.Tensor:
    return torch.randint(high, (size,), device=device)


def _logits(random: bool, rows: int) -> Callable[[str], tuple[Any, ...]]:
    def inputs(device: str) -> tuple[Any, ...]:
        draw = None
        if random:
            keys = (_indices(rows, high, device) for high in (2**62, 2**17, 16))
            draw = Draw(torch.full((rows,), 0.1, device=device), *keys)
        return torch.randn(rows, VOCAB, device=device, dtype=DTYPE), MASK, draw

    return inputs


def _canvas_sample_cases() -> list[Case]:
    return [
        Case(
            f"canvas_sample {kind} N{rows}",
            canvas_sample_kernel.canvas_sample,
            canvas_sample_reference.canvas_sample,
            _logits(kind == "random", rows),
            rows * VOCAB * DTYPE.itemsize + rows * 16,
        )
        for rows in (WIDTH, TOKENS)
        for kind in ("greedy", "random")
    ]


def _canvases(device: str) -> tuple[Any, ...]:
    rules = CanvasRules(
        torch.full((ROWS,), WIDTH, device=device),
        torch.full((ROWS,), 0.8, device=device),
        torch.full((ROWS,), 16, device=device),
    )
    none_R = torch.zeros(ROWS, dtype=torch.int64, device=device)
    before = MaskedCanvases(
        token_RS=torch.full((ROWS, WIDTH), MASK, device=device),
        masked_RS=torch.rand(ROWS, WIDTH, device=device) < 0.6,
        level_R=none_R,
        pass_index_R=none_R,
    )
    proposal_RS = _indices(TOKENS, VOCAB, device).view(ROWS, WIDTH)
    return before, proposal_RS, torch.rand(ROWS, WIDTH, device=device), rules


def _reveal_cases() -> list[Case]:
    per_position, per_row = 8 + 8 + 4 + 1 + 8 + 1, 8 + 8 + 4 + 8 + 3 * 8
    return [
        Case(
            f"reveal R{ROWS}",
            reveal_kernel.reveal,
            reveal_reference.reveal,
            _canvases,
            TOKENS * per_position + ROWS * per_row,
        )
    ]


def _modulation(device: str) -> Modulation:
    return Modulation(
        torch.randn(LEVELS, 3, HIDDEN, device=device, dtype=DTYPE),
        torch.randn(3, HIDDEN, device=device, dtype=DTYPE),
        _indices(ROWS, LEVELS, device),
        torch.arange(TOKENS, device=device) // WIDTH,
    )


def _hidden(device: str) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, device=device, dtype=DTYPE)


def _adaln_cases() -> list[Case]:
    vector = HIDDEN * DTYPE.itemsize
    # each row's own vectors of the shared table, and the layer's, once
    normed = lambda device: (_hidden(device), torch.randn(HIDDEN, device=device, dtype=DTYPE), EPS, _modulation(device))
    gated = lambda device: (_hidden(device), _hidden(device), _modulation(device))
    inputs = {"modulate_norm": normed, "norm_modulate": normed, "gate_add": gated}
    floors = {"modulate_norm": 2, "norm_modulate": 2, "gate_add": 3}
    vectors = {"modulate_norm": 2 * ROWS + 3, "norm_modulate": 2 * ROWS + 3, "gate_add": ROWS + 1}
    return [
        Case(
            f"{name} T{TOKENS}",
            getattr(adaln_kernel, name),
            getattr(adaln_reference, name),
            inputs[name],
            (TOKENS * floors[name] + vectors[name]) * vector,
        )
        for name in inputs
    ]


def _gated_norm_cases() -> list[Case]:
    inner = HEADS * HEAD_DIM

    def inputs(device: str) -> tuple[Any, ...]:
        projected = torch.randn(TOKENS, inner + CHANNELS + HEADS, device=device, dtype=DTYPE)  # the gate: read in place
        scanned = torch.randn(TOKENS, inner, device=device, dtype=DTYPE)
        return scanned, projected[:, :inner], torch.randn(inner, device=device, dtype=DTYPE), EPS, GROUPS

    return [
        Case(
            f"gated_norm T{TOKENS}",
            gated_norm_kernel.gated_norm,
            gated_norm_reference.gated_norm,
            inputs,
            (3 * TOKENS + 1) * inner * DTYPE.itemsize,
        )
    ]


def _conv_inputs(device: str) -> tuple[Any, ...]:
    randn = lambda *size: torch.randn(*size, device=device, dtype=DTYPE)
    projected = randn(ROWS, WIDTH, HEADS * HEAD_DIM + CHANNELS + HEADS)  # gate, channels, step sizes: read in place
    x = projected[..., HEADS * HEAD_DIM : HEADS * HEAD_DIM + CHANNELS]
    inputs = ConvInputs(
        x_RSC=x,
        weight_CK=randn(CHANNELS, TAPS),
        bias_C=randn(CHANNELS),
        cache_ZKC=randn(2 * ROWS, TAPS - 1, CHANNELS),
        slot_R=torch.randperm(2 * ROWS, device=device)[:ROWS],
    )
    return (inputs,)


def _scan_inputs(width: int, device: str) -> tuple[Any, ...]:
    randn = lambda *size, dtype=DTYPE: torch.randn(*size, device=device, dtype=dtype)
    channels = randn(ROWS, width, CHANNELS)
    x, b, c = channels.split([HEADS * HEAD_DIM, GROUPS * STATE, GROUPS * STATE], dim=-1)
    inputs = ScanInputs(
        x_RSHP=x.unflatten(-1, (HEADS, HEAD_DIM)),
        dt_RSH=randn(ROWS, width, HEADS),
        a_H=-torch.rand(HEADS, device=device),
        b_RSGN=b.unflatten(-1, (GROUPS, STATE)),
        c_RSGN=c.unflatten(-1, (GROUPS, STATE)),
        skip_H=randn(HEADS),
        dt_bias_H=randn(HEADS),
        state_ZHPN=randn(2 * ROWS, HEADS, HEAD_DIM, STATE, dtype=torch.float32),
        slot_R=torch.randperm(2 * ROWS, device=device)[:ROWS],
    )
    return inputs, DTYPE


def _scan_cases() -> list[Case]:
    size, states = DTYPE.itemsize, ROWS * HEADS * HEAD_DIM * STATE * torch.float32.itemsize
    convolved = ROWS * CHANNELS * (2 * WIDTH + TAPS - 1) + CHANNELS * (TAPS + 1)
    scanned = ROWS * (CHANNELS + HEADS + HEADS * HEAD_DIM)  # per position
    return [
        Case(
            f"seeded_conv R{ROWS}",
            seeded_scan_kernel.seeded_conv,
            seeded_scan_reference.seeded_conv,
            _conv_inputs,
            convolved * size,
        ),
        *(
            Case(
                f"seeded_scan R{ROWS} W{width}",
                seeded_scan_kernel.seeded_scan,
                seeded_scan_reference.seeded_scan,
                partial(_scan_inputs, width),
                states + width * scanned * size,
            )
            for width in (WIDTH, 2 * WIDTH)
        ),
    ]


def _replay_inputs(width: int, device: str) -> tuple[Any, ...]:
    inputs, _ = _scan_inputs(width, device)
    raw = torch.randn(ROWS, width, CHANNELS, device=device, dtype=DTYPE)
    window = torch.randn(2 * ROWS, TAPS - 1, CHANNELS, device=device, dtype=DTYPE)
    return inputs, raw, window, torch.arange(ROWS, device=device) % REPLAYED + 1


def _replay_cases() -> list[Case]:
    def written_by(replay: Callable[..., Any]) -> Callable[..., Any]:
        def run(inputs: ScanInputs, raw: torch.Tensor, window: torch.Tensor, num_tokens: torch.Tensor) -> Any:
            replay(inputs, raw_RSC=raw, conv_cache_ZKC=window, num_tokens_R=num_tokens)
            return inputs.state_ZHPN, window

        return run

    states = 2 * HEADS * HEAD_DIM * STATE * torch.float32.itemsize
    fed = HEADS * HEAD_DIM + GROUPS * STATE + HEADS  # per token that counts
    windows = (TAPS - 1) * CHANNELS * 2
    return [
        Case(
            f"state_replay R{ROWS} W{width}",
            written_by(state_replay_kernel.state_replay),
            written_by(state_replay_reference.state_replay),
            partial(_replay_inputs, width),
            ROWS * (states + (fed * (REPLAYED + 1) // 2 + windows) * DTYPE.itemsize),
        )
        for width in (WIDTH, 2 * WIDTH)
    ]


CASES = [
    *_canvas_sample_cases(),
    *_reveal_cases(),
    *_adaln_cases(),
    *_gated_norm_cases(),
    *_scan_cases(),
    *_replay_cases(),
]
