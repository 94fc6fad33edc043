"""What start-up refuses with our architecture, a rule each: the setting, why, and what to type instead.

``docs/configuration.md`` prints the same table.
"""

import functools
import importlib.util
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_twotower.config import EngineOptions, find_indivisible
from vllm_twotower.core import is_triton_interpreted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SCHEDULER_CLASS = "vllm_twotower.runtime.scheduler.BlockCommitScheduler"
WORKER_EXTENSION_CLASS = "vllm_twotower.runtime.worker_extension.DiffusionWorkerExtension"


@dataclass(frozen=True)
class StartupRule:
    """One thing that cannot be combined with diffusion."""

    refuses: str
    """The setting, as a user knows it."""
    because: str
    found: "Callable[[VllmConfig, EngineOptions], str | None]"
    """(vllm_config, options) -> the setting and its value where it is given, else None."""
    instead: str = "leave it out"
    """What to do; ``{canvas_length}`` and ``{canvas_length_plus_1}`` stand for the engine's."""

    def problem(self, vllm_config: "VllmConfig", options: EngineOptions) -> str | None:
        """What is wrong and what to type instead, or None."""
        if (found := self.found(vllm_config, options)) is None:
            return None
        canvas = options.canvas_length
        return f"{found}: {self.because}; {self.instead}".format(canvas_length=canvas, canvas_length_plus_1=canvas + 1)


def check_settings(vllm_config: "VllmConfig", options: EngineOptions | None) -> None:
    """Raise for the first rule that objects; with diffusion off, only for what a CPU lacks.

    Raises:
        ValueError: names the setting, its value and what to type instead.

    """
    problem = _find_missing_on_cpu()
    if problem is None and options is not None:
        problem = next(filter(None, (rule.problem(vllm_config, options) for rule in STARTUP_RULES)), None)
    problem = problem or _find_refused_on_cpu(vllm_config)
    if problem is not None:
        raise ValueError(f"Nemotron-Labs-TwoTower: {problem}")


def _find_missing_on_cpu() -> str | None:
    """What a CPU lacks for this model, or None. Without an active Triton driver vLLM silently takes its deprecated
    runner (V1), which knows no model states; Triton decides at import whether kernels are interpreted."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    if not is_triton_interpreted():
        return (
            "this model needs Triton's interpreter on a CPU: set TRITON_INTERPRET=1 before Python starts, for example "
            "`TRITON_INTERPRET=1 vllm serve MODEL` (the vllm-twotower command and the Makefile set it themselves)"
        )
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'vllm-twotower[cpu]'"
    return None


def _find_refused_on_cpu(c: "VllmConfig") -> str | None:
    """What a CPU refuses whether diffusion is on or not, or None."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    if c.speculative_config is not None:
        return "speculative_config is set: with it vLLM's Mamba layers are wrong on a CPU; leave it out"
    config = c.model_config.hf_config
    groups = [config.n_group, config.topk_group]
    if "E" in config.hybrid_override_pattern and groups != [1, 1]:
        return f"n_group={groups[0]}, topk_group={groups[1]}: a two-tower model has one group of experts; set both to 1"
    return None


def _find(
    *paths: str, refused: Callable[[Any], bool], text: str = "{}={}"
) -> "Callable[[VllmConfig, EngineOptions], str | None]":
    """Finds the first of these settings that is refused."""

    def find(c: "VllmConfig", _: EngineOptions) -> str | None:
        for path in paths:
            if refused(value := operator.attrgetter(path)(c)):
                return text.format(path.rpartition(".")[2], value)
        return None

    return find


_given = functools.partial(_find, refused=bool, text="{} is set")
_above_one = functools.partial(_find, refused=lambda value: (value or 1) > 1)


def _equals(path: str, refused: str) -> "Callable[[VllmConfig, EngineOptions], str | None]":
    return _find(path, refused=lambda value: value == refused)


def _other_class(path: str, ours: str) -> "Callable[[VllmConfig, EngineOptions], str | None]":
    return _find(path, refused=lambda value: value not in (None, "", ours))


def _data_parallel_experts(c: "VllmConfig", _: EngineOptions) -> str | None:
    from vllm.platforms import current_platform

    size = c.parallel_config.data_parallel_size
    if size == 1 or "E" not in c.model_config.hf_config.hybrid_override_pattern:
        return None
    exchanging = c.parallel_config.enable_expert_parallel or not current_platform.is_cpu()
    return f"data_parallel_size={size}" if exchanging else None


