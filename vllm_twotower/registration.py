"""Registration with vLLM: the architecture, the configuration hook, and what start-up refuses.

``register_with_vllm`` runs in every vLLM process for every model, so it never raises and does as little as it can; a
problem is recorded and raised when *our* architecture is loaded.
"""

import logging
from collections.abc import Callable
from typing import Any

from vllm_twotower import compat
from vllm_twotower.config import CONFIG_KEY, EngineOptions
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.request_checks import check_request

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
MODEL_CLASS = "vllm_twotower.models.twotower:NemotronHTwoTowerForCausalLM"
SCHEDULER_CLASS = "vllm_twotower.runtime.scheduler.BlockCommitScheduler"
WORKER_EXTENSION_CLASS = "vllm_twotower.runtime.worker_extension.DiffusionWorkerExtension"
ADMISSION_MODULE = "vllm_twotower.runtime.admission"

DEFAULT_MAX_NUM_SEQS = 64
"""Requests running at once where vLLM's own default (128 or more) would apply; the gain over AR peaks here."""

logger = logging.getLogger("vllm.twotower")


def register_with_vllm() -> None:
    """Register the architecture and its configuration hook; idempotent, never raises."""
    try:
        from vllm import ModelRegistry

        if ARCHITECTURE not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
        compat.name_environment_variable(KERNELS_VARIABLE)
        compat.add_config_hook(ARCHITECTURE, TwoTowerConfigHook)
        compat.wrap_engine_args(ARCHITECTURE)
    except Exception as problem:  # another model must start whatever is wrong with us
        compat.record_problem(f"{type(problem).__name__}: {problem}")


class TwoTowerConfigHook:
    """vLLM calls this while it builds the configuration of an engine for our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to change in the model's own configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot work and set what diffusion needs.

        Raises:
            ValueError: a setting cannot be combined with this model; the message says what to type instead.

        """
        from vllm.model_executor.models.config import NemotronHForCausalLMConfig

        compat.raise_recorded_problem()
        NemotronHForCausalLMConfig.verify_and_update_config(vllm_config)
        options = engine_options(vllm_config)
        refuse(vllm_config, options)
        apply_defaults(vllm_config, options)
        compat.check_prompts(ARCHITECTURE, check_request)
        compat.extend_stat_loggers(ARCHITECTURE)


def engine_options(vllm_config: Any) -> EngineOptions | None:
    """Read our options, taking vLLM's own ``--diffusion-config`` to mean the same."""
    upstream = vllm_config.diffusion_config
    ours = vllm_config.additional_config.get(CONFIG_KEY)
    if upstream is not None:
        if ours:
            raise ValueError(
                "diffusion is configured twice, by diffusion_config and by additional_config['diffusion']: "
                "keep the second"
            )
        ours = {"canvas_length": upstream.canvas_length}
        if upstream.max_denoising_steps is not None:
            ours["max_steps"] = upstream.max_denoising_steps
        vllm_config.additional_config[CONFIG_KEY] = ours
        # left in place it would switch on vLLM's own diffusion path, which knows one tower only
        vllm_config.diffusion_config = None
    return EngineOptions.from_additional_config(ours)


def apply_defaults(vllm_config: Any, options: EngineOptions | None) -> None:
    """Set what the decoding backend needs; with diffusion off, only admission checks are added."""
    model_config = vllm_config.model_config
    served = options.canvas_length if options is not None else 0
    processors = [p for p in model_config.logits_processors or [] if not str(p).startswith(ADMISSION_MODULE)]
    model_config.logits_processors = [*processors, f"{ADMISSION_MODULE}:canvas_{served}"]
    if options is None:
        return
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = SCHEDULER_CLASS
    scheduler.async_scheduling = False
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION_CLASS
    vllm_config.attention_config.use_non_causal = True
    if scheduler.max_num_seqs >= scheduler.DEFAULT_MAX_NUM_SEQS:
        logger.warning(
            "max_num_seqs=%d lowered to %d: each running request holds a Mamba state and a canvas of logits "
            "(a value below %d is kept as it is)",
            scheduler.max_num_seqs,
            DEFAULT_MAX_NUM_SEQS,
            scheduler.DEFAULT_MAX_NUM_SEQS,
        )
        scheduler.max_num_seqs = DEFAULT_MAX_NUM_SEQS
    active = getattr(scheduler, "max_num_active_seqs", None)
    if active is not None:
        scheduler.max_num_active_seqs = min(active, scheduler.max_num_seqs)


