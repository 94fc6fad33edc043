"""Shims of an engine's start: its arguments, its configuration, its process groups."""

import functools
import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_twotower.compat.wrapping import find_argument, wrap

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs


def add_config_hook(architecture: str, hook: type) -> None:
    """``hook.verify_and_update_config`` sees the configuration of every engine for one architecture.

    Symptom: a plugin has no public way to adjust the configuration of its own architecture.
    Upstream: vllm.model_executor.models.config.MODELS_CONFIG_MAP,
        vllm.config.ModelConfig._try_verify_and_update_model_config, vllm.config.VllmConfig.try_verify_and_update_config
    Removed when: ``ModelRegistry.register_model`` takes a configuration class.
    Test: tests/test_registration.py::test_what_the_hook_sets
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    MODELS_CONFIG_MAP[architecture] = hook


def name_environment_variable(name: str) -> None:
    """A variable of ours is among those that vLLM knows.

    Symptom: vLLM warns of every variable that begins with ``VLLM_`` and is not in its table, or refuses to start over
        it with ``--fail-on-environ-validation``.
    Upstream: vllm.envs.environment_variables, vllm.platforms.interface.Platform.validate_environ
    Removed when: a plugin can declare its variables.
    Test: tests/test_compat.py::test_vllm_still_refuses_variables_it_does_not_know
    """
    from vllm import envs

    envs.environment_variables.setdefault(name, lambda: os.environ.get(name))


@functools.cache
def extend_engine_args(
    add_option: Callable[[Any], None],
    read_option: Callable[[Any, Any], None],
    check_before: Callable[[Any], None],
    check_after: Callable[[Any, str], None],
) -> None:
    """Every command built on vLLM's engine arguments has an option of ours, and checks before anything is started.

    Symptom: only a platform plugin can change the parser (``Platform.pre_register_and_update``), and a broken
        checkpoint is noticed late, in a worker, without the name of the file.
    Upstream: vllm.engine.arg_utils.EngineArgs.add_cli_args, vllm.engine.arg_utils.EngineArgs.from_cli_args,
        vllm.engine.arg_utils.EngineArgs.create_engine_config
    Removed when: a general plugin can add an option, and a check of its own architecture's checkpoints.
    Test: tests/test_flag.py::test_alone_and_with_options

    Args:
        add_option: gets the parser.
        read_option: gets the engine arguments and the parsed namespace they were read from.
        check_before: gets the engine arguments.
        check_after: gets the engine arguments and the architecture they turned out to name.

    """
    from vllm.engine.arg_utils import EngineArgs

    @wrap(EngineArgs, "add_cli_args")
    def add_cli_args(upstream: Any, *args: Any, **kwargs: Any) -> Any:
        parser = upstream(*args, **kwargs)
        add_option(parser)
        return parser

    @wrap(EngineArgs, "from_cli_args")
    def from_cli_args(upstream: Any, *args: Any, **kwargs: Any) -> Any:
        engine_args = upstream(*args, **kwargs)
        read_option(engine_args, find_argument(upstream, "args", *args, **kwargs))
        return engine_args

    @wrap(EngineArgs, "create_engine_config")
    def create_engine_config(upstream: Any, self: "EngineArgs", *args: Any, **kwargs: Any) -> Any:
        check_before(self)
        config = upstream(self, *args, **kwargs)
        check_after(self, config.model_config.architecture)
        return config


@functools.cache
def choose_default_max_num_seqs(choose: "Callable[[EngineArgs, ModelConfig], int | None]") -> None:
    """``max_num_seqs`` is at most what ``choose`` says (None: no matter) where the user did not set it.

    Symptom: vLLM fills the value in before a model's configuration hook runs, which then cannot tell its default from
        what a user asked for.
    Upstream: vllm.engine.arg_utils.EngineArgs._set_default_max_num_seqs_and_batched_tokens_args,
        vllm.engine.arg_utils.EngineArgs.max_num_seqs
    Removed when: a configuration hook can tell what was set.
    Test: tests/test_registration.py::test_a_number_of_places_that_was_asked_for_is_kept
    """
    from vllm.engine.arg_utils import EngineArgs

    @wrap(EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args")
    def set_defaults(upstream: Any, self: "EngineArgs", *args: Any, **kwargs: Any) -> None:
        is_set = self.max_num_seqs is not None
        upstream(self, *args, **kwargs)
        chosen = None if is_set else choose(self, find_argument(upstream, "model_config", self, *args, **kwargs))
        if chosen is not None and self.max_num_seqs is not None:
            self.max_num_seqs = min(self.max_num_seqs, chosen)


@functools.cache
def explain_failed_import(architecture: str, model_class: str) -> None:
    """The refusal of our architecture says which of vLLM's names is missing.

    Symptom: when a model class cannot be imported, vLLM logs the reason, in whichever process it is, and raises "failed
        to be inspected. Please check the logs".
    Upstream: vllm.model_executor.models.registry._ModelRegistry._raise_for_unsupported
    Removed when: that function raises from the reason.
    Test: tests/test_other_models.py::test_a_vllm_without_a_name_that_we_need_refuses_our_model_only
    """
    from vllm.model_executor.models.registry import _ModelRegistry

    @wrap(_ModelRegistry, "_raise_for_unsupported")
    def raise_the_reason(upstream: Any, *args: Any, **kwargs: Any) -> None:
        if architecture in find_argument(upstream, "architectures", *args, **kwargs):
            try:
                importlib.import_module(model_class.partition(":")[0])
            except (ImportError, AttributeError) as problem:
                raise ValueError(f"vllm-twotower does not fit this vLLM: {problem}") from problem
        upstream(*args, **kwargs)


def replace_tensor_parallel_group(parallel_config: "ParallelConfig", group_ranks: list[list[int]]) -> None:
    """This process's tensor-parallel group is split into the given ones, of one size; to be called by all its ranks
    alike.

    Symptom: every parallel layer is sharded over the whole group, and the towers are to have half of it each. The old
        group goes on existing.
    Upstream: vllm.distributed.parallel_state._TP, vllm.distributed.parallel_state.get_tp_group,
        vllm.distributed.parallel_state.init_model_parallel_group, vllm.config.ParallelConfig.tensor_parallel_size
    Removed when: a model can ask for a part of the group.
    Test: tests/test_placement.py::test_split_towers_write_the_references_tokens
    """
    from vllm.distributed import parallel_state

    old = parallel_state.get_tp_group()
    parallel_state._TP = parallel_state.init_model_parallel_group(
        group_ranks, old.local_rank, old.torch_distributed_backend, group_name="tower"
    )
    parallel_config.tensor_parallel_size = len(group_ranks[0])