def _breakable_graphs(c: "VllmConfig", _: EngineOptions) -> str | None:
    import vllm.envs as envs

    on = envs.VLLM_USE_BREAKABLE_CUDAGRAPH
    return "VLLM_USE_BREAKABLE_CUDAGRAPH is on (VLLM_BATCH_INVARIANT turns it on too)" if on else None


def _fp8_queries(c: "VllmConfig", _: EngineOptions) -> str | None:
    """FlashInfer's own kernels for attention that is not causal, where vLLM gives them FP8 queries and they take none:
    on Blackwell, where its causal attention runs on other kernels."""
    from vllm.platforms import current_platform

    attention, dtype = c.attention_config, c.cache_config.cache_dtype
    given = attention.backend_per_kind.get("full_attention", attention.backend)
    # FlashAttention has no E5M2: vLLM goes on to FlashInfer by itself
    backend = given.name if given is not None else "FLASHINFER" if dtype == "fp8_e5m2" else ""
    if backend != "FLASHINFER" or dtype not in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        return None
    if attention.disable_flashinfer_q_quantization or not current_platform.is_device_capability_family(100):
        return None
    return f"kv_cache_dtype={dtype} with attention backend {backend}"


def _step_budget(c: "VllmConfig", options: EngineOptions) -> str | None:
    s = c.scheduler_config
    budget = min(s.max_num_batched_tokens, getattr(s, "max_num_scheduled_tokens", None) or s.max_num_batched_tokens)
    return f"max_num_batched_tokens={budget}" if budget < options.canvas_length else None


def _long_prefill_threshold(c: "VllmConfig", options: EngineOptions) -> str | None:
    threshold = c.scheduler_config.long_prefill_token_threshold
    return f"long_prefill_token_threshold={threshold}" if 0 < threshold < options.canvas_length else None


def _model_length(c: "VllmConfig", options: EngineOptions) -> str | None:
    length = c.model_config.max_model_len
    return f"max_model_len={length}" if length <= options.canvas_length else None


def _is_split(c: "VllmConfig", options: EngineOptions) -> bool:
    return options.is_split(c.parallel_config.tensor_parallel_size, c.model_config.hf_config)