# ---- what start-up refuses -------------------------------------------------------------------------------------------
#
# One small rule each: (vllm_config, options) -> what is wrong and what to type instead, or None. Rules of the second
# list apply with diffusion on only.

Rule = Callable[[Any, EngineOptions], str | None]


def _needs_interpreter(c: Any, _: Any) -> str | None:
    from vllm.platforms import current_platform

    return compat.missing_interpreter_problem() if current_platform.is_cpu() else None


def _pipeline_parallel(c: Any, _: Any) -> str | None:
    size = c.parallel_config.pipeline_parallel_size
    return (
        f"pipeline_parallel_size={size}: both towers run in one stage; use --tensor-parallel-size instead"
        if size > 1
        else None
    )


def _context_parallel(c: Any, _: Any) -> str | None:
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(c.parallel_config, name, 1)) > 1:
            return f"{name}={size}: a canvas attends to a whole context on one rank; leave it at 1"
    return None


def _connectors(c: Any, _: Any) -> str | None:
    for name in ("kv_transfer_config", "ec_transfer_config"):
        if getattr(c, name, None) is not None:
            return f"{name} is set: connectors do not carry canvases; leave it out"
    return None


def _speculative(c: Any, _: Any) -> str | None:
    given = c.speculative_config is not None
    return "speculative_config is set: diffusion already emits several tokens per step; leave it out" if given else None


def _lora(c: Any, _: Any) -> str | None:
    return (
        "lora_config is set: adapters are not applied to the denoiser; leave out --enable-lora"
        if c.lora_config
        else None
    )


def _dual_batch_overlap(c: Any, _: Any) -> str | None:
    if getattr(c.parallel_config, "enable_dbo", False) or getattr(c.parallel_config, "ubatch_size", 0) > 1:
        return (
            "dual batch overlap is on: a step runs one tower over one batch; leave out --enable-dbo and --ubatch-size"
        )
    return None


def _sharded_sampling(c: Any, _: Any) -> str | None:
    given = getattr(c.parallel_config, "enable_batch_sharded_sampling", False)
    return "enable_batch_sharded_sampling is on: canvases are sampled by every rank; leave it out" if given else None


def _watermark(c: Any, _: Any) -> str | None:
    given = getattr(c, "watermark_config", None) is not None
    return "watermark_config is set: revealed tokens cannot be watermarked; leave it out" if given else None


def _mamba_cache_mode(c: Any, _: Any) -> str | None:
    mode = c.cache_config.mamba_cache_mode
    return (
        f"mamba_cache_mode={mode}: use --mamba-cache-mode align, or none without prefix caching"
        if mode == "all"
        else None
    )


def _replay_ssm(c: Any, _: Any) -> str | None:
    given = getattr(c.cache_config, "use_replayssm", False)
    return "use_replayssm is on: the denoiser reads whole states, not replay rings; leave it out" if given else None


def _priority(c: Any, _: Any) -> str | None:
    policy = c.scheduler_config.policy
    if policy == "priority":
        return f"scheduling policy={policy}: untried with two kinds of step; use --scheduling-policy fcfs"
    return None


def _data_parallel(c: Any, _: Any) -> str | None:
    from vllm.platforms import current_platform

    size = c.parallel_config.data_parallel_size
    if size == 1 or "E" not in c.model_config.hf_config.hybrid_override_pattern:
        return None
    if c.parallel_config.enable_expert_parallel or not current_platform.is_cpu():
        return (
            f"data_parallel_size={size}: vLLM's fused experts exchange tokens between data-parallel ranks, and ranks "
            "may be in different towers; start one engine per replica instead"
        )
    return None


def _expert_balancing(c: Any, _: Any) -> str | None:
    given = getattr(c.parallel_config, "enable_eplb", False)
    return "enable_eplb is on: only the context tower's experts would be balanced; leave it out" if given else None


