"""Every patch of vLLM and every work-around of a vLLM defect: symptom, upstream place, when it can go. Those that
concern requests on their way through the front end are in ``compat_requests``.

Each work-around of a defect has a test in ``tests/test_compat.py`` that fails once it is no longer needed, and
``tools/check_vllm_names.py`` checks without installing anything that every private name we rely on exists in a vLLM
wheel. Imports nothing of vLLM before it is called.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from vllm_twotower.config import CONFIG_KEY

_recorded_problem: str | None = None


def record_problem(problem: str) -> None:
    """Keep a registration problem until our architecture is loaded; registration itself must never raise."""
    global _recorded_problem
    _recorded_problem = problem


def raise_recorded_problem() -> None:
    """Raise what registration had to swallow.

    Raises:
        RuntimeError: registration had failed; the message says what and what to do.

    """
    if _recorded_problem is not None:
        raise RuntimeError(f"vllm-twotower could not register with this vLLM: {_recorded_problem}")


def add_config_hook(architecture: str, hook: type) -> None:
    """Let ``hook.verify_and_update_config`` see the engine's configuration for one architecture.

    Private: ``vllm.model_executor.models.config.MODELS_CONFIG_MAP``, read by
    ``ModelConfig._try_verify_and_update_model_config`` and ``VllmConfig.try_verify_and_update_config``. vLLM has no
    public way for a plugin to adjust the configuration of its own architecture. Can go when
    ``ModelRegistry.register_model`` takes a configuration class.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = hook


def name_environment_variable(name: str) -> None:
    """Let vLLM know a variable of ours; idempotent.

    Symptom: vLLM warns of every variable that begins with ``VLLM_`` and is not in ``vllm.envs.environment_variables``,
    or refuses to start over it with ``--fail-on-environ-validation`` (``Platform.validate_environ``). Can go when a
    plugin can declare its variables.
    """
    from vllm import envs

    envs.environment_variables.setdefault(name, lambda: os.environ.get(name))