def _indivisible(c: "VllmConfig", options: EngineOptions) -> str | None:
    size = c.parallel_config.tensor_parallel_size
    problem = find_indivisible(c.model_config.hf_config, size // 2 if _is_split(c, options) else size)
    return f"tensor_parallel_size={size} ({problem})" if problem is not None else None


def _uneven_split(c: "VllmConfig", options: EngineOptions) -> str | None:
    size = c.parallel_config.tensor_parallel_size
    uneven = _is_split(c, options) and size % 2
    return f"tensor_parallel_size={size} with tower_placement={options.tower_placement}" if uneven else None


def _split_replicas(c: "VllmConfig", options: EngineOptions) -> str | None:
    size, experts = c.parallel_config.data_parallel_size, c.parallel_config.enable_expert_parallel
    refused = _is_split(c, options) and (size > 1 or experts)
    return f"data_parallel_size={size}, enable_expert_parallel={experts}" if refused else None


STARTUP_RULES = (
    StartupRule(
        "`--pipeline-parallel-size` above 1",
        "both towers run in one stage",
        _above_one("parallel_config.pipeline_parallel_size"),
        "use --tensor-parallel-size instead",
    ),
    StartupRule(
        "`--decode-context-parallel-size`, `--prefill-context-parallel-size` above 1",
        "a canvas attends to a whole context on one rank",
        _above_one("parallel_config.decode_context_parallel_size", "parallel_config.prefill_context_parallel_size"),
        "leave it at 1",
    ),
    StartupRule(
        "`--kv-transfer-config`, `--ec-transfer-config`",
        "connectors do not carry canvases",
        _given("kv_transfer_config", "ec_transfer_config"),
    ),
    StartupRule(
        "`--speculative-config`", "diffusion already emits several tokens per step", _given("speculative_config")
    ),
    StartupRule(
        "`--enable-lora`", "adapters are not applied to the denoiser", _given("lora_config"), "leave out --enable-lora"
    ),
    StartupRule(
        "`--enable-dbo`, `--ubatch-size`",
        "a step runs one tower over one batch",
        lambda c, o: _given("parallel_config.enable_dbo")(c, o) or _above_one("parallel_config.ubatch_size")(c, o),
        "leave out --enable-dbo and --ubatch-size",
    ),
    StartupRule(
        "batch-sharded sampling",
        "canvases are sampled by every rank",
        _given("parallel_config.enable_batch_sharded_sampling"),
    ),
    StartupRule(
        "`--return-sampling-mask`",
        "a canvas is not drawn from one distribution per token",
        _given("model_config.return_sampling_mask"),
    ),
    StartupRule("watermarking", "revealed tokens cannot be watermarked", _given("watermark_config")),
    StartupRule(
        "`--mamba-cache-mode all`",
        "the denoiser reads one state per block",
        _equals("cache_config.mamba_cache_mode", "all"),
        "use --mamba-cache-mode align, or none without prefix caching",
    ),
    StartupRule("ReplaySSM", "the denoiser reads whole states, not replay rings", _given("cache_config.use_replayssm")),
    StartupRule(
        "`--kv-cache-dtype nvfp4`",
        "vLLM's one backend for it, FlashInfer, reads it in causal attention only, and a canvas' is not causal",
        _find("cache_config.cache_dtype", refused=lambda d: str(d).startswith("nvfp4"), text="kv_cache_dtype={1}"),
        "leave it out, or use --kv-cache-dtype fp8",
    ),
    StartupRule(
        "an FP8 cache with `--attention-backend FLASHINFER` on Blackwell",
        "FlashInfer's kernels for a canvas, whose attention is not causal, take no FP8 queries there",
        _fp8_queries,
        "use --kv-cache-dtype fp8 without --attention-backend FLASHINFER",
    ),
    StartupRule(
        "`--scheduling-policy priority`",
        "untried with two kinds of step",
        _equals("scheduler_config.policy", "priority"),
        "use --scheduling-policy fcfs",
    ),
    StartupRule(
        "`--data-parallel-size` above 1 with experts (on a CPU: with `--enable-expert-parallel`)",
        "vLLM's fused experts exchange tokens between data-parallel ranks, and ranks may be in different towers",
        _data_parallel_experts,
        "start one engine per replica instead",
    ),
    StartupRule(
        "`--enable-eplb`", "only the context tower's experts would be balanced", _given("parallel_config.enable_eplb")
    ),
    StartupRule(
        "`--worker-extension-cls`",
        "diffusion brings its own",
        _other_class("parallel_config.worker_extension_cls", WORKER_EXTENSION_CLASS),
    ),
    StartupRule(
        "`--scheduler-cls`", "diffusion brings its own", _other_class("scheduler_config.scheduler_cls", SCHEDULER_CLASS)
    ),
    StartupRule(
        "`VLLM_USE_BREAKABLE_CUDAGRAPH`",
        "a graph of the context tower would be replayed for denoise steps",
        _breakable_graphs,
        "set VLLM_USE_BREAKABLE_CUDAGRAPH=0",
    ),
    StartupRule(
        "`--prefill-schedule-interval` above 1",
        "it counts decode rows, and canvases are hidden from it",
        _above_one("scheduler_config.prefill_schedule_interval"),
        "leave it at 1",
    ),
    StartupRule(
        "`--max-num-batched-tokens` below the canvas length",
        "that is less than one canvas",
        _step_budget,
        "use --max-num-batched-tokens {canvas_length} or more",
    ),
    StartupRule(
        "`--long-prefill-token-threshold` below the canvas length",
        "that would cut canvases",
        _long_prefill_threshold,
        "use {canvas_length} or more, or 0",
    ),
    StartupRule(
        "`--max-model-len` at or below the canvas length",
        "that leaves no room for a prompt and a canvas",
        _model_length,
        "use --max-model-len {canvas_length_plus_1} or more",
    ),
    StartupRule(
        "an odd `--tensor-parallel-size` with the towers split",
        "each tower gets half of the ranks",
        _uneven_split,
        'use an even --tensor-parallel-size, or --diffusion \'{{"tower_placement": "colocated"}}\'',
    ),
    StartupRule(
        "a `--tensor-parallel-size` that does not divide a tower",
        "every rank that holds a tower holds as much of it",
        _indivisible,
        "use a --tensor-parallel-size that divides them",
    ),
    StartupRule(
        "`--data-parallel-size` above 1 or `--enable-expert-parallel` with the towers split",
        "towers are split within one tensor-parallel group",
        _split_replicas,
        'start one engine per replica, or use --diffusion \'{{"tower_placement": "colocated"}}\'',
    ),
    # last: some of the above also make vLLM choose it, and name the reason better
    StartupRule(
        "vLLM's deprecated model runner (V1)",
        "it cannot run diffusion",
        lambda c, _: None if c.use_v2_model_runner else "vLLM chose its deprecated model runner (V1)",
        "unset VLLM_USE_V2_MODEL_RUNNER",
    ),
)
"""In the order in which they are asked."""