def _own_classes(c: Any, _: Any) -> str | None:
    extension = c.parallel_config.worker_extension_cls
    if extension and extension != WORKER_EXTENSION_CLASS:
        return f"worker_extension_cls={extension}: diffusion brings its own; leave it out"
    scheduler = c.scheduler_config.scheduler_cls
    if scheduler is not None and scheduler != SCHEDULER_CLASS:
        return f"scheduler_cls={scheduler}: diffusion brings its own; leave it out"
    return None


def _old_runner(c: Any, _: Any) -> str | None:
    if not c.use_v2_model_runner:
        return "vLLM chose its deprecated model runner (V1), which cannot run diffusion: unset VLLM_USE_V2_MODEL_RUNNER"
    return None


def _breakable_graphs(c: Any, _: Any) -> str | None:
    import vllm.envs as envs

    if envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        return (
            "VLLM_USE_BREAKABLE_CUDAGRAPH is on (VLLM_BATCH_INVARIANT turns it on too): a graph of the context "
            "tower would be replayed for denoise steps; set VLLM_USE_BREAKABLE_CUDAGRAPH=0"
        )
    return None


def _prefill_interval(c: Any, _: Any) -> str | None:
    interval = getattr(c.scheduler_config, "prefill_schedule_interval", 1)
    if interval > 1:
        return (
            f"prefill_schedule_interval={interval} counts decode rows, and canvases are hidden from it; leave it at 1"
        )
    return None


def _step_budget(c: Any, options: EngineOptions) -> str | None:
    s = c.scheduler_config
    budget = s.max_num_batched_tokens
    if getattr(s, "max_num_scheduled_tokens", None) is not None:
        budget = min(budget, s.max_num_scheduled_tokens)
    if budget < options.canvas_length:
        return (
            f"max_num_batched_tokens={budget} is less than one canvas (canvas_length={options.canvas_length}): "
            f"use --max-num-batched-tokens {options.canvas_length} or more"
        )
    return None


def _long_prefill_threshold(c: Any, options: EngineOptions) -> str | None:
    threshold = c.scheduler_config.long_prefill_token_threshold
    if 0 < threshold < options.canvas_length:
        return (
            f"long_prefill_token_threshold={threshold} would cut canvases (canvas_length={options.canvas_length}): "
            f"use {options.canvas_length} or more, or 0"
        )
    return None


def _model_length(c: Any, options: EngineOptions) -> str | None:
    length = c.model_config.max_model_len
    if length <= options.canvas_length:
        return (
            f"max_model_len={length} leaves no room for a prompt and a canvas (canvas_length={options.canvas_length}): "
            f"use --max-model-len {options.canvas_length + 1} or more"
        )
    return None


def _placement(c: Any, options: EngineOptions) -> str | None:
    size = c.parallel_config.tensor_parallel_size
    if options.tower_placement == "split":
        return "tower_placement=split: not built yet; use tower_placement=colocated"
    if size > 1 and options.tower_placement == "auto":
        return (
            f"tensor_parallel_size={size} with tower_placement=auto means one tower per device, which is not "
            "built yet: use "
            '--additional-config \'{"diffusion": {"tower_placement": "colocated"}}\''
        )
    return None


ALWAYS_REFUSED: tuple[Rule, ...] = (_needs_interpreter,)
REFUSED_WITH_DIFFUSION: tuple[Rule, ...] = (
    _pipeline_parallel,
    _context_parallel,
    _connectors,
    _speculative,
    _lora,
    _dual_batch_overlap,
    _sharded_sampling,
    _watermark,
    _mamba_cache_mode,
    _replay_ssm,
    _priority,
    _data_parallel,
    _expert_balancing,
    _own_classes,
    _breakable_graphs,
    _prefill_interval,
    _step_budget,
    _long_prefill_threshold,
    _model_length,
    _placement,
    _old_runner,  # last: some of the above also make vLLM choose it, and name the reason better
)


def refuse(vllm_config: Any, options: EngineOptions | None) -> None:
    """Raise for the first rule that objects.

    Raises:
        ValueError: names the setting, its value and what to type instead.

    """
    rules = ALWAYS_REFUSED if options is None else ALWAYS_REFUSED + REFUSED_WITH_DIFFUSION
    for rule in rules:
        if problem := rule(vllm_config, options):  # type: ignore[arg-type]
            raise ValueError(f"Nemotron-Labs-TwoTower: {problem}")
