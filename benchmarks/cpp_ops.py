"""The ops in C++ beside their references, fp32 at the demo model's shapes: ``python -m benchmarks.run cpp``.

Both in one run, on the same inputs and threads, fastest of many calls (the machines this runs on are shared).
What the C++ is for is in ``csrc/README.md``.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.cpu.ops import adaln as adaln_cpp
from vllm_twotower.cpu.ops import canvas_sample as sample_cpp
from vllm_twotower.cpu.ops import gated_norm as norm_cpp
from vllm_twotower.cpu.ops import mixture_of_experts as experts_cpp
from vllm_twotower.cpu.ops import seeded_scan as scan_cpp
from vllm_twotower.ops.adaln import reference as adaln_reference
from vllm_twotower.ops.adaln.reference import Modulation
from vllm_twotower.ops.canvas_sample import reference as sample_reference
from vllm_twotower.ops.gated_norm import reference as norm_reference
from vllm_twotower.ops.mixture_of_experts import reference as experts_reference
from vllm_twotower.ops.mixture_of_experts.reference import Routing
from vllm_twotower.ops.seeded_scan import reference as scan_reference
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs

WIDTH, LEVELS = 16, 152
TESTS = [
    f"tests/test_op_{op}.py" for op in ("adaln", "canvas_sample", "gated_norm", "mixture_of_experts", "seeded_scan")
]


def cases(rows: int) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """Name, function in C++, reference, arguments."""
    c = json.loads((DEMO_MODEL / "config.json").read_text())
    tokens, hidden = rows * WIDTH, c["hidden_size"]
    heads, head_dim, groups, state = (c[k] for k in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"))
    channels = heads * head_dim + 2 * groups * state
    x, weight, slots = torch.randn(tokens, hidden), torch.randn(hidden), torch.arange(rows)
    row = slots.repeat_interleave(WIDTH)
    modulation = Modulation(torch.randn(LEVELS, 3, hidden), torch.randn(3, hidden), slots % LEVELS, row)
    yield "modulate_norm", adaln_cpp.modulate_norm, adaln_reference.modulate_norm, (x, weight, 1e-5, modulation)
    yield "gate_add", adaln_cpp.gate_add, adaln_reference.gate_add, (x, torch.randn_like(x), modulation)
    y = torch.randn(tokens, heads * head_dim)
    yield "gated_norm", norm_cpp.gated_norm, norm_reference.gated_norm, (y, torch.randn_like(y), y[0], 1e-5, groups)
    conv = ConvInputs(
        x_RSC=torch.randn(rows, WIDTH, channels),
        weight_CK=torch.randn(channels, 4),
        bias_C=torch.randn(channels),
        cache_ZKC=torch.randn(rows, 3, channels),
        slot_R=slots,
    )
    yield "seeded_conv", scan_cpp.seeded_conv, scan_reference.seeded_conv, (conv,)
    scan = ScanInputs(
        x_RSHP=torch.randn(rows, WIDTH, heads, head_dim),
        dt_RSH=torch.randn(rows, WIDTH, heads),
        a_H=-torch.rand(heads),
        b_RSGN=torch.randn(rows, WIDTH, groups, state),
        c_RSGN=torch.randn(rows, WIDTH, groups, state),
        skip_H=torch.randn(heads),
        dt_bias_H=torch.randn(heads),
        state_ZHPN=torch.randn(rows, heads, head_dim, state),
        slot_R=slots,
    )
    yield "seeded_scan", scan_cpp.seeded_scan, scan_reference.seeded_scan, (scan,)
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    routing = Routing(torch.randn(experts, hidden), torch.zeros(experts), c["num_experts_per_tok"], True, 1.0)
    mixture = (x, routing, torch.randn(experts, hidden, width), torch.randn(experts, width, hidden))
    yield (
        "mixture_of_experts",
        experts_cpp.mixture_of_experts,
        experts_reference.mixture_of_experts,
        mixture,
    )
    logits = (torch.randn(tokens, c["vocab_size"]), 3)
    yield "canvas_sample, greedy", sample_cpp.canvas_sample, sample_reference.canvas_sample, logits


def microseconds(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float = 0.5) -> float:
    """Of the fastest call."""
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        function(*arguments)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest * 1e6


def measure() -> list[dict[str, Any]]:
    """One row per op and number of canvases."""
    torch.manual_seed(0)
    rows = []
    for num_canvases in (1, 8):
        for name, cpp, reference, arguments in cases(num_canvases):
            fast, plain = microseconds(cpp, arguments), microseconds(reference, arguments)
            rows.append(
                {
                    "op": name,
                    "canvases": num_canvases,
                    "cpp_us": round(fast, 1),
                    "reference_us": round(plain, 1),
                    "ratio": round(plain / fast, 1),
                }
            )
    return rows
