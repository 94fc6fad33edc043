"""Registration with vLLM: the architecture, the configuration hook, and what of ours vLLM's front end calls.

``register_with_vllm`` runs in every vLLM process for every model, so it never raises and does as little as it can; a
problem is kept and raised when *our* architecture is loaded.
"""

from typing import TYPE_CHECKING

from vllm_twotower import compat
from vllm_twotower.config import CONFIG_KEY, EngineOptions, is_diffusion_on
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.frontend.checkpoint_checks import check_checkpoint
from vllm_twotower.frontend.cli_flag import add_flag, check_architecture, merge_flag
from vllm_twotower.frontend.request_checks import check_beam_search, check_params, check_request
from vllm_twotower.frontend.startup_rules import SCHEDULER_CLASS, WORKER_EXTENSION_CLASS, check_settings
from vllm_twotower.planning.model_facts import ARCHITECTURE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

MODEL_CLASS = "vllm_twotower.models.entry:NemotronHTwoTowerForCausalLM"

DEFAULT_MAX_NUM_SEQS = 64
"""Requests running at once at most where ``--max-num-seqs`` is not given. Each holds a Mamba state and a canvas of
logits, and the gain over AR peaks here; vLLM's own default is 128 to 1,024."""

_recorded_problem: str | None = None


def register_with_vllm() -> None:
    """Register the architecture and what surrounds it; idempotent, never raises."""
    global _recorded_problem
    try:
        from vllm import ModelRegistry

        if ARCHITECTURE not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
        compat.name_environment_variable(KERNELS_VARIABLE)
        compat.add_config_hook(ARCHITECTURE, TwoTowerConfigHook)
        compat.extend_engine_args(add_flag, merge_flag, check_checkpoint, check_architecture)
        compat.choose_default_max_num_seqs(limit_max_num_seqs)
        compat.explain_failed_import(ARCHITECTURE, MODEL_CLASS)
    except Exception as problem:  # another model must start whatever is wrong with us
        _recorded_problem = f"{type(problem).__name__}: {problem}"


def raise_recorded_problem() -> None:
    """Raise what registration had to swallow.

    Raises:
        RuntimeError: registration had failed; the message says what.

    """
    if _recorded_problem is not None:
        raise RuntimeError(f"vllm-twotower could not register with this vLLM: {_recorded_problem}")


class TwoTowerConfigHook:
    """vLLM calls this while it builds the configuration of an engine for our architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Nothing to change in the model's own configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot work and set what diffusion needs.

        Raises:
            ValueError: a setting cannot be combined with this model; the message says what to type instead.

        """
        from vllm.model_executor.models.config import NemotronHForCausalLMConfig

        from vllm_twotower.runtime.stat_loggers import DiffusionLogging, DiffusionProm, StepCounts

        raise_recorded_problem()
        NemotronHForCausalLMConfig.verify_and_update_config(vllm_config)
        options = read_engine_options(vllm_config)
        check_settings(vllm_config, options)
        if options is not None:
            apply_defaults(vllm_config)
        compat.check_requests(ARCHITECTURE, check_params, check_request)
        compat.decode_beams_in_ar(ARCHITECTURE, check_beam_search)
        compat.extend_stat_loggers(ARCHITECTURE, DiffusionProm, DiffusionLogging, StepCounts.take_from)
        compat.end_requests_at_shutdown(ARCHITECTURE)


def read_engine_options(vllm_config: "VllmConfig") -> EngineOptions | None:
    """Read our options, taking vLLM's own ``--diffusion-config`` to mean the same."""
    upstream = vllm_config.diffusion_config
    if upstream is not None:
        if is_diffusion_on(vllm_config):
            raise ValueError(
                "diffusion is configured twice, by diffusion_config and by additional_config['diffusion']: "
                "keep the second"
            )
        given = {"canvas_length": upstream.canvas_length, "max_steps": upstream.max_denoising_steps}
        vllm_config.additional_config[CONFIG_KEY] = {name: n for name, n in given.items() if n is not None}
        # left in place it would switch on vLLM's own diffusion path, which knows one tower only
        vllm_config.diffusion_config = None
    return EngineOptions.read(vllm_config)


def apply_defaults(vllm_config: "VllmConfig") -> None:
    """Set what the decoding backend needs."""
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = SCHEDULER_CLASS
    scheduler.async_scheduling = False
    vllm_config.parallel_config.worker_extension_cls = WORKER_EXTENSION_CLASS
    vllm_config.attention_config.use_non_causal = True


def limit_max_num_seqs(engine_args: "EngineArgs", model_config: "ModelConfig") -> int | None:
    """The most requests at once for an engine whose user did not say; None for other models and without diffusion."""
    diffusion = is_diffusion_on(engine_args) or engine_args.diffusion_config is not None
    if not diffusion or model_config.architecture != ARCHITECTURE:
        return None
    return max(DEFAULT_MAX_NUM_SEQS, engine_args.max_num_active_seqs or 0)