def wrap_engine_args(architecture: str) -> None:
    """Give every command built on vLLM's engine arguments a ``--diffusion`` flag, and check our checkpoints before
    anything is started; idempotent.

    Wraps ``EngineArgs.add_cli_args``, ``from_cli_args`` and ``create_engine_config``. Officially only a platform plugin
    can change the parser (``Platform.pre_register_and_update``). All three do nothing more than upstream's unless the
    flag is given or the model is a two-tower folder. Can go when a general plugin can add an option.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_twotower.frontend import cli_flag
    from vllm_twotower.frontend.checkpoint_checks import check_checkpoint

    if getattr(EngineArgs, "_twotower_flag", False):
        return
    add_cli_args, create_engine_config = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    from_cli_args = EngineArgs.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_cli_args_and_ours(parser: Any) -> Any:
        parser = add_cli_args(parser)
        cli_flag.add_flag(parser)
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_args_and_ours(cls: Any, args: Any) -> Any:
        engine_args = from_cli_args(cls, args)
        cli_flag.merge(engine_args, args)
        return engine_args

    @functools.wraps(create_engine_config)
    def create_engine_config_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_checkpoint(self)
        config = create_engine_config(self, *args, **kwargs)
        cli_flag.check_architecture(self, config.model_config.architecture, architecture)
        return config

    EngineArgs.add_cli_args = staticmethod(add_cli_args_and_ours)
    EngineArgs.from_cli_args = classmethod(from_cli_args_and_ours)
    EngineArgs.create_engine_config = create_engine_config_and_check
    EngineArgs._twotower_flag = True


def name_what_cannot_be_imported(architecture: str, model_class: str) -> None:
    """Let the refusal of our architecture say which of vLLM's names is missing; idempotent.

    Symptom: when a model class cannot be imported, vLLM logs the reason, in whichever process it is, and raises "failed
    to be inspected. Please check the logs" (``registry.py``). Wraps ``_raise_for_unsupported``, which raises that. Can
    go when it raises from the reason.
    """
    from vllm.model_executor.models.registry import _ModelRegistry

    if getattr(_ModelRegistry, "_twotower_reason", False):
        return
    raise_for_unsupported = _ModelRegistry._raise_for_unsupported

    @functools.wraps(raise_for_unsupported)
    def raise_the_reason(self: Any, architectures: list[str]) -> None:
        if architecture in architectures:
            try:
                importlib.import_module(model_class.partition(":")[0])
            except (ImportError, AttributeError) as problem:
                raise ValueError(f"vllm-twotower does not fit this vLLM: {problem}") from problem
        raise_for_unsupported(self, architectures)

    _ModelRegistry._raise_for_unsupported = raise_the_reason
    _ModelRegistry._twotower_reason = True


def replace_tensor_parallel_group(group_ranks: list[list[int]]) -> None:
    """Split this process's tensor-parallel group into the given ones; to be called by all its ranks alike.

    Private: ``vllm.distributed.parallel_state._TP``, which everything reads through ``get_tp_group``. The old group
    goes on existing. vLLM 0.32 has no ``patch_tensor_parallel_group`` any more. Can go when a model can ask for a part
    of the group.
    """
    from vllm.distributed import parallel_state

    old = parallel_state.get_tp_group()
    parallel_state._TP = parallel_state.init_model_parallel_group(
        group_ranks, old.local_rank, old.torch_distributed_backend, group_name="tower"
    )


def extend_stat_loggers(architecture: str) -> None:
    """Let vLLM's Prometheus and log-line loggers report our counters for engines of our architecture; idempotent.

    ``vllm.stat_logger_plugins`` would do it without patching, but a logger registered there is built for every model,
    and turns statistics on where the user turned them off. Can go when an architecture can bring its own stat logger.
    """
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

    from vllm_twotower.runtime.stat_loggers import DiffusionLogging, DiffusionProm, StepCounts

    if getattr(PrometheusStatLogger, "_twotower", False):
        return

    def extend(cls: Any, make: Callable[[Any], Any]) -> None:
        init, record = cls.__init__, cls.record

        @functools.wraps(init)
        def init_and_ours(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            init(self, vllm_config, *args, **kwargs)
            ours = vllm_config.model_config.architecture == architecture
            self.twotower = make(self) if ours and vllm_config.additional_config.get(CONFIG_KEY) else None

        @functools.wraps(record)
        def record_and_ours(
            self: Any, scheduler_stats: Any, iteration_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any
        ) -> None:
            scheduler_stats, counts = StepCounts.take_from(scheduler_stats)
            if counts is not None and self.twotower is not None:
                index = (engine_idx,) if cls is PrometheusStatLogger else ()
                self.twotower.observe(counts, *index)
            record(self, scheduler_stats, iteration_stats, *args, engine_idx=engine_idx, **kwargs)

        cls.__init__, cls.record = init_and_ours, record_and_ours

    def prometheus(logger: Any) -> DiffusionProm:
        return DiffusionProm(logger.vllm_config.model_config.served_model_name, logger.engine_indexes)

    extend(PrometheusStatLogger, prometheus)
    extend(LoggingStatLogger, lambda self: DiffusionLogging())
    log = LoggingStatLogger.log

    @functools.wraps(log)
    def log_and_ours(self: Any) -> None:
        log(self)
        if self.twotower is not None:
            self.twotower.log()

    LoggingStatLogger.log = log_and_ours
    PrometheusStatLogger._twotower = True


PASSES_BITS = 16


def pass_report(num_passes: list[int], canvas_passes: list[int], broken: list[bool], device: Any) -> Any:
    """Denoise passes of each row, and whether it is broken, as the one integer per row that a sampler's output can
    carry to the scheduler.

    ``SamplerOutput`` and ``ModelRunnerOutput`` have fixed fields; ``num_nans`` is the only one per row that reaches the
    scheduler as it is, and it is unused in a denoise step. Can go when a model state can attach its own statistics.

    Args:
        num_passes: passes of this step, per row.
        canvas_passes: passes of the whole canvas for a row whose canvas is finished, else 0.
        broken: whether the row's logits held a NaN.
        device: of the result.

    Returns:
        int32 [R], negative for a broken row. Where vLLM was told to raise on any NaN count, 1 for a broken row, None
        if there is none.

    """
    import torch
    import vllm.envs as envs

    if envs.VLLM_RAISE_ON_LOGIT_NANS:
        return torch.tensor(broken, dtype=torch.int32, device=device) if any(broken) else None
    rows = zip(num_passes, canvas_passes, broken, strict=True)
    packed = [(done << PASSES_BITS | now) * (-1 if bad else 1) for now, done, bad in rows]
    return torch.tensor(packed, dtype=torch.int32, device=device)


def take_pass_report(result: Any) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Undo ``pass_report`` on a ``ModelRunnerOutput``.

    Returns:
        Request id -> (passes of this step, of the finished canvas), and the ids of broken rows.

    """
    packed, result.num_nans_in_logits = result.num_nans_in_logits or {}, None
    mask = (1 << PASSES_BITS) - 1
    passes = {req_id: (abs(value) & mask, abs(value) >> PASSES_BITS) for req_id, value in packed.items()}
    return passes, [req_id for req_id, value in packed.items() if value < 0]


