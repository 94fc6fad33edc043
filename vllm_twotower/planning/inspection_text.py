"""``vllm-twotower inspect`` for a person: the report of ``inspection.inspect`` as a page of text."""

from collections.abc import Iterable, Sequence

from vllm_twotower.planning.gpus import GIB, GPUS
from vllm_twotower.planning.inspection import Report
from vllm_twotower.planning.placement import Placement

SPEEDS = ("ar", "diffusion")
PRECISION_NAMES = {"bf16": "unquantized", "fp8": "fp8", "stored": "as stored"}


def describe(report: Report) -> str:
    """The whole report.

    Args:
        report: what ``inspection.inspect`` returned.

    """
    sections = (
        _model(report),
        _checkpoint(report["checkpoint"]),
        _towers(report["towers"]),
        _cache(report["cache"]),
        _fits(report),
        _traffic(report["split_traffic"]),
        _speeds(report),
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def _model(report: Report) -> Iterable[str]:
    model = report["model"]
    kinds = ", ".join(f"{count} {name}" for name, count in model["layers_by_kind"].items())
    yield model["config"]
    yield _line("architecture", model["architecture"])
    yield _line("layers per tower", f"{model['layers_per_tower']}: {kinds}")
    yield _line("pattern", model["layer_pattern"])
    if model["experts"]["routed"]:
        yield _line("experts", f"{model['experts']['per_token']} of {model['experts']['routed']} per token")
    yield _line(
        "vocabulary", f"{model['vocab_size']:,}; mask id {model['mask_token_id']} ({model['mask_token_id_from']})"
    )
    yield _line("canvas", f"{report['assumptions']['canvas_length']} tokens (trained at 16; an engine option)")
    yield _line("longest request", f"{model['max_position_embeddings']:,} tokens")


def _checkpoint(checkpoint: Report) -> Iterable[str]:
    yield "CHECKPOINT"
    yield _line("tensors by config", f"{checkpoint['tensors_by_config']:,}")
    for scheme, count in checkpoint["quantized_matrices"].items():
        yield _line("quantised", f"{count:,} matrices in {scheme}")
    if checkpoint["source"] == "config.json":
        yield _line("shards", "none here: sizes below are config.json's own arithmetic")
    else:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in checkpoint["tensors_by_dtype"].items())
        total = sum(checkpoint["bytes_by_headers"].values())
        yield _line("tensors in shards", f"{checkpoint['tensors_by_headers']:,} ({dtypes}), {_gb(total)}")
        agrees = "names and shapes agree with config.json" if checkpoint["agrees"] else "DO NOT AGREE with config.json"
        yield _line("shards", agrees)
    yield from (_line("", difference) for difference in checkpoint["differences"])


def _towers(towers: Report) -> Iterable[str]:
    yield "WEIGHTS (as the engine holds them)"
    precisions = list(next(iter(towers.values()))["resident_bytes"])
    rows = [
        [
            f"{name} tower",
            _count(tower["parameters"]),
            _count(tower["active_parameters_per_token"]),
            *(_gb(tower["resident_bytes"][precision]) for precision in precisions),
        ]
        for name, tower in towers.items()
    ]
    both = [sum(t["resident_bytes"][p] for t in towers.values()) for p in precisions]
    rows.append(["both", _count(sum(t["parameters"] for t in towers.values())), "", *map(_gb, both)])
    yield from _table(["", "parameters", "active per token", *(PRECISION_NAMES[p] for p in precisions)], rows)
    if "fp8" in precisions:
        yield "fp8: both towers' linears and experts; time conditioning, routers, embeddings and heads stay"


def _cache(cache: Report) -> Iterable[str]:
    yield "CACHES"
    yield _line("KV", f"{cache['kv_bytes_per_token']:,} bytes per token")
    ssm, conv = cache["ssm_bytes_per_request"], cache["conv_bytes_per_request"]
    total = cache["mamba_bytes_per_request"]
    yield _line("Mamba states", f"{total / 1e6:.1f} MB per request ({ssm / 1e6:.1f} SSM + {conv / 1e6:.2f} conv)")
    yield _line(
        "together",
        f"{cache['bytes_per_request_in_vllm_blocks'] / 1e6:.1f} MB for a request of {cache['tokens_per_request']:,} "
        f"tokens, in vLLM's blocks of {cache['vllm_block_tokens']:,} tokens",
    )


