"""Registration with vLLM: the architecture and the configuration hook.

``register_with_vllm`` runs in every vLLM process for every model, so it never raises and does as little as it can; a
problem is recorded and raised when *our* architecture is loaded.
"""

import logging
from typing import Any

from vllm_twotower import compat, compat_requests
from vllm_twotower.config import CONFIG_KEY, EngineOptions
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.frontend.request_checks import check_beam_search, check_request
from vllm_twotower.frontend.startup_rules import SCHEDULER_CLASS, WORKER_EXTENSION_CLASS, refuse

ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
MODEL_CLASS = "vllm_twotower.models.entry:NemotronHTwoTowerForCausalLM"
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
        compat.name_what_cannot_be_imported(ARCHITECTURE, MODEL_CLASS)
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
        compat_requests.check_prompts(ARCHITECTURE, check_request)
        compat_requests.let_beam_search_name_its_mode(ARCHITECTURE, check_beam_search)
        compat.extend_stat_loggers(ARCHITECTURE)
        compat_requests.end_requests_at_shutdown(ARCHITECTURE)


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