def nan_rows(result: Any) -> list[str]:
    """Ids of the rows of a context step whose logits held a NaN, as far as somebody counted."""
    return [req_id for req_id, count in (result.num_nans_in_logits or {}).items() if count > 0]


def end_with_error(scheduler: Any, req_id: str) -> None:
    """Let the coming ``Scheduler.update_from_output`` finish a request with ``finish_reason="error"``, over HTTP a 500.

    ``grammar_compile_error_reqs`` is where upstream collects the requests it ends so, whatever their grammar. Can go
    when a sampler can end a request.
    """
    scheduler.grammar_compile_error_reqs.add(req_id)


def pass_over_once(request: Any, current_step: int) -> None:
    """Keep a running request out of the next ``Scheduler.schedule`` call, in its place and as a possible victim.

    Uses ``Request.next_decode_eligible_step``, upstream's own way of skipping a running request (written for pipeline
    parallelism, and used by its diffusion scheduler). ``schedule`` counts ``current_step`` up before it looks. Can go
    when the scheduler takes a filter.
    """
    request.next_decode_eligible_step = current_step + 2


def stop_passing_over(request: Any) -> None:
    """Undo ``pass_over_once``."""
    request.next_decode_eligible_step = 0


@contextlib.contextmanager
def without_caching_blocks(kv_cache_manager: Any) -> Iterator[None]:
    """Allocate KV slots while inside without hashing any block.

    What a denoise step writes is noise until the commit overwrites it. For a canvas upstream hashes nothing, it stops
    at the request's last token; the slot that a mock-AR pass writes *is* that of the last token, and its block would be
    offered to other requests. Upstream's own switch for this is ``delay_cache_blocks``, which ``schedule`` does not
    pass.
    """
    allocate_slots = kv_cache_manager.allocate_slots
    kv_cache_manager.allocate_slots = functools.partial(allocate_slots, delay_cache_blocks=True)
    try:
        yield
    finally:
        del kv_cache_manager.allocate_slots


def missing_interpreter_problem() -> str | None:
    """What to type where vLLM's model runner cannot run its kernels, or None.

    Symptom: without an active Triton driver vLLM silently takes its deprecated runner (V1), which knows no model
    states. Triton decides at import whether kernels are interpreted, so the variable must be there before Python
    starts. Can go when Triton has a CPU backend.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'vllm-twotower[cpu]'"
        return None
    return (
        "this model needs Triton's interpreter on a CPU: set TRITON_INTERPRET=1 before Python starts, for example "
        "`TRITON_INTERPRET=1 vllm serve MODEL` (the vllm-twotower command and the Makefile set it themselves)"
    )


def is_warmup_request(req_id: str) -> bool:
    """Whether vLLM's kernel warm-up made this request up.

    Symptom: ``v1/worker/gpu/warmup.py`` (on GPUs in 0.32, everywhere in 0.33) sends invented requests through the real
    runner and decodes them one token at a time, which no mask-diffusion request does. They run as context rows and are
    counted nowhere. Their ids are the only mark they carry. Can go when the warm-up goes through the scheduler.
    """
    return req_id.startswith(("_warmup_", "_v2_mixed_warmup"))


def prompt_logprobs_of(result: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two dicts of a ``ModelRunnerOutput`` that hold prompt logprobs by request id, both written by the caller.

    vLLM 0.32's scheduler asserts that prompt logprobs arrive together with a token (``scheduler.py``, "EngineCore
    returns no partial prefill outputs"); ours arrive a step earlier and are held back until then. Can go when that
    assertion goes.
    """
    return result.prompt_logprobs_dict, result.prompt_token_id_logprobs_dict