def _fits(report: Report) -> Iterable[str]:
    tokens, assumed = report["cache"]["tokens_per_request"], report["assumptions"]
    yield f"WHAT FITS: requests of {tokens:,} tokens at once beside the weights (-: the weights do not fit)"
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for row in report["fits"]:
        gpu = GPUS[row["gpu"]]
        line = lines.setdefault(f"{row['num_gpus']} x {gpu.name} ({gpu.marketed_gb} GB)", {})
        line[row["placement"], row["precision"]] = f"{row['requests']:,}" if row["requests"] else "-"
    precisions = list(dict.fromkeys(row["precision"] for row in report["fits"]))
    columns = [(placement, precision) for placement in Placement for precision in precisions]
    rows = [[name, *(line.get(column, "") for column in columns)] for name, line in lines.items()]
    yield from _table(["", *(f"{_name_way(p)}, {_precision(report, q)}" for p, q in columns)], rows)
    yield "AR: the context tower alone; colocated: both towers sharded over all GPUs, which tower_placement=auto means"
    yield "wherever a tower divides; split, as published: half of the GPUs for each tower"
    yield "A step runs one tower: with split the other half of the GPUs waits, which is why auto is colocated"
    yield (
        f"vLLM takes {assumed['gpu_memory_utilization']:.0%} of a GPU's memory; "
        f"{assumed['reserved_bytes'] / GIB:.0f} GiB of it are left for activations, graphs and buffers"
    )


def _speeds(report: Report) -> Iterable[str]:
    assumed = report["assumptions"]
    yield "SPEED, ESTIMATED: tokens/s of all requests, at the memory floor / with the overhead others measured"
    if not report["speeds"]:
        yield "none: no such GPUs hold both towers"
        return
    batches = list(dict.fromkeys(row["requests"] for row in report["speeds"]))
    columns = [(requests, kind) for requests in batches for kind in SPEEDS]
    lines: dict[str, dict[tuple[int, str], str]] = {}
    for row in report["speeds"]:
        line = lines.setdefault(f"{row['num_gpus']} x {row['gpu']}, {_precision(report, row['precision'])}", {})
        for kind in SPEEDS:
            line[row["requests"], kind] = f"{row['floor'][kind]:,.0f} / {row['overhead'][kind]:,.0f}"
    rows = [[name, *(line.get(column, "-") for column in columns)] for name, line in lines.items()]
    yield from _table(["requests at once", *(f"{requests}, {_name_way(kind)}" for requests, kind in columns)], rows)
    yield f"floor: bytes and products counted, at {assumed['passes_per_canvas']} passes per canvas; no GPU was timed"
    yield (
        f"overhead: {assumed['fixed_s_per_forward'] * 1e3:.1f} ms more for each forward, fitted to AR steps of the 30B "
        "backbone on two B200 that others published,"
    )
    yield "and taken to be the same for denoise passes, commits and other GPUs; prompts are not counted"
    yield "more of it: `python -m benchmarks.roofline` in the repository, and its docs/roofline.md"


def _traffic(traffic: Report) -> Iterable[str]:
    back = f"{traffic['bytes_per_denoise_step_back']} B for each denoise step"
    yield "TRAFFIC BETWEEN THE TOWERS when split"
    yield _line("a prompt's token", f"{traffic['kv_bytes_per_token']:,} B to the denoiser, keys and values")
    yield _line("a prompt's end", f"{traffic['state_bytes_per_row']:,} B to the denoiser, Mamba states")
    yield _line(
        "a canvas",
        f"{traffic['bytes_per_canvas']:,} B to the denoiser, tokens and inputs of Mamba layers; back {back}",
    )


def _name_way(name: str) -> str:
    """A placement, or a way to decode."""
    return "AR" if name == "ar" else name


def _precision(report: Report, precision: str) -> str:
    """The model's own dtype, FP8, or what the file has."""
    return str(report["model"]["dtype"]) if precision == "bf16" else PRECISION_NAMES[precision]


def _line(name: str, value: str) -> str:
    return f"  {name:<18}{value}"


def _count(num_parameters: int) -> str:
    return f"{num_parameters / 1e9:.3f} B" if num_parameters >= 1e8 else f"{num_parameters / 1e6:.3f} M"


def _gb(num_bytes: float) -> str:
    if num_bytes < 1e8:
        return f"{num_bytes / 1e6:.2f} MB"
    return f"{num_bytes / 1e9:.1f} GB ({num_bytes / GIB:.1f} GiB)"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()
