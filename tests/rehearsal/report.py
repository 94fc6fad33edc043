"""What the rehearsal found, as text that can be compared: one file of decisions, one of steps."""

import collections
from typing import Any

from tests.rehearsal.device import Record
from tests.rehearsal.engine import find_model, find_runner
from tests.rehearsal.passes import RehearsedStep, Watch


def describe_start(core: Any, config: Any) -> dict[str, Any]:
    """What start-up has decided."""
    from vllm_twotower.models.kernel_names import describe_kernels
    from vllm_twotower.runtime.denoise_graphs import find_uncapturable, list_row_counts

    runner, model = find_runner(core.model_executor), find_model(core.model_executor)
    cache, scheduler, compilation = config.cache_config, config.scheduler_config, config.compilation_config
    attention = [layer.mixer.attn for layer in model.model.layers if hasattr(layer.mixer, "attn")]
    groups = collections.Counter(
        f"{type(group.kv_cache_spec).__name__} of {len(group.layer_names)}, {group.kv_cache_spec.block_size} tokens"
        for group in runner.kv_cache_config.kv_cache_groups
    )
    found: dict[str, Any] = {
        "model runner": f"{type(runner).__module__}.{type(runner).__name__}".removeprefix("vllm.v1.worker."),
        "model state": type(runner.model_state).__name__,
        "async scheduling": scheduler.async_scheduling,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": config.model_config.max_model_len,
        "attention": attention[0].attn_backend.get_name(),
        "FlashAttention": getattr(attention[0].impl, "vllm_flash_attn_version", None),
        "cache groups": dict(sorted(groups.items())),
        "mamba cache": f"{cache.mamba_cache_mode}, {cache.mamba_block_size} tokens a block",
        "cache layout": str(cache.kv_cache_layout) if hasattr(cache, "kv_cache_layout") else None,
        "graphs of the context tower": compilation.cudagraph_mode.name,
        "graphs of denoise passes": list_row_counts(config, model.options.canvas_length)
        if model.denoiser is not None and not find_uncapturable(runner.attn_groups)
        else "none",
    }
    for tower, layers in (("context", model.model.layers), ("denoiser", getattr(model.denoiser, "layers", []))):
        found |= {f"{tower} {name}": value for name, value in describe_layers(layers).items()}
    if model.denoiser is not None:
        found["start-up says"] = describe_kernels(model.denoiser, model.model.layers)
    mamba = next(layer.mixer for layer in model.model.layers if hasattr(layer.mixer, "ssm_state_size"))
    found["Mamba caches"] = [f"{tuple(x.shape[1:])} {str(x.dtype).removeprefix('torch.')}" for x in mamba.kv_cache[:2]]
    return found


def describe_layers(layers: Any) -> dict[str, str]:
    """The kernels of a tower's experts and linear layers."""
    found = {}
    for module in (m for layer in layers if layer is not None for m in layer.modules()):
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        kernel = getattr(method, "moe_kernel", None) or getattr(module, "moe_kernel", None)
        if hasattr(method, "moe_kernel") or "MoE" in type(method).__name__:
            experts = getattr(kernel, "fused_experts", None)
            found["experts"] = f"{type(method).__name__}, {type(experts).__name__ if experts is not None else None}"
        else:
            found["linear layers"] = type(method).__name__
    return found


def describe_step(step: RehearsedStep, watch: Watch) -> dict[str, Any]:
    """Launches per layer kind, transfers, and what should not be."""
    return {
        "tower": step.kind,
        "launches": count_launches(step.record, watch.num_layers),
        "transfers": count_transfers(step.record),
        "off the device": sorted({f"{x.name} {o}" for x in step.record.launches for o in x.off_device}),
        "dtypes": dict(sorted(step.dtypes.items())),
    }


def count_launches(record: Record, num_layers: dict[str, int]) -> dict[str, dict[str, float]]:
    """Launches by scope and kernel; of layers, per layer."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for launch in record.launches:
        counts[launch.scope or "outside layers"][f"{launch.source} {launch.name}"] += 1
    return {
        scope: {name: shorten(n / num_layers.get(scope, 1)) for name, n in sorted(counts[scope].items())}
        for scope in sorted(counts)
    }


def shorten(number: float) -> float:
    """A whole number where it is one."""
    return int(number) if number == int(number) else round(number, 2)


def count_transfers(record: Record) -> dict[str, int]:
    """Transfers by direction, whether the host waits for them, and the line."""
    counts: collections.Counter[str] = collections.Counter()
    for transfer in record.transfers:
        direction = "to" if transfer.to_device else "from"
        wait = "the host waits" if transfer.blocking else "not waited for"
        counts[f"{direction} the device, {wait}: {transfer.where}"] += 1
    return dict(sorted(counts.items()))
