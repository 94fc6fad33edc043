"""Patches of vLLM's serving front end that concern requests on their way in and out; as in ``compat``, each with its
symptom, its upstream place and when it can go. Imports nothing of vLLM before it is called.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

from vllm_twotower.config import CONFIG_KEY


def check_prompts(architecture: str, check: Callable[[Any, Any], None]) -> None:
    """Let ``check(engine_core_request, vllm_config)`` refuse a request of our architecture by its prompt; idempotent.

    ``LogitsProcessor.validate_params`` sees the sampling parameters only. Wraps ``InputProcessor.process_inputs``; a
    ``ValueError`` of the check becomes vLLM's validation error, a 400. Can go when admission hooks see the prompt.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor, "_twotower_check", False):
        return
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def process_inputs_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process_inputs(self, *args, **kwargs)
        if self.model_config.architecture == architecture:
            try:
                check(request, self.vllm_config)
            except ValueError as problem:
                raise VLLMValidationError(str(problem)) from problem
        return request

    InputProcessor.process_inputs = process_inputs_and_check
    InputProcessor._twotower_check = True


def end_requests_at_shutdown(architecture: str) -> None:
    """Let requests that run while the server is told to stop end with an error; idempotent.

    Symptom: without ``--shutdown-timeout`` SIGTERM kills the engine at once (``launcher.py``); amid a step it tells
    nobody, clients wait for ever, and the server waits for its clients. Wraps ``AsyncLLM.shutdown``. Can go when
    that ends what is waiting.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    if getattr(AsyncLLM, "_twotower_shutdown", False):
        return
    shutdown = AsyncLLM.shutdown

    @functools.wraps(shutdown)
    def shutdown_and_tell(self: Any, *args: Any, **kwargs: Any) -> None:
        shutdown(self, *args, **kwargs)
        handler = getattr(self, "output_handler", None)
        if handler is not None and self.model_config.architecture == architecture:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())

    AsyncLLM.shutdown = shutdown_and_tell
    AsyncLLM._twotower_shutdown = True


_in_beam_search: contextvars.ContextVar[bool] = contextvars.ContextVar("twotower_in_beam_search", default=False)


def let_beam_search_name_its_mode(architecture: str, check: Callable[[Any, Any], None]) -> None:
    """Let ``check(extra_args, vllm_config)`` refuse a beam search, and decode the beams of the others in ``ar``.

    A beam is a request of one token that carries nothing of the user's request but its temperature, so a search over
    HTTP could not say ``diffusion_mode``. Wraps ``to_beam_search_params`` of both protocols, which drops
    ``vllm_xargs``, and ``InputProcessor.resolve_watermarking``, the one call that every search makes with its
    parameters (``entrypoints/generate/beam_search/online.py``). The tasks that a search starts for its beams inherit
    its context, which says what they are; their ids do not, a client may choose any. Idempotent. Can go when
    ``BeamSearchParams`` has ``extra_args``.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(InputProcessor, "_twotower_beam_search", False):
        return

    def keep_extra_args(request_type: Any) -> None:
        to_params = request_type.to_beam_search_params

        @functools.wraps(to_params)
        def to_params_and_extra_args(self: Any, *args: Any, **kwargs: Any) -> Any:
            params = to_params(self, *args, **kwargs)
            params.__dict__["twotower_extra_args"] = self.vllm_xargs
            return params

        request_type.to_beam_search_params = to_params_and_extra_args

    keep_extra_args(CompletionRequest)
    keep_extra_args(ChatCompletionRequest)
    resolve, process_inputs = InputProcessor.resolve_watermarking, InputProcessor.process_inputs

    @functools.wraps(resolve)
    def check_and_resolve(self: Any, params: Any) -> bool:
        if self.model_config.architecture == architecture and isinstance(params, BeamSearchParams):
            try:
                check(params.__dict__.get("twotower_extra_args"), self.vllm_config)
            except ValueError as problem:
                raise VLLMValidationError(str(problem)) from problem
            _in_beam_search.set(True)
        return resolve(self, params)

    @functools.wraps(process_inputs)
    def mark_beams_and_process(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        diffusion = self.vllm_config.additional_config.get(CONFIG_KEY)
        if self.model_config.architecture == architecture and diffusion and _in_beam_search.get():
            params.extra_args = {"diffusion_mode": "ar", **(params.extra_args or {})}
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.resolve_watermarking = check_and_resolve
    InputProcessor.process_inputs = mark_beams_and_process
    InputProcessor._twotower_beam_search = True
